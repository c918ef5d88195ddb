"""Predict measured runs and say how far off the predictions are.

    python benchmarks/calibration/report.py [--runs FILE.jsonl] [--configs FOLDER] [--json]

What the files hold and how the runs were measured: README.md beside this file. Exit code 1 if any run was
called "fits" on a budget with which it is known to fail.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from planner.estimate import estimate
from planner.machine import machine_from_gpus
from planner.types import GpuEstimate, Strategy, Workload
from planner.units import GIB
from profiles.catalogue import profile_from_config
from profiles.config import load_config_file
from profiles.hardware import load_gpu
from profiles.schema import ModelProfile

HERE = Path(__file__).resolve().parent
BUDGETS_GIB = (4, 6, 8, 10, 11, 12, 16, 20, 24, 32, 40, 48, 80, 96, 141)
NEAR = 1.25
"""Up to this multiple of the need a card is one that somebody would buy for the job."""


class Measured(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Figures of one run, in bytes."""

    load_bytes: int
    load_peak_bytes: int
    allocated_peak_bytes: int
    reserved_peak_bytes: int
    process_peak_bytes: int
    context_bytes: int
    cap_failed_factor: float
    cap_worked_factor: float
    steady_bytes: int | None = None
    trainable_parameters: int | None = None

    @property
    def need(self) -> tuple[float, float]:
        """(failed, worked): bytes on the card with which the run is known to fail and to work."""
        failed, worked = (
            max(self.load_peak_bytes, factor * self.allocated_peak_bytes) + self.context_bytes
            for factor in (self.cap_failed_factor, self.cap_worked_factor)
        )
        return failed, worked


