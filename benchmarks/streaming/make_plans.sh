#!/bin/sh
# The predictions of this folder: commit them before they are measured. machine.json is the machine they are
# for, with its probe: `planner inspect --json` after `executor probe` there writes another.
set -e
cd "$(dirname "$0")"
make_plan() { # NAME MODEL VRAM [OPTIONS]
    name=$1 model=$2 vram=$3
    shift 3
    planner plan "$model" --machine machine.json --vram "$vram" --no-ledger "$@" -o "$name.plan.json" >/dev/null
}
whole=141GB
ram="--placement mixed_offload --engine stream"
disk="--placement disk_offload --engine stream"
card="--placement full_gpu"
decode="--prompt-tokens 512 --new-tokens"

make_plan qwen14b-bf16-9gib qwen2.5-14b 9GiB $ram --quant none $decode 32
make_plan qwen14b-bf16-9gib-accelerate qwen2.5-14b 9GiB --placement mixed_offload --engine accelerate \
    --quant none $decode 8
make_plan llama70b-nf4-24gib llama-3-70b 24GiB $ram --quant nf4 $decode 32
make_plan llama70b-nf4-24gib-lookup llama-3-70b 24GiB $ram --quant nf4 --speculate lookup $decode 128
make_plan llama70b-nf4-24gib-4096 llama-3-70b 24GiB $ram --quant nf4 --prompt-tokens 4096 --new-tokens 8
make_plan llama70b-nf4-24gib-batch64 llama-3-70b 24GiB $ram --quant nf4 --batch-size 64 --prompt-tokens 128 \
    --new-tokens 128
make_plan llama70b-nf4-resident-4096 llama-3-70b $whole $card --quant nf4 --prompt-tokens 4096 --new-tokens 8
make_plan llama8b-nf4-4gib llama-3.1-8b 4GiB $ram --quant nf4 $decode 64
make_plan llama8b-nf4-2gib llama-3.1-8b 2GiB $ram --quant nf4 $decode 64
make_plan qwen7b-nf4-disk qwen2.5-7b 4GiB $disk --quant nf4 $decode 8
make_plan qwen7b-bf16-disk-accelerate qwen2.5-7b 4GiB --placement disk_offload --engine accelerate --quant none \
    $decode 2

train="--task train --loss fused --kernels torch --optimizer paged_adamw_8bit"
four="--seq-len 1024 --batch-size 4"
one="--seq-len 2048"
qlora="$train --method qlora --quant nf4"
away=--activation-offload
make_plan llama70b-qlora-resident llama-3-70b $whole $card $qlora $four
make_plan llama70b-qlora-16gib llama-3-70b 16GiB $ram $qlora $four
make_plan llama70b-qlora-8gib llama-3-70b 8GiB $ram $qlora $four $away
make_plan llama70b-qlora-6gib llama-3-70b 6GiB $ram $qlora $four $away
make_plan llama8b-qlora-resident llama-3.1-8b $whole $card $qlora $one
make_plan llama8b-qlora-2.5gib llama-3.1-8b 2.5GiB $ram $qlora $one
make_plan qwen7b-qlora-2.5gib qwen2.5-7b 2.5GiB $ram $qlora $one
make_plan qwen32b-qlora-resident qwen2.5-32b $whole $card $qlora $one
make_plan qwen32b-qlora-8gib qwen2.5-32b 8GiB $ram $qlora $one
make_plan qwen14b-lora-resident qwen2.5-14b $whole $card $train --method lora --quant none $four
make_plan qwen14b-lora-6gib qwen2.5-14b 6GiB $ram $train --method lora --quant none $four $away
