"""DeepSpeed's ZeRO-2 estimator of model states, one card, given the true parameter count."""

import json
import sys
from importlib.metadata import version

real, sys.stdout = sys.stdout, sys.stderr  # it announces itself

from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs  # noqa: E402


def predict(job):
    """Errors: `ValueError` for what it cannot express."""
    if job["task"] != "train" or job["method"] != "full":
        raise ValueError("full fine-tuning only")
    _, card = estimate_zero2_model_states_mem_needs(
        job["parameters"], num_gpus_per_node=1, num_nodes=1, cpu_offload=False
    )
    return {"bytes": int(card)}


for job in map(json.loads, sys.stdin):
    row = {"key": job["key"], "version": version("deepspeed")}
    try:
        print(json.dumps(row | predict(job)), file=real, flush=True)
    except Exception as error:
        print(json.dumps(row | {"refused": str(error)[:200]}), file=real, flush=True)
