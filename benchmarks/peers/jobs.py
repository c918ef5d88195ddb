"""What the rivals are asked about: the 52 calibration runs, rehearsals whose decode speed was measured, or
the measured cells of the accuracy grid."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import Struct

from benchmarks.accuracy.cells import CONFIGS, RESULTS, model_of, read_cells, read_lines
from planner.estimate import architecture_of, count, estimate
from planner.machine import machine_from_gpus
from planner.plan import read_plan
from planner.types import Strategy, Workload
from profiles.catalogue import load_model, profile_from_config
from profiles.config import load_config_file
from profiles.errors import UnknownModel
from profiles.hardware import load_gpu
from profiles.schema import ModelProfile

CALIBRATION = Path(__file__).resolve().parents[1] / "calibration"
Cells = Literal["calibration", "speed", "grid"]


class Truth(Struct, frozen=True):
    """What was measured of a job."""

    allocated_peak_bytes: int
    failed_bytes: int | None
    """With so much on the card it is known to fail, with `worked_bytes` to run."""
    worked_bytes: int | None
    decode_tokens_per_s: float | None = None


class Job(Struct, frozen=True):
    """One job, its truth, and what its model is called."""

    key: str
    model: ModelProfile
    config: dict[str, Any]
    work: Workload
    how: Strategy
    truth: Truth

    @property
    def repo(self) -> str:
        """The name on the Hub: some tools have tables by it."""
        repos = self.model.repo_ids
        return repos[0] if repos else f"local/{self.model.id}"

    def asked(self) -> dict[str, Any]:
        """The job as the adapters read it."""
        parameters = self.model.parameters or count(architecture_of(self.model))
        about = {"key": self.key, "repo": self.repo, "parameters": parameters, "config": self.config}
        return {**about, **msgspec.to_builtins(self.work), **msgspec.to_builtins(self.how)}

    def ours(self) -> dict[str, Any]:
        """Our own answer."""
        machine = machine_from_gpus([(load_gpu("h200"), 1)])
        found = estimate(self.model, machine, self.work, self.how)
        gpu, decode = found.gpus[0], found.speed.decode_tokens_per_s
        return {
            "bytes": gpu.process_bytes,
            "tensor_bytes": gpu.allocated_peak_bytes,
            "low_bytes": gpu.low_bytes,
            "high_bytes": gpu.high_bytes,
            "tokens_per_s": decode.typical if decode else None,
        }


def jobs(which: Cells) -> Iterator[Job]:
    """Every measured job on one whole card."""
    return {"calibration": _calibration, "speed": _speed, "grid": _grid}[which]()


def _calibration() -> Iterator[Job]:
    rows = (CALIBRATION / "runs.jsonl").read_bytes().splitlines()[1:]
    for i, row in enumerate(map(json.loads, rows)):
        measured = row["measured"]
        needs = [
            int(max(measured["load_peak_bytes"], measured[name] * measured["allocated_peak_bytes"]))
            + measured["context_bytes"]
            for name in ("cap_failed_factor", "cap_worked_factor")
        ]
        path = CALIBRATION / "configs" / f"{row['model']}.json"
        yield Job(
            f"calibration-{i}",
            _named(row["model"], path),
            load_config_file(path),
            msgspec.convert(row["workload"], Workload),
            msgspec.convert(row["strategy"], Strategy),
            Truth(measured["allocated_peak_bytes"], *needs),
        )


def _named(name: str, config: Path) -> ModelProfile:
    try:
        return load_model(name)
    except UnknownModel:
        return profile_from_config(load_config_file(config), name)


def _speed() -> Iterator[Job]:
    """Rehearsals that generated one sequence, alone on the card."""
    for path in sorted(CALIBRATION.parent.glob("*/results.jsonl")):
        for row in read_lines(path):
            speed = row.get("measured", {}).get("decode_tokens_per_s")
            plan = read_plan(path.parent / row["plan"]) if speed else None
            how = plan.candidates[0].strategy if plan else Strategy()
            if plan is None or plan.workload.sequences > 1 or how.placement != "full_gpu":
                continue
            model, name = load_model(plan.model.id), row["plan"].removesuffix(".plan.json")
            truth = Truth(row["measured"]["allocated_peak_bytes"], None, None, speed)
            yield Job(f"{path.parent.name}/{name}", model, model.config, plan.workload, how, truth)


def _grid() -> Iterator[Job]:
    measured = {row["id"]: row for row in read_lines(RESULTS) if "figures" in row}
    for cell in read_cells():
        row = measured.get(cell.id)
        if row is None or cell.vram_gib is not None:
            continue
        figures, cap = row["figures"], row.get("caps", {}).get("stock", {})
        needs: list[int | None] = [None, None]
        if "worked_bytes" in cap and figures.get("context_bytes") is not None:
            needs = [
                max(figures["moments"]["load"], cap[name]) + figures["context_bytes"]
                for name in ("failed_bytes", "worked_bytes")
            ]
        model = model_of(cell.model)
        path = CONFIGS / f"{cell.model}.json"
        config = load_config_file(path) if path.exists() else model.config
        speed = figures.get("decode_tokens_per_s") if cell.timed else None
        truth = Truth(figures["allocated_peak_bytes"], needs[0], needs[1], speed)
        yield Job(cell.id, model, config, cell.workload, cell.strategy, truth)
