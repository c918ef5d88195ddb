"""The estimator held to what streamed generations took on a card, with the residency they had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from planner.estimate import _card, _memory
from planner.machine import machine_from_gpus
from planner.memory.streamed import parts_of, streamed_memory
from planner.placement import Tiers
from planner.plan import read_plan
from planner.types import GpuEstimate
from profiles.architecture import architecture
from profiles.hardware import load_gpu

FOLDER = Path(__file__).parents[2] / "benchmarks" / "streaming"
MIB = 2**20
ROWS = [
    row
    for row in map(json.loads, (FOLDER / "results.jsonl").read_text().splitlines())
    if row["report"].get("layers_streamed") and row["report"]["engine"] == "stream"
]


def today(row: dict[str, Any]) -> GpuEstimate:
    """What is said now of the job of a row, its layers where they were."""
    plan, report = read_plan(FOLDER / row["plan"]), row["report"]
    how, arch = plan.candidates[0].strategy, architecture(plan.model.config)
    kept = next((note for note in report["notes"] if note.startswith("kept in RAM: ")), "")
    tiers = Tiers(report["layers_resident"], 0, "embed_tokens" in kept, "lm_head" in kept)
    gpu = machine_from_gpus([(load_gpu("h200"), 1)]).gpus[0]
    memory = streamed_memory(_memory(arch, plan.workload, how, gpu), parts_of(arch, how), tiers)
    return _card(gpu, memory, arch, plan.workload, how)


@pytest.mark.parametrize(
    "row", ROWS, ids=[f"{row['plan'].split('.plan')[0]}-{i}" for i, row in enumerate(ROWS)]
)
def test_a_streamed_generation_takes_what_is_said(row: dict[str, Any]) -> None:
    card, report = today(row), row["report"]
    assert card.context_bytes == report["context_bytes"]
    assert abs(card.allocated_peak_bytes / report["allocated_peak_bytes"] - 1) <= 0.005
    assert abs(card.moments["load"] / report["moments"]["load"] - 1) <= 0.01


def test_most_need_what_was_reserved() -> None:
    """All but the one that had filled its cap: it reserved what it was allowed."""
    errors = sorted(abs(today(row).required_bytes / row["report"]["reserved_peak_bytes"] - 1) for row in ROWS)
    assert len(ROWS) >= 8
    assert errors[-2] <= 0.02
