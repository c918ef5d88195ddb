"""Read caps back from what `run.py` printed, where the machine's own results file was lost.

    python -m benchmarks.accuracy.read_back LOG EARLIER >> benchmarks/accuracy/results.jsonl

LOG gives, per cell, the allocated peak against its prediction (to 0.01 %) and the smallest cap over that peak
(to 0.001). EARLIER are lines of the same cells without such caps: where the peaks agree within 0.05 % the
earlier figures are kept and the cap is added; a cell that was not measured before gets its peak and its cap
alone. Lines say that they were read back, from which log, and how far rounding may have moved them.

Runs of that time cleared the workspaces of cuBLAS before each try, also for one more step of training: such
caps stand under a key of their own.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from benchmarks.accuracy.caps import GRANULE
from benchmarks.accuracy.cells import GRID, PREDICTIONS, read_cells, read_lines

LINE = re.compile(
    r"\[ *\d+ s, \d+ left\] (?P<id>\w{10}) (?P<name>.*?): ok, allocated (?P<error>[+-][\d.]+)%(?P<caps>.*)$"
)
PROTOCOL = {"train": "caps_workspaces_cleared", "infer": "caps"}
"""Where a cap is put, by task."""
TOLERANCE = 0.005
"""How far apart the search leaves what failed and what worked (`caps.smallest_cap`)."""
SAME = 5e-4
"""Allocated peaks of one cell in two runs agree within this (measured: 0.02 %, and 0.005 % of rounding)."""


def main() -> int:
    """Command line."""
    log, earlier = Path(sys.argv[1]), {row["id"]: row for row in read_lines(Path(sys.argv[2]))}
    tasks = {cell.id: cell.workload.task for cell in read_cells(GRID)}
    predicted = {row["id"]: row["allocated_peak_bytes"] for row in read_lines(PREDICTIONS) if "id" in row}
    for line in log.read_text().splitlines():
        if found := LINE.match(line):
            name, key = found["id"], PROTOCOL[tasks[found["id"]]]
            row = _row(found, key, log.name, predicted[name], earlier.get(name))
            print(json.dumps(row, sort_keys=True))
    return 0


def _row(
    found: re.Match[str], key: str, log: str, predicted: int, before: dict[str, Any] | None
) -> dict[str, Any]:
    """The line of a cell, with its caps under `key`."""
    peak = round(predicted / (1 + float(found["error"]) / 100))
    if before and abs(before["figures"]["allocated_peak_bytes"] / peak - 1) > SAME:
        raise ValueError(f"{found['id']}: another allocated peak than before")
    row = before or {"id": found["id"], "cell": f"{found['id']} {found['name']}", "status": "ok"}
    figures = row.setdefault("figures", {"allocated_peak_bytes": peak})
    n = figures["allocated_peak_bytes"]
    for allocator, over in re.findall(r"(stock|expandable) ([\d.]+) x", found["caps"]):
        worked = round(float(over) * n)
        failed = min(worked, max(n, worked - GRANULE - round(TOLERANCE * n)))
        row.setdefault(key, {})[allocator] = {"failed_bytes": failed, "worked_bytes": worked}
    row["read_back"] = {"log": log, "what": key, "peak_within": 0 if before else 5e-5, "caps_within": 5e-4}
    return row


if __name__ == "__main__":
    sys.exit(main())
