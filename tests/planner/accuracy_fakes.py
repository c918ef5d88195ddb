"""Cells, predictions and measured lines by hand, for the tests of benchmarks/accuracy."""

from __future__ import annotations

from typing import Any

from benchmarks.accuracy.cells import Cell, identified
from benchmarks.accuracy.score import Outcome
from planner.types import Strategy, Workload
from planner.units import GIB

CONTEXT = GIB // 2


def cell(seq_len: int = 1024, model: str = "qwen2.5-0.5b", **fields: Any) -> Cell:
    """A fine-tuning cell; equal arguments give equal ids."""
    work = Workload(task="train", method="lora", seq_len=seq_len)
    return identified(Cell(model=model, workload=work, strategy=Strategy(), **fields))


def prediction(item: Cell, allocated: int = 8 * GIB, width: float = 0.04) -> dict[str, Any]:
    """A prediction of `allocated` bytes that needs 2 % above them."""
    process = int(allocated * 1.02) + CONTEXT
    return {
        "id": item.id,
        "load_bytes": GIB,
        "allocated_peak_bytes": allocated,
        "required_bytes": process - CONTEXT,
        "context_bytes": CONTEXT,
        "process_bytes": process,
        "low_bytes": int(process * (1 - width / 2)),
        "high_bytes": int(process * (1 + width / 2)),
        "ram_bytes": 2 * GIB,
        "speed": {"train_tokens_per_s": {"low": 1, "typical": 1000.0, "high": 2000}},
        "unknown": False,
    }


def measured(item: Cell, allocated: int = 8 * GIB, **figures: Any) -> dict[str, Any]:
    """A measured line of a cell that needs between 1.5 and 2 % above its allocated peak."""
    found = {
        "load_bytes": GIB,
        "allocated_peak_bytes": allocated,
        "context_bytes": CONTEXT,
        "host_peak_bytes": 2 * GIB,
        "train_tokens_per_s": 1000.0,
        "moments": {"load": GIB},
        **figures,
    }
    caps = {"failed_bytes": int(allocated * 1.015), "worked_bytes": int(allocated * 1.02), "attempts": 3}
    return {"id": item.id, "status": "ok", "cell": item.name, "figures": found, "caps": {"stock": caps}}


def outcome(
    seq_len: int = 1024, off: float = 0.0, width: float = 0.04, allocated: int = 8 * GIB, **fields: Any
) -> Outcome:
    """A cell whose prediction is `off` by that share."""
    item = cell(seq_len, **fields)
    return Outcome(item, prediction(item, int(allocated * (1 + off)), width), measured(item, allocated))
