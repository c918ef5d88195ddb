"""What `accelerate estimate-memory` calls once it has asked the Hub, which fails offline."""

import json
import sys
import warnings

warnings.filterwarnings("ignore")
import torch  # noqa: E402
from accelerate import __version__, init_empty_weights  # noqa: E402
from accelerate.commands.estimate import estimate_training_usage  # noqa: E402
from accelerate.utils import calculate_maximum_sizes  # noqa: E402
from transformers import AutoConfig, AutoModel  # noqa: E402


def predict(job):
    """Errors: `ValueError` for what it cannot express."""
    train = job["task"] == "train"
    if train and job["method"] != "full":
        raise ValueError("no adapters")
    fields = {k: v for k, v in job["config"].items() if k not in ("model_type", "architectures")}
    config = AutoConfig.for_model(job["config"]["model_type"], **fields)
    with init_empty_weights():
        model = AutoModel.from_config(config, dtype=torch.float32)
    size, _ = calculate_maximum_sizes(model)
    if train:
        mixed = {"bf16": "bfloat16", "fp16": "float16"}.get(job["dtype"], "float32")
        stages = estimate_training_usage(size, mixed)
        return {"bytes": int(max(stages.values()))}
    parts = {"nf4": 8, "int8": 4, "none": 1 if job["dtype"] == "fp32" else 2}
    return {"bytes": int(size / parts[job["quant"]])}


for job in map(json.loads, sys.stdin):
    row = {"key": job["key"], "version": __version__}
    try:
        print(json.dumps(row | predict(job)), flush=True)
    except Exception as error:
        print(json.dumps(row | {"refused": str(error)[:200]}), flush=True)
