"""Whole runs of the command, as users make them, on models written here: for the programs that compare what
two runs leave.

Every run is a process group of its own with deterministic kernels, and its losses and adapter are read from
the files it leaves.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TEXT = ROOT / "executor" / "data" / "quickstart.jsonl"
"""Conversations that come with the package."""
LONGEST_SECONDS = 400


def environment(folder: Path) -> dict[str, str]:
    """Of a run whose measurements are not kept for later plans."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    fixed = {
        "PYTHONPATH": path,
        "FITWRIGHT_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "OMP_NUM_THREADS": "1",  # the order of a sum's terms depends on their number
    }
    return {**os.environ, **fixed}


def write_model(folder: Path, facts: dict[str, Any], device: str) -> Path:
    """Random weights in the shapes of the config `facts`, with a byte-level tokenizer, in `folder`."""
    import torch
    from transformers import AutoModelForCausalLM

    from executor.load import make_config
    from executor.tiny import byte_tokenizer

    tokenizer = byte_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(make_config({**facts, **ends}), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_plan(model: Path, file: Path, options: Sequence[object]) -> Path:
    """`planner plan`. Errors: `CalledProcessError` where nothing fits."""
    command = ["plan", model, "--task", "train", "--offline", "--no-ledger", *options, "-o", file]
    subprocess.run(
        [sys.executable, "-m", "planner", *map(str, command)],
        env=environment(file.parent),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return file


def start(plan: Path, output: Path, options: Sequence[object]) -> subprocess.Popen[str]:
    """`executor run` over the text."""
    command = ["run", plan, "--dataset", TEXT, "--output", output, "--deterministic", *options, "--json"]
    with open(output.with_suffix(".err"), "a") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "executor", *map(str, command)],
            stdout=subprocess.DEVNULL,
            stderr=errors,
            text=True,
            env=environment(plan.parent),
            start_new_session=True,
        )


def finish(process: subprocess.Popen[str], output: Path) -> dict[str, Any]:
    """What a run that is left alone leaves: losses, the adapter's digest, and the layers streamed."""
    code = process.wait(timeout=LONGEST_SECONDS)
    adapter, report = output / "adapter" / "adapter_model.safetensors", output / "report.json"
    found = json.loads(report.read_text()) if code == 0 else {}
    names = ("losses", "resumed_from_step", "engine", "layers_resident", "layers_streamed", "slots")
    return {
        "exit_code": code,
        "error": output.with_suffix(".err").read_text()[-500:] if code else None,
        "adapter": hashlib.sha256(adapter.read_bytes()).hexdigest() if adapter.exists() else None,
        **{name: found.get(name) for name in names},
    }
