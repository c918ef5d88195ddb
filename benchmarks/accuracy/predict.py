"""Write what the estimator says about every cell of the grid, before it is measured.

    python -m benchmarks.accuracy.predict [--grid FILE] [--output FILE]

One JSON line per cell after a first line with the digest of the estimator's code and data. A cell that the
estimator refuses has `refused` with the reason; it counts as an error of 100 %.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.accuracy.cells import GRID, PREDICTIONS, Cell, predict, read_cells
from planner.errors import FitwrightError
from planner.files import write_atomically
from planner.types import Estimate

ROOT = Path(__file__).resolve().parents[2]


def estimator_digest() -> str:
    """SHA-256 over the code of the planner and the data and code of the profiles."""
    digest = hashlib.sha256()
    files = [*(ROOT / "planner").rglob("*.py"), *(ROOT / "profiles").rglob("*.py")]
    for path in sorted([*files, *(ROOT / "profiles").rglob("*.json")]):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def prediction(cell: Cell) -> dict[str, Any]:
    """One line: the figures of a cell's estimate, or why there is none."""
    try:
        found = predict(cell)
    except FitwrightError as error:
        return {"id": cell.id, "refused": str(error)}
    return {"id": cell.id, **figures(found)}


def figures(found: Estimate) -> dict[str, Any]:
    """What of an estimate is compared with a measurement."""
    gpu = found.gpus[0] if found.gpus else None
    card = {} if gpu is None else {name: getattr(gpu, name) for name in CARD}
    return {
        **card,
        "ram_bytes": found.host.ram_bytes,
        "speed": msgspec.to_builtins(found.speed),
        "unknown": found.verdict == "unknown",
    }


CARD = (
    "load_bytes",
    "allocated_peak_bytes",
    "required_bytes",
    "context_bytes",
    "process_bytes",
    "low_bytes",
    "high_bytes",
    "managed_bytes",
    "peak_moment",
    "moments",
)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grid", type=Path, default=GRID)
    parser.add_argument("--output", type=Path, default=PREDICTIONS)
    args = parser.parse_args()
    rows = [prediction(cell) for cell in read_cells(args.grid)]
    head = {"estimator_sha256": estimator_digest(), "gpu": "h200"}
    lines = "".join(json.dumps(row, sort_keys=True) + "\n" for row in (head, *rows))
    write_atomically(args.output, lines.encode())
    refused = sum("refused" in row for row in rows)
    print(f"{len(rows)} cells predicted, {refused} refused -> {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
