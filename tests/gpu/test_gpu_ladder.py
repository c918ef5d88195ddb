"""Running out of memory for real: the next candidate is taken, or the run ends with exit code 3."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from planner.machine import machine_from_gpus
from planner.plan import digest_of, make_plan, write_plan
from planner.types import Plan, Workload
from planner.units import MIB
from profiles.catalogue import load_model
from profiles.hardware import load_gpu

pytestmark = [pytest.mark.gpu, pytest.mark.executor]
WORK = Workload(task="train", method="lora", seq_len=1024, batch_size=8)


@pytest.fixture(scope="module")
def plan() -> Plan:
    """The same LoRA twice: with whole logits, 13 GiB of them, and with the chunked loss."""
    machine = machine_from_gpus([(load_gpu("h200"), 1)])
    model = load_model("qwen2.5-0.5b")
    plans = [
        make_plan(model, machine, WORK, pinned={"loss": loss, "placement": "full_gpu", "kernels": "torch"})
        for loss in ("full", "fused")
    ]
    ways = tuple(
        msgspec.structs.replace(one.candidates[0], rank=rank) for rank, one in enumerate(plans, start=1)
    )
    both = msgspec.structs.replace(plans[0], candidates=ways)
    return msgspec.structs.replace(both, digest=digest_of(msgspec.to_builtins(both)))


def rehearse(plan: Plan, folder: Path, cap_bytes: int, *options: str) -> subprocess.CompletedProcess[str]:
    """The plan under a cap, in a process of its own."""
    write_plan(plan, folder / "plan.json")
    arguments = ["rehearse", folder / "plan.json", "--vram-cap", f"{cap_bytes // MIB}MiB", "--max-steps", 2]
    return subprocess.run(
        [sys.executable, "-m", "executor", *map(str, arguments), "--output", str(folder / "o"), *options],
        capture_output=True,
        text=True,
        timeout=250,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"},
        check=False,
    )


def test_what_cannot_fit_under_the_cap_ends_on_the_next_candidate(tmp_path: Path, plan: Plan) -> None:
    first, second = (candidate.estimate.gpus[0] for candidate in plan.candidates)
    cap = second.high_bytes + 512 * MIB
    assert cap < first.low_bytes
    # without preflight, so that it truly runs out on the card
    done = rehearse(plan, tmp_path, cap, "--no-preflight", "--json")
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["candidate"] == 2 and report["steps"] == 2
    assert report["skipped"][0].startswith("candidate 1: out of memory in loss: ")
    assert "logits and loss: predicted" in report["skipped"][0]
    assert "could not be given back" not in done.stderr
    # nothing of the first is left: the second has the peak it was predicted alone
    assert abs(report["error"]["allocated_peak_bytes"]) < 0.05, report["error"]
    assert report["reserved_peak_bytes"] + report["context_bytes"] + report["managed_bytes"] <= cap


def test_preflight_takes_the_next_candidate_without_loading_the_first(tmp_path: Path, plan: Plan) -> None:
    cap = plan.candidates[1].estimate.gpus[0].high_bytes + 512 * MIB
    done = rehearse(plan, tmp_path, cap, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["candidate"] == 2 and "--vram-cap is" in report["skipped"][0]


def test_when_none_fits_the_run_ends_with_the_table(tmp_path: Path, plan: Plan) -> None:
    second = plan.candidates[1].estimate.gpus[0]
    cap = second.load_bytes + second.context_bytes + 512 * MIB
    done = rehearse(plan, tmp_path, cap, "--no-preflight")
    assert done.returncode == 3, done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr
    rows = [line for line in done.stderr.splitlines() if line.lstrip().startswith(("1: bf16", "2: bf16"))]
    assert len(rows) == 2
    assert "error: out of memory on every candidate tried: candidate 1: " in done.stderr
    refused = rehearse(plan, tmp_path, cap)
    assert refused.returncode == 3 and "error: out of memory before loading: " in refused.stderr
