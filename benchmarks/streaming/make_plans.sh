#!/bin/sh
# The predictions of this folder: commit them before they are measured.
set -e
cd "$(dirname "$0")"
make_plan() { # NAME MODEL VRAM [OPTIONS]
    name=$1 model=$2 vram=$3
    shift 3
    planner plan "$model" --gpu h200 --vram "$vram" --ram 120GiB --no-ledger "$@" -o "$name.plan.json" >/dev/null
}
away="--placement mixed_offload"
decode="--prompt-tokens 512 --new-tokens 32"
make_plan qwen14b-bf16-9gib qwen2.5-14b 9GiB $away --engine stream --quant none $decode
make_plan qwen14b-bf16-9gib-accelerate qwen2.5-14b 9GiB $away --engine accelerate --quant none \
    --prompt-tokens 512 --new-tokens 8
make_plan llama70b-nf4-24gib llama-3-70b 24GiB $away --engine stream --quant nf4 $decode
make_plan llama70b-nf4-24gib-4096 llama-3-70b 24GiB $away --engine stream --quant nf4 \
    --prompt-tokens 4096 --new-tokens 8
make_plan llama70b-nf4-24gib-batch64 llama-3-70b 24GiB $away --engine stream --quant nf4 --batch-size 64 \
    --prompt-tokens 128 --new-tokens 128
make_plan llama70b-nf4-resident-4096 llama-3-70b 141GB --placement full_gpu --quant nf4 \
    --prompt-tokens 4096 --new-tokens 8
make_plan llama8b-nf4-4gib llama-3.1-8b 4GiB $away --engine stream --quant nf4 \
    --prompt-tokens 512 --new-tokens 64
train="--task train --method qlora --quant nf4 --loss fused --kernels torch --optimizer paged_adamw_8bit"
make_plan llama70b-qlora-16gib llama-3-70b 16GiB $away --engine stream $train --seq-len 1024 --batch-size 4
make_plan llama70b-qlora-resident llama-3-70b 141GB --placement full_gpu $train --seq-len 1024 --batch-size 4
make_plan llama8b-qlora-5gib llama-3.1-8b 5GiB $away --engine stream $train --seq-len 2048
make_plan llama8b-qlora-resident llama-3.1-8b 141GB --placement full_gpu $train --seq-len 2048
