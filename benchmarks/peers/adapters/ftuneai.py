"""ftuneai through its Python interface; its fetch of config.json answers with ours."""

import json
import sys
from importlib.metadata import version

import ftuneai.hub
from ftuneai.estimator import Estimator

OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_8bit": "adam_8bit",
    "adamw_bnb_8bit": "adam_8bit",
    "paged_adamw_8bit": "adam_8bit",
    "sgd": "sgd",
    "adafactor": "adafactor",
}


def predict(job):
    """Errors: `ValueError` for what it cannot express."""
    if job["task"] == "infer":
        raise ValueError("no inference")
    if job["optimizer"] not in OPTIMIZERS:
        raise ValueError(f"no optimizer {job['optimizer']}")
    ftuneai.hub._fetch_json = lambda *_, **__: job["config"]
    found = Estimator(
        model=job["repo"],
        method=job["method"],
        quantization={"none": "none", "nf4": "4bit", "int8": "8bit"}[job["quant"]],
        batch_size=job["batch_size"],
        seq_length=job["seq_len"],
        gradient_checkpointing=job["gradient_checkpointing"],
        optimizer=OPTIMIZERS[job["optimizer"]],
        lora_rank=job["lora_rank"],
        lora_alpha=job["lora_alpha"],
        lora_target={"all-linear": "all_linear", "attention": "attention_all"}[job["lora_targets"]],
        flash_attention=job["attention"] != "eager",
    ).estimate_memory()
    # "GB" of its result are 2**30 bytes (core/memory.py)
    total, beside = int(found.total_gb * 2**30), int(found.overhead_gb * 2**30)
    return {"bytes": total, "tensor_bytes": total - beside}


for job in map(json.loads, sys.stdin):
    row = {"key": job["key"], "version": version("ftuneai")}
    try:
        print(json.dumps(row | predict(job)), flush=True)
    except Exception as error:
        print(json.dumps(row | {"refused": str(error)[:200]}), flush=True)
