"""Predictions held against measured cells: errors by tier, verdicts, intervals, speeds, and the targets.

Truth of the process is a bracket: with `failed` bytes on the card a cell is known to fail, with `worked` it
is known to run (`caps.py`). The error inside the bracket is 0, outside it the distance to its nearer end.
Budgets inside the bracket are left out, because nobody knows there what is true; so are cells whose layers
were placed for one size of card, because for another they would be placed otherwise.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from msgspec import Struct

from benchmarks.accuracy.cells import Cell, model_of
from planner.units import GIB
from profiles.catalogue import model_ids

BUDGETS = tuple(n * GIB for n in range(4, 142))
"""Every size of card, GiB by GiB."""
NEAR = 1.25
"""Up to this multiple of the need a card is one that somebody would buy for the job."""
REFUSED = 1.0
"""The error of a cell the estimator has no answer for."""
SPEEDS = ("decode_tokens_per_s", "prefill_tokens_per_s", "train_tokens_per_s")


class Outcome(Struct, frozen=True):
    """A measured cell and what was predicted for it. `measured` is a line of results.jsonl."""

    cell: Cell
    predicted: Mapping[str, Any]
    measured: Mapping[str, Any]
    allocator: str = "stock"

    @property
    def refused(self) -> bool:
        """The estimator had no answer."""
        return "refused" in self.predicted or bool(self.predicted.get("unknown"))

    @property
    def architecture(self) -> str:
        """The model type."""
        return str(model_of(self.cell.model).config["model_type"])

    @property
    def need(self) -> tuple[int, int] | None:
        """(failed, worked): bytes on the card with which the cell is known to fail and to run."""
        found, cap = self.measured["figures"], self.measured.get("caps", {}).get(self.allocator, {})
        if "worked_bytes" not in cap or found.get("context_bytes") is None:
            return None
        loading = found["moments"]["load"]
        failed, worked = (
            max(loading, cap[name]) + found["context_bytes"] for name in ("failed_bytes", "worked_bytes")
        )
        return failed, worked

    def error(self, name: str) -> float | None:
        """Predicted / measured - 1 of a figure of the run; None where it was not measured."""
        return self._error(name, name)

    @property
    def ram_error(self) -> float | None:
        """Of the host's peak."""
        return self._error("ram_bytes", "host_peak_bytes")

    def _error(self, name: str, measured_name: str) -> float | None:
        measured = self.measured["figures"].get(measured_name)
        if not measured:
            return None
        return REFUSED if self.refused else float(self.predicted[name] / measured - 1)

    @property
    def process_error(self) -> float | None:
        """0 inside the measured bracket, else the signed distance to its nearer end."""
        if self.need is None:
            return None
        if self.refused:
            return REFUSED
        (failed, worked), n = self.need, self.predicted["process_bytes"]
        return n / failed - 1 if n < failed else n / worked - 1 if n > worked else 0.0

    def speed_error(self, name: str) -> float | None:
        """Of the typical speed."""
        measured = self.measured["figures"].get(name)
        predicted = (self.predicted.get("speed") or {}).get(name)
        if not measured or not self.cell.timed:
            return None
        return REFUSED if self.refused or predicted is None else predicted["typical"] / measured - 1

    def verdict(self, budget_bytes: int) -> str:
        """The contract's verdict for a card with that much."""
        if self.refused:
            return "unknown"
        if self.predicted["high_bytes"] <= budget_bytes:
            return "fits"
        return "tight" if self.predicted["low_bytes"] <= budget_bytes else "does_not_fit"


TIERS: dict[str, Callable[[Outcome], float | None]] = {
    "load": lambda o: o.error("load_bytes"),
    "allocated": lambda o: o.error("allocated_peak_bytes"),
    "context": lambda o: o.error("context_bytes"),
    "process": lambda o: o.process_error,
    "host RAM": lambda o: o.ram_error,
}


def spread(errors: Iterable[float | None]) -> dict[str, float] | None:
    """Median, 95th percentile (nearest rank) and worst of the absolute errors, lowest and highest signed;
    None where there is nothing."""
    known = [error for error in errors if error is not None]
    if not known:
        return None
    sizes = sorted(abs(error) for error in known)
    return {
        "cells": len(sizes),
        "p50": median(sizes),
        "p95": sizes[math.ceil(0.95 * len(sizes)) - 1],
        "worst": sizes[-1],
        "lowest": min(known),
        "highest": max(known),
    }


def confusion(outcomes: Sequence[Outcome]) -> dict[str, dict[str, int]]:
    """Verdicts over all budgets by what is true: runs, fails; and both again for budgets near the need."""
    names = ("fails", "fails_near", "runs", "runs_near")
    table = {name: dict.fromkeys(("fits", "tight", "does_not_fit", "unknown"), 0) for name in names}
    for outcome in outcomes:
        if outcome.need is None or outcome.cell.vram_gib is not None:
            continue
        failed, worked = outcome.need
        for budget in BUDGETS:
            says = outcome.verdict(budget)
            if budget >= worked:
                table["runs"][says] += 1
                table["runs_near"][says] += budget <= NEAR * worked
            elif budget < failed:
                table["fails"][says] += 1
                table["fails_near"][says] += budget * NEAR >= failed
    return table


