"""Ask the rivals about measured jobs.

    python -m benchmarks.peers.install --into DIR
    python -m benchmarks.peers.run --from DIR [--cells calibration|speed|grid]

Writes `predictions_<cells>.jsonl` here: one line a rival and job, with the rival's version, what it predicts,
or why it has no answer. `report.py` holds them, and our own answers, against what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.install import python_of
from benchmarks.peers.jobs import Job, jobs
from benchmarks.peers.rivals import RIVALS, Rival
from planner.files import write_atomically

HERE = Path(__file__).resolve().parent
SECONDS = 900


def predictions_file(cells: str) -> Path:
    """Where the answers about some cells are kept."""
    return HERE / f"predictions_{cells}.jsonl"


def ask(rival: Rival, into: Path, asked: Sequence[Job]) -> list[dict[str, Any]]:
    """A rival's answers, one for each job in order. Errors: `RuntimeError` when it broke down."""
    # -I: neither our own folder nor the caller's path may be taken for the rival's modules
    command = [str(python_of(into, rival)), "-I", str(HERE / "adapters" / f"{rival.name}.py")]
    done = subprocess.run(
        command,
        input="".join(json.dumps(job.asked()) + "\n" for job in asked),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **rival.settings},
        check=False,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if len(rows) != len(asked):
        raise RuntimeError(f"answered {len(rows)} of {len(asked)}: {done.stderr.strip()[-300:]}")
    return [{"rival": rival.name, **row} for row in rows]


def main() -> int:
    """Command line; exit code 1 if a rival broke down."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--from", dest="into", type=Path, required=True, help="folder of the environments")
    parser.add_argument("--cells", choices=("calibration", "speed", "grid"), default="calibration")
    args = parser.parse_args()
    asked = list(jobs(args.cells))
    if not asked:
        print(f"nothing is measured of {args.cells}", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    failed = False
    for rival in RIVALS:
        if not python_of(args.into, rival).exists():
            print(f"{rival.name}: not installed in {args.into}")
            continue
        try:
            found = ask(rival, args.into, asked)
        except (RuntimeError, subprocess.TimeoutExpired, OSError) as error:
            print(f"{rival.name}: {error}")
            failed = True
            continue
        rows += found
        refused = sum("refused" in row for row in found)
        answered = len(found) - refused
        print(f"{rival.name} {found[0]['version']}: {answered} answers, {refused} refused", flush=True)
    lines = "".join(json.dumps(row, sort_keys=True) + "\n" for row in rows)
    write_atomically(predictions_file(args.cells), lines.encode())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