class Run(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One measured run: the job and its figures."""

    model: str
    workload: Workload
    strategy: Strategy
    measured: Measured

    @property
    def group(self) -> str:
        """Task, or method and checkpointing: what is averaged together."""
        if self.workload.task == "infer":
            return f"infer {self.strategy.quant}"
        return f"{self.workload.method}{'' if self.strategy.gradient_checkpointing else ', no checkpointing'}"


class Outcome(msgspec.Struct, frozen=True):
    """A run and what was predicted for it."""

    run: Run
    predicted: GpuEstimate

    @property
    def load_error(self) -> float:
        """Predicted / measured - 1 of the loaded weights."""
        return self.predicted.load_bytes / self.run.measured.load_bytes - 1

    @property
    def allocated_error(self) -> float:
        """Predicted / measured - 1 of the allocated peak."""
        return self.predicted.allocated_peak_bytes / self.run.measured.allocated_peak_bytes - 1

    @property
    def process_error(self) -> float:
        """0 inside the measured bracket, else the signed distance to its nearer end."""
        failed, worked = self.run.measured.need
        n = self.predicted.process_bytes
        return n / failed - 1 if n < failed else n / worked - 1 if n > worked else 0.0

    @property
    def covered(self) -> bool:
        """Does the predicted interval meet the measured bracket?"""
        failed, worked = self.run.measured.need
        return self.predicted.low_bytes <= worked and self.predicted.high_bytes >= failed

    @property
    def width(self) -> float:
        """Width of the predicted interval over the predicted process bytes."""
        return (self.predicted.high_bytes - self.predicted.low_bytes) / self.predicted.process_bytes

    def verdict(self, budget_bytes: int) -> str:
        """The contract's verdict for a card with that much."""
        if self.predicted.high_bytes <= budget_bytes:
            return "fits"
        return "tight" if self.predicted.low_bytes <= budget_bytes else "does_not_fit"


def read_runs(path: Path = HERE / "runs.jsonl") -> tuple[dict[str, Any], list[Run]]:
    """The environment and the runs of a file."""
    first, *rest = path.read_bytes().splitlines()
    return json.loads(first)["environment"], [msgspec.json.decode(row, type=Run) for row in rest]


@lru_cache(maxsize=64)
def read_model(path: Path) -> ModelProfile:
    """Facts of a model from its config.json, as the command line reads it."""
    return profile_from_config(load_config_file(path), path.stem)


def predict(runs: Sequence[Run], gpu: str, configs: Path = HERE / "configs") -> list[Outcome]:
    """Every run with its prediction on one card of the catalogue."""
    machine = machine_from_gpus([(load_gpu(gpu), 1)])
    out = []
    for run in runs:
        found = estimate(read_model(configs / f"{run.model}.json"), machine, run.workload, run.strategy)
        out.append(Outcome(run, found.gpus[0]))
    return out


def spread(errors: Sequence[float]) -> dict[str, float]:
    """Median, 95th percentile (nearest rank) and worst of the absolute errors; lowest and highest signed."""
    sizes = sorted(abs(error) for error in errors)
    rank = math.ceil(0.95 * len(sizes)) - 1
    return {
        "runs": len(sizes),
        "p50": median(sizes),
        "p95": sizes[rank],
        "worst": sizes[-1],
        "lowest": min(errors),
        "highest": max(errors),
    }


def confusion(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    """Verdicts over all budgets by what is true: runs, fails, or runs with at most `NEAR` times its need."""
    table: dict[str, dict[str, int]] = {
        truth: dict.fromkeys(("fits", "tight", "does_not_fit"), 0) for truth in ("fails", "runs", "runs_near")
    }
    for outcome in outcomes:
        failed, worked = outcome.run.measured.need
        for budget in (n * GIB for n in BUDGETS_GIB):
            if failed <= budget < worked:
                continue
            says = outcome.verdict(budget)
            table["fails" if budget < failed else "runs"][says] += 1
            if worked <= budget <= NEAR * worked:
                table["runs_near"][says] += 1
    return table


TIERS: dict[str, Callable[[Outcome], float]] = {
    "load": lambda outcome: outcome.load_error,
    "allocated": lambda outcome: outcome.allocated_error,
    "process": lambda outcome: outcome.process_error,
}


def score(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Everything the report prints."""
    groups: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.run.group].append(outcome)
    widths = sorted(outcome.width for outcome in outcomes)
    return {
        "tiers": {name: spread([error(o) for o in outcomes]) for name, error in TIERS.items()},
        "groups": {
            group: {name: spread([error(o) for o in some]) for name, error in TIERS.items()}
            for group, some in sorted(groups.items())
        },
        "verdicts": confusion(outcomes),
        "interval": {
            "coverage": sum(outcome.covered for outcome in outcomes) / len(outcomes),
            "width_p50": median(widths),
            "width_worst": widths[-1],
        },
    }


def print_score(out: Console, result: dict[str, Any], environment: dict[str, Any]) -> None:
    """Tables for a person."""
    facts = ", ".join(f"{key} {value}" for key, value in environment.items() if key != "gpu")
    out.print(f"Predicted against measured: {facts}", style="dim")
    errors = Table("runs of", "runs", "tier", "P50", "P95", "worst", "from", "to", title="Signed errors")
    for column in errors.columns[1:2] + errors.columns[3:]:
        column.justify = "right"
    for group, tiers in {"all": result["tiers"], **result["groups"]}.items():
        for i, (tier, row) in enumerate(tiers.items()):
            signed = (f"{row[key]:+.2%}" for key in ("lowest", "highest"))
            sizes = (f"{row[key]:.2%}" for key in ("p50", "p95", "worst"))
            head = (group, str(row["runs"])) if i == 0 else ("", "")
            errors.add_row(*head, tier, *sizes, *signed, end_section=i == len(tiers) - 1)
    out.print(errors)
    verdicts = Table("in truth", "fits", "tight", "does not fit", title="Verdicts, budgets of 4 to 141 GiB")
    for truth, says in result["verdicts"].items():
        label = {"runs_near": f"runs, with at most {NEAR} x the need"}.get(truth, truth)
        verdicts.add_row(label, *(str(says[key]) for key in ("fits", "tight", "does_not_fit")))
    out.print(verdicts)
    interval = result["interval"]
    out.print(
        f"90 % interval: meets the measured bracket in {interval['coverage']:.1%} of the runs; "
        f"width {interval['width_p50']:.1%} of the process (median), at most {interval['width_worst']:.1%}"
    )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=HERE / "runs.jsonl")
    parser.add_argument("--configs", type=Path, default=HERE / "configs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    environment, runs = read_runs(args.runs)
    result = score(predict(runs, environment["gpu"], args.configs))
    if args.json:
        print(json.dumps({"environment": environment, **result}, indent=1))
    else:
        print_score(Console(highlight=False), result, environment)
    return int(result["verdicts"]["fails"]["fits"] > 0)


if __name__ == "__main__":
    sys.exit(main())
