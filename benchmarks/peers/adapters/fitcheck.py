"""fitcheck-llm through its own command: config.json from a cache laid out for it, no network."""

import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

OPTIMIZERS = {"sgd": ["sgd"], "adamw_torch": ["adamw"], "adamw_torch_fused": ["adamw"]} | {
    name: ["adam8bit"] for name in ("adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
}


def arguments(job):
    """The flags nearest to a job. Errors: `ValueError` for what it cannot express."""
    quant = ["--quant", job["quant"]] + (["--double-quant"] if job["quant"] == "nf4" else [])
    common = [job["repo"], *quant, "--precision", job["dtype"], "--gpu", "H200", "--json"]
    if job["task"] == "infer":
        length = job["prompt_tokens"] + job["new_tokens"]
        return ["infer", *common, "--seq-len", str(length), "--concurrent", str(job["batch_size"])]
    if job["optimizer"] not in OPTIMIZERS:
        raise ValueError(f"no optimizer {job['optimizer']}")
    full = job["method"] == "full"
    states = ["--optimizer-dtype", job["dtype"] if full and job["dtype"] == "bf16" else "fp32"]
    adam = OPTIMIZERS[job["optimizer"]] == ["adamw"]
    targets = {"all-linear": "full", "attention": "q,k,v,o"}[job["lora_targets"]]
    return [
        *common,
        *(["--no-lora"] if full else ["--lora-r", str(job["lora_rank"]), "--lora-targets", targets]),
        *["--batch-size", str(job["batch_size"]), "--seq-len", str(job["seq_len"])],
        *["--optimizer", *OPTIMIZERS[job["optimizer"]], *(states if adam else [])],
        *(["--grad-checkpoint"] if job["gradient_checkpointing"] else []),
        *(["--flash-attn"] if job["attention"] != "eager" else []),
    ]


def predict(job, home):
    snapshot = home / "hub" / f"models--{job['repo'].replace('/', '--')}"
    (snapshot / "refs").mkdir(parents=True, exist_ok=True)
    (snapshot / "snapshots" / "0").mkdir(parents=True, exist_ok=True)
    (snapshot / "refs" / "main").write_text("0")
    (snapshot / "snapshots" / "0" / "config.json").write_text(json.dumps(job["config"]))
    command = [str(Path(sys.executable).with_name("fitcheck")), *arguments(job)]
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode == 2 or not done.stdout.strip():
        raise ValueError((done.stderr.strip().splitlines() or ["nothing said"])[-1])
    found = json.loads(done.stdout)["memory_mib"]
    total, beside = int(found["total"] * 2**20), int(found["overhead"] * 2**20)
    return {"bytes": total, "tensor_bytes": total - beside}


with tempfile.TemporaryDirectory() as folder:
    for job in map(json.loads, sys.stdin):
        row = {"key": job["key"], "version": version("fitcheck-llm")}
        try:
            print(json.dumps(row | predict(job, Path(folder))), flush=True)
        except Exception as error:
            print(json.dumps(row | {"refused": str(error)[:200]}), flush=True)
