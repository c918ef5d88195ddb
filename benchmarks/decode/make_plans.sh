#!/bin/sh
# The predictions of this folder: commit them before they are measured.
set -e
cd "$(dirname "$0")"
make_plan() { # NAME MODEL QUANT CACHE [OPTIONS]
    name=$1 model=$2 quant=$3 cache=$4
    shift 4
    planner plan "$model" --gpu h200 --ram 128GiB --no-ledger --placement full_gpu --quant "$quant" \
        --cache "$cache" --prompt-tokens 512 --new-tokens 128 "$@" -o "$name-$cache.plan.json" >/dev/null
}
for cache in dynamic static offloaded quantized; do
    make_plan qwen7b-bf16 qwen2.5-7b none "$cache"
    make_plan qwen7b-nf4 qwen2.5-7b nf4 "$cache"
done
make_plan qwen7b-int8 qwen2.5-7b int8 static
make_plan qwen7b-bf16-b8 qwen2.5-7b none static --batch-size 8
make_plan qwen05-bf16 qwen2.5-0.5b none static
