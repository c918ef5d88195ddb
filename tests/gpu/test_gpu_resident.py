"""The resident engine on a real card: NF4 inference and QLoRA on a tiny model, measured and capped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.gpu, pytest.mark.executor]
CARD = "h200"


def command(module: str, *args: Any) -> subprocess.CompletedProcess[str]:
    """`planner` or `executor` in a process of its own."""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=250,
        env=env,
        check=False,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small qwen2 with a dataset."""
    from executor.tiny import write_tiny_model

    folder = tmp_path_factory.mktemp("gpu") / "tiny"
    write_tiny_model(folder, layers=4)
    rows = [
        {"prompt": f"What is {a} plus {b}? ", "completion": f"{a + b}"} for a in range(8) for b in range(8)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def plan(folder: Path, tiny: Path, *options: Any) -> Path:
    """A plan for the whole card."""
    path = folder / "plan.json"
    done = command("planner", "plan", tiny, "--gpu", CARD, *options, "-o", path)
    assert done.returncode == 0, done.stderr
    return path


def report_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """The report on stdout."""
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_nf4_inference_measures_card(tmp_path: Path, tiny: Path) -> None:
    path = plan(tmp_path, tiny, "--quant", "nf4", "--prompt-tokens", 64, "--new-tokens", 32)
    report = report_of(
        command(
            "executor", "run", path, "--prompt", "hello", "--greedy", "--output", tmp_path / "o", "--json"
        )
    )
    assert report["load_bytes"] > 0
    assert {"load", "prefill", "decode"} <= report["moments"].keys()
    assert report["allocated_peak_bytes"] == max(v for k, v in report["moments"].items() if k != "load")
    assert report["context_bytes"] > 50 * 2**20
    assert report["process_peak_bytes"] >= report["reserved_peak_bytes"] + report["context_bytes"]
    row = json.loads((tmp_path / "o" / "outputs.jsonl").read_text())
    assert row["tokens"] <= 32 and row["finish_reason"] in {"stop", "length"}


@pytest.mark.parametrize("loss", [("--loss", "full"), ("--loss", "fused")])
def test_qlora_learns_within_cap(tmp_path: Path, tiny: Path, loss: tuple[str, str]) -> None:
    path = plan(tmp_path, tiny, "--task", "train", "--seq-len", 64, "--batch-size", 4, *loss)
    cap = 2 * 2**30
    report = report_of(
        command(
            "executor", "run", path, "--dataset", tiny / "data.jsonl", "--output", tmp_path / "o",
            "--max-steps", 20, "--vram-cap", "2GiB", "--json",
        )
    )  # fmt: skip
    assert report["steps"] == 20 and report["losses"][-1] < report["losses"][0]
    assert {"forward", "loss", "backward", "optimizer_step"} <= report["moments"].keys()
    assert report["reserved_peak_bytes"] + report["context_bytes"] + report["managed_bytes"] <= cap
    assert any(note.startswith("kept within --vram-cap") for note in report["notes"])
    assert (tmp_path / "o" / "adapter" / "adapter_model.safetensors").exists()


def test_same_seed_same_adapter_with_deterministic_kernels(tmp_path: Path, tiny: Path) -> None:
    path = plan(tmp_path, tiny, "--task", "train", "--seq-len", 64, "--batch-size", 4, "--loss", "full")
    adapters = []
    for name in ("a", "b"):
        report_of(
            command(
                "executor", "run", path, "--dataset", tiny / "data.jsonl", "--output", tmp_path / name,
                "--max-steps", 6, "--deterministic", "--json",
            )
        )  # fmt: skip
        adapters.append((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] == adapters[1]


def test_out_of_memory_on_every_candidate_exits_3(tmp_path: Path, tiny: Path) -> None:
    path = plan(
        tmp_path, tiny, "--quant", "none", "--prompt-tokens", 64, "--new-tokens", 8, "--batch-size", 4096
    )
    done = command(
        "executor", "rehearse", path, "--candidate", 1, "--vram-cap", "1GiB", "--output", tmp_path / "o"
    )
    assert done.returncode == 3, done.stderr
    assert "out of memory" in done.stderr and "Traceback" not in done.stderr