def interval(outcomes: Sequence[Outcome]) -> dict[str, float] | None:
    """How often the 90 % interval meets the measured bracket, and how wide it is."""
    known = [(o, o.need) for o in outcomes if o.need is not None]
    if not known:
        return None
    covered = [
        not o.refused and o.predicted["low_bytes"] <= need[1] and o.predicted["high_bytes"] >= need[0]
        for o, need in known
    ]
    widths = sorted(
        (o.predicted["high_bytes"] - o.predicted["low_bytes"]) / o.predicted["process_bytes"]
        for o, _ in known
        if not o.refused
    )
    return {
        "cells": len(known),
        "coverage": sum(covered) / len(known),
        "width_p50": median(widths) if widths else REFUSED,
        "width_worst": widths[-1] if widths else REFUSED,
    }


def score(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Everything the report shows of some cells."""
    groups: dict[str, list[Outcome]] = defaultdict(list)
    kinds: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in outcomes:
        groups[outcome.cell.group].append(outcome)
        kinds[outcome.architecture].append(outcome)
    return {
        "cells": len(outcomes),
        "refused": sum(outcome.refused for outcome in outcomes),
        "tiers": _tiers(outcomes),
        "groups": {name: _tiers(some) for name, some in sorted(groups.items())},
        "architectures": {name: _tiers(some) for name, some in sorted(kinds.items())},
        "speeds": {name: spread(o.speed_error(name) for o in outcomes) for name in SPEEDS},
        "verdicts": confusion(outcomes),
        "interval": interval(outcomes),
        "strangers": strangers(kinds),
    }


def _tiers(outcomes: Sequence[Outcome]) -> dict[str, dict[str, float] | None]:
    return {name: spread(error(o) for o in outcomes) for name, error in TIERS.items()}


def strangers(kinds: Mapping[str, Sequence[Outcome]]) -> list[str]:
    """Architectures that no model of the catalogue has and whose errors stay within the targets."""
    known = {str(model_of(name).config["model_type"]) for name in model_ids()}
    good = []
    for kind, some in kinds.items():
        tiers = _tiers(some)
        allocated, process = tiers["allocated"], tiers["process"]
        within = allocated is not None and allocated["worst"] <= ALLOCATED_WORST
        if kind not in known and within and (process is None or process["worst"] <= PROCESS_P95):
            good.append(kind)
    return sorted(good)


# --------------------------------------------------------------------------- targets

ALLOCATED_WORST = 0.05
PROCESS_P95 = 0.05


class Target(Struct, frozen=True):
    """A figure of the score and what it has to keep."""

    name: str
    value: float | None
    bound: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Does the figure keep it? One that nothing was measured for does not."""
        if self.value is None:
            return False
        return self.value >= self.bound if self.at_least else self.value <= self.bound


def targets(result: Mapping[str, Any]) -> list[Target]:
    """What must hold of a score, figure by figure."""
    tiers, verdicts, speeds = result["tiers"], result["verdicts"], result["speeds"]
    near, every = verdicts["runs_near"], [n for row in ("fails", "runs") for n in verdicts[row].items()]
    total = sum(n for _, n in every)
    tight = sum(n for says, n in every if says == "tight")
    found = [
        Target("allocated peak, median", _of(tiers["allocated"], "p50"), 0.005),
        Target("allocated peak, P95", _of(tiers["allocated"], "p95"), 0.02),
        Target("allocated peak, worst", _of(tiers["allocated"], "worst"), ALLOCATED_WORST),
        Target("process, median", _of(tiers["process"], "p50"), 0.015),
        Target("process, P95", _of(tiers["process"], "p95"), PROCESS_P95),
        Target("process, worst under", _under(tiers["process"]), 0.04),
        Target("verdicts: false fits", verdicts["fails"]["fits"] if total else None, 0),
        Target("verdicts: false does_not_fit near the need", _share(near["does_not_fit"], near), 0.05),
        Target("verdicts: share of tight", tight / total if total else None, 0.08),
        Target("90 % interval: coverage", _of(result["interval"], "coverage"), 0.90, at_least=True),
        Target("90 % interval: median width", _of(result["interval"], "width_p50"), 0.06),
        Target("host RAM peak, median", _of(tiers["host RAM"], "p50"), 0.05),
    ]
    for name in ("decode_tokens_per_s", "train_tokens_per_s"):
        found.append(Target(f"{name}, median", _of(speeds[name], "p50"), 0.10))
        found.append(Target(f"{name}, P95", _of(speeds[name], "p95"), 0.25))
    return found


def _of(row: Mapping[str, float] | None, name: str) -> float | None:
    return None if row is None else row[name]


def _under(row: Mapping[str, float] | None) -> float | None:
    return None if row is None else max(0.0, -row["lowest"])


def _share(n: int, row: Mapping[str, int]) -> float | None:
    total = sum(row.values())
    return n / total if total else None
