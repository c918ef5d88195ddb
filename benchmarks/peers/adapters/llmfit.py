"""llmfit's decode speed on one H200. It means llama.cpp's engine and formats, we mean transformers."""

import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

QUANTS = {"none": "F16", "int8": "Q8_0", "nf4": "Q4_K_M"}
H200 = {
    "schema_version": 1,
    "name": "nvidia-h200",
    "match": {"gpu_name_contains": "H200"},
    "hardware": {
        "total_ram_gb": 128.0,
        "unified_memory": False,
        "gpu_vram_gb": 141.0,
        "gpu_memory_bandwidth_gbps": 4800.0,
        "gpu_compute_tflops_fp16": 989.0,
        "ddr_bandwidth_gbps": 307.0,
    },
}
"""141 GB at 4.8 TB/s, 989 TFLOP/s in 16 bits, dense (the vendor's data sheet)."""
PROFILE = Path(tempfile.mkdtemp()) / "nvidia-h200.json"


def predict(job):
    """Errors: `ValueError` for what it cannot express."""
    if job["task"] != "infer" or job["batch_size"] != 1:
        raise ValueError("one generated sequence only")
    length = str(job["prompt_tokens"] + job["new_tokens"])
    tool = str(Path(sys.executable).with_name("llmfit"))
    command = [tool, "--json", "--profile", str(PROFILE), "plan", job["repo"], "--context", length]
    done = subprocess.run([*command, "--quant", QUANTS[job["quant"]]], capture_output=True, text=True)
    if done.returncode:
        raise ValueError((done.stderr.strip().splitlines() or ["not in its database"])[-1])
    paths = {row["path"]: row for row in json.loads(done.stdout)["run_paths"]}
    return {"tokens_per_s": paths["gpu"]["estimated_tps"]}


PROFILE.write_text(json.dumps(H200))
for job in map(json.loads, sys.stdin):
    row = {"key": job["key"], "version": version("llmfit")}
    try:
        print(json.dumps(row | predict(job)), flush=True)
    except Exception as error:
        print(json.dumps(row | {"refused": str(error)[:200]}), flush=True)
