"""Read the measured figures of profiles/overheads.json off the measurements again, and show what that does.

    python -m benchmarks.accuracy.recalibrate [--write]

Uses the calibration runs and, of the grid, the half `fit` alone. Recomputed are the CUDA context by kind of
job with the spread around it (NVML's figure of the process minus what the allocator reserved), and the RAM of
a process with its libraries. Everything else of an estimate is counted or modelled: where it is off, find the
tensor that explains the difference; there is no constant here to bend. Without `--write` the file stays as it
is. Exit code 1 if figures differ from the file's and were not written.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median_high
from typing import Any

import msgspec

from benchmarks.accuracy.cells import RESULTS, Cell, predict, read_cells, read_lines
from planner.errors import FitwrightError
from planner.files import write_atomically
from planner.memory.overheads import context_additions
from planner.types import Strategy, Workload
from profiles.config import load_config_file

ROOT = Path(__file__).resolve().parents[2]
OVERHEADS = ROOT / "profiles" / "overheads.json"
CALIBRATION = ROOT / "benchmarks" / "calibration"
NARROWEST = 0.06
"""The spread around a context is never put closer than this: drivers differ more than runs."""

FEW = 10
"""Runs below which their spread is not known."""


def contexts(results: Path = RESULTS) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """(task, additions, bytes) of every measured context that may be fitted on."""
    for line in (CALIBRATION / "runs.jsonl").read_bytes().splitlines()[1:]:
        row = json.loads(line)
        config = load_config_file(CALIBRATION / "configs" / f"{row['model']}.json")
        work = msgspec.convert(row["workload"], Workload)
        if work.task == "infer" and "num_experts" in config:
            continue  # what its experts load is a bound of its own
        added = context_additions(work, msgspec.convert(row["strategy"], Strategy))
        yield work.task, added, row["measured"]["context_bytes"]
    for cell, row in _fitted(results):
        n = row["figures"].get("context_bytes")
        if n and not cell.timed:
            yield cell.workload.task, context_additions(cell.workload, cell.strategy), n


def _fitted(results: Path) -> Iterator[tuple[Cell, dict[str, Any]]]:
    cells = {cell.id: cell for cell in read_cells() if cell.half == "fit"}
    for row in read_lines(results):
        if row["id"] in cells and "figures" in row:
            yield cells[row["id"]], row


def process_ram(results: Path = RESULTS) -> int | None:
    """RAM of a process beside what the estimate counts otherwise; None where the grid is not measured."""
    found = []
    for cell, row in _fitted(results):
        try:
            host = predict(cell).host
        except FitwrightError:
            continue
        counted = sum(line.bytes for line in host.components if line.name != "process")
        if row["figures"].get("host_peak_bytes") and not counted:
            found.append(row["figures"]["host_peak_bytes"])
    return median_high(found) if found else None


def figures(results: Path = RESULTS) -> dict[str, float]:
    """The measured figures by their field: the middle one, of an even number of runs the upper of the middle
    two; of few runs the largest, because a context that is estimated too small ends a run. The factors hold
    nine tenths of all runs."""
    runs = list(contexts(results))
    alone: dict[str, list[int]] = {}
    for task, added, n in runs:
        if not added:
            alone.setdefault(f"{task}_bytes", []).append(n)
    found: dict[str, float] = {name: _middle(values) for name, values in alone.items()}
    more: dict[str, list[int]] = {}
    for task, added, n in runs:
        if len(added) == 1 and f"{task}_bytes" in found:
            more.setdefault(added[0], []).append(n - int(found[f"{task}_bytes"]))
    found |= {name: _middle(values) for name, values in more.items()}
    ratios = sorted(
        n / sum(found[name] for name in (f"{task}_bytes", *added))
        for task, added, n in runs
        if found.keys() >= {f"{task}_bytes", *added}
    )
    tail = len(ratios) // 20
    found["low_factor"] = min(1 - NARROWEST, math.floor(100 * ratios[tail]) / 100)
    found["high_factor"] = max(1 + NARROWEST, math.ceil(100 * ratios[-1 - tail]) / 100)
    ram = process_ram(results)
    return found if ram is None else {**found, "cuda_bytes": ram}


def _middle(values: list[int]) -> int:
    return median_high(values) if len(values) >= FEW else max(values)


def rewritten(text: str, found: dict[str, float], runs: int) -> str:
    """The file with its figures replaced, everything else as it stands."""
    for name, value in found.items():
        # the first occurrence: the factors of unmeasured cards come later
        number = f"{value:g}" if value < 100 else str(value)
        text, many = re.subn(rf'("{name}": )[0-9.]+', rf"\g<1>{number}", text, count=1)
        if not many:
            raise KeyError(name)
    return re.sub(r'"source": "\d+ runs, one', f'"source": "{runs} runs, one', text, count=1)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help="write profiles/overheads.json")
    args = parser.parse_args()
    before = OVERHEADS.read_text()
    runs = sum(1 for _ in contexts(args.results))
    after = rewritten(before, figures(args.results), runs)
    lines = zip(before.splitlines(), after.splitlines(), strict=True)
    changed = [(old, new) for old, new in lines if old != new]
    for old, new in changed:
        print(f"- {old.strip()}\n+ {new.strip()}")
    if not changed:
        print(f"{runs} runs say what {OVERHEADS.name} says")
    if changed and args.write:
        write_atomically(OVERHEADS, after.encode())
        print(f"{OVERHEADS.name} written; next: python -m benchmarks.accuracy.report")
    return int(bool(changed) and not args.write)


if __name__ == "__main__":
    sys.exit(main())
