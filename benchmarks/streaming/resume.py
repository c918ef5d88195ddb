"""Kill a streamed fine-tuning in the middle, let it go on, and compare its adapter with an unbroken run's.

    python benchmarks/streaming/resume.py [--model qwen2.5-0.5b] [--cpu]

A model of real shapes and random weights is written, planned and fine-tuned by `executor run`: NF4, every
third layer resident, checkpoints in RAM, 8-bit Adam, deterministic kernels. One run is left alone; another,
at the same time, is ended with SIGKILL (the whole process group) between two checkpoints and started again
with the same command. Prints a JSON line; exit code 1 unless the adapter has the same bytes, every step the
same loss, and the second run began where the first had its last checkpoint. `--cpu`: on the CPU with a tiny
model, to try the program.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import runs  # noqa: E402  found beside this file

STEPS, SAVED_EVERY = 24, 4
KILLED_AFTER = 8
"""The checkpoint that must be there; the steps after it are lost."""


def main() -> int:
    """Break one run off, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-0.5b")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        row = compare(Path(folder), args.model, args.cpu)
    print(json.dumps({**row, "seconds": round(time.monotonic() - began, 1)}), flush=True)
    return int(not row["passed"])


def compare(folder: Path, model: str, cpu: bool) -> dict[str, Any]:
    """The unbroken run and the broken one, beside each other."""
    plan = prepare(folder, model, cpu)
    resident = 2 if cpu else 8
    options = ["--max-steps", STEPS, "--save-steps", SAVED_EVERY]
    options += ["--engine", "stream", "--resident-layers", resident]
    broken, unbroken = folder / "broken", folder / "unbroken"
    beside = runs.start(plan, unbroken, options)
    try:
        killed = kill_in_the_middle(runs.start(plan, broken, options), broken)
        got = runs.finish(runs.start(plan, broken, options), broken)
        want = runs.finish(beside, unbroken)
    finally:
        beside.kill()
    streamed = (got["engine"], want["engine"]) == ("stream", "stream") and (got["layers_streamed"] or 0) > 2
    same = {name: got[name] == want[name] is not None for name in ("adapter", "losses")}
    begun_there = got["resumed_from_step"] == killed["last_checkpoint"]
    return {
        "model": "tiny" if cpu else model,
        **killed,
        "resumed_from_step": got["resumed_from_step"],
        "steps": STEPS,
        "layers_resident": got["layers_resident"],
        "layers_streamed": got["layers_streamed"],
        "exit_codes": [want["exit_code"], got["exit_code"]],
        "errors": [each["error"] for each in (want, got) if each["error"]],
        "same_adapter": same["adapter"],
        "same_losses": same["losses"],
        "adapter": [want["adapter"], got["adapter"]],
        "passed": all(same.values()) and streamed and begun_there and killed["in_the_middle"],
    }


def prepare(folder: Path, model: str, cpu: bool) -> Path:
    """The model's folder and the plan for it."""
    job = ["--method", "qlora", "--quant", "nf4", "--seq-len", 128, "--batch-size", 2, "--loss", "fused"]
    job += ["--optimizer", "paged_adamw_8bit", "--kernels", "torch"]
    if cpu:
        from executor.tiny import write_tiny_model

        write_tiny_model(folder / "model", layers=7)
        where = ["--placement", "cpu"]
    else:
        from profiles.catalogue import load_model

        runs.write_model(folder / "model", dict(load_model(model).config), "cuda")
        where = ["--placement", "full_gpu", "--activation-offload"]
    return runs.make_plan(folder / "model", folder / "plan.json", [*job, *where])


def kill_in_the_middle(process: subprocess.Popen[str], output: Path) -> dict[str, Any]:
    """End the run some steps after a checkpoint; where that was."""
    while process.poll() is None and last_checkpoint(output) < KILLED_AFTER:
        time.sleep(0.002)
    at = last_checkpoint(output)
    time.sleep(0.05)
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return {
        "exit_code_killed": process.returncode,
        "last_checkpoint": last_checkpoint(output),
        "in_the_middle": alive and at >= KILLED_AFTER and last_checkpoint(output) < STEPS,
    }


def last_checkpoint(output: Path) -> int:
    """Step of the newest complete checkpoint, 0 if there is none."""
    return max((int(path.name.split("-")[1]) for path in output.glob("checkpoint-*")), default=0)


if __name__ == "__main__":
    sys.exit(main())
