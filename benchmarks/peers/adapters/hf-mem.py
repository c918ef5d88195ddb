"""hf-mem's KV cache, and weights as their headers have them: its command asks the network for those."""

import json
import sys
from importlib.metadata import version

from hf_mem.safetensors.kv_cache import compute_safetensors_kv_cache_size


def predict(job):
    """Errors: `ValueError` for what it cannot express."""
    if job["task"] != "infer":
        raise ValueError("no training")
    if job["quant"] != "none":
        raise ValueError("reads quantized checkpoints, not quantization while loading")
    config = job["config"].get("text_config", job["config"])
    length = job["prompt_tokens"] + job["new_tokens"]
    cache = compute_safetensors_kv_cache_size(config, "BF16", length, job["batch_size"])
    return {"bytes": job["parameters"] * (4 if job["dtype"] == "fp32" else 2) + int(cache)}


for job in map(json.loads, sys.stdin):
    row = {"key": job["key"], "version": version("hf-mem")}
    try:
        print(json.dumps(row | predict(job)), flush=True)
    except Exception as error:
        print(json.dumps(row | {"refused": f"{type(error).__name__}: {error}"[:200]}), flush=True)
