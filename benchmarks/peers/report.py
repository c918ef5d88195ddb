"""Rivals side by side with ours, on the same measured jobs.

    python -m benchmarks.peers.report [--cells calibration|speed|grid] [--json]

Each is held against what it claims to predict: bytes of the process (0 inside the measured bracket of what
the job needs, else the distance to its nearer end), allocated bytes, or decode speed. Verdicts: its number
against every budget of the accuracy report; ours say "fits" only when the whole interval does. A job that a
tool refuses is left out of its figures and counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.accuracy.cells import read_lines
from benchmarks.accuracy.score import BUDGETS, spread
from benchmarks.peers.jobs import Job, jobs
from benchmarks.peers.rivals import RIVALS, Tier
from benchmarks.peers.run import predictions_file


def error_of(tier: Tier, answer: Mapping[str, Any], job: Job) -> float | None:
    """Predicted / measured - 1; None where either is missing."""
    truth = job.truth
    if tier == "decode_tokens_per_s":
        speed = answer.get("tokens_per_s")
        return speed / truth.decode_tokens_per_s - 1 if speed and truth.decode_tokens_per_s else None
    if "bytes" not in answer:
        return None
    n = answer["bytes"]
    if tier == "allocated":
        return float(n / truth.allocated_peak_bytes - 1)
    if truth.failed_bytes is None or truth.worked_bytes is None:
        return None
    if n < truth.failed_bytes:
        return float(n / truth.failed_bytes - 1)
    return float(n / truth.worked_bytes - 1) if n > truth.worked_bytes else 0.0


def verdicts(answer: Mapping[str, Any], job: Job) -> tuple[int, int, int, int]:
    """(false fits, budgets that fail, false no-fits, budgets that run)."""
    truth = job.truth
    if truth.failed_bytes is None or truth.worked_bytes is None or "bytes" not in answer:
        return 0, 0, 0, 0
    fails = [n for n in BUDGETS if n < truth.failed_bytes]
    runs = [n for n in BUDGETS if n >= truth.worked_bytes]
    high, low = answer.get("high_bytes", answer["bytes"]), answer.get("low_bytes", answer["bytes"])
    return sum(high <= n for n in fails), len(fails), sum(low > n for n in runs), len(runs)


Answers = Mapping[tuple[str, str], Mapping[str, Any]]
"""By rival and job."""


def table_of(found: Sequence[Job], answers: Answers) -> list[dict[str, Any]]:
    """A row a tool, ours first in each tier."""
    rows = []
    ours = {job.key: job.ours() for job in found}
    tiers: dict[Tier, list[str]] = {"process": [], "allocated": [], "decode_tokens_per_s": []}
    for rival in RIVALS:
        tiers[rival.tier].append(rival.name)
    for tier, names in tiers.items():
        for name in ("fitwright", *names):
            given = {job.key: _answer(name, job, ours, answers, tier) for job in found}
            errors = spread(error_of(tier, given[job.key], job) for job in found)
            if errors is None:
                continue
            counts = [verdicts(given[job.key], job) for job in found if tier != "decode_tokens_per_s"]
            sums = [sum(column) for column in zip(*counts, strict=True)] or [0, 0, 0, 0]
            versions = {row.get("version") for row in given.values()} - {None}
            rows.append(
                {
                    "tool": name,
                    "version": next(iter(versions), None),
                    "tier": tier,
                    "refused": sum("refused" in row for row in given.values()),
                    **errors,
                    "false_fits": sums[0],
                    "fails": sums[1],
                    "false_no_fits": sums[2],
                    "runs": sums[3],
                }
            )
    return rows


def _answer(
    name: str,
    job: Job,
    ours: Mapping[str, dict[str, Any]],
    answers: Answers,
    tier: Tier,
) -> Mapping[str, Any]:
    if name != "fitwright":
        return answers.get((name, job.key), {"refused": "not asked"})
    mine = ours[job.key]
    return {**mine, "bytes": mine["tensor_bytes"]} if tier == "allocated" else mine


def print_table(out: Console, rows: Sequence[Mapping[str, Any]], jobs_asked: int) -> None:
    """For a person."""
    table = Table(title=f"predicted / measured - 1 of {jobs_asked} measured jobs")
    for column in ("against", "tool", "n", "refused", "median", "P95", "worst", "from", "to"):
        table.add_column(column, justify="left" if column in ("against", "tool") else "right")
    for column in ("false fits", "false no-fits"):
        table.add_column(column, justify="right")
    last = ""
    for row in rows:
        tool = f"{row['tool']} {row['version'] or ''}".strip()
        sizes = (f"{row[key]:.1%}" for key in ("p50", "p95", "worst"))
        signed = (f"{row[key]:+.1%}" for key in ("lowest", "highest"))
        process = row["tier"] == "process"
        wrong = (
            (f"{row['false_fits']}/{row['fails']}", f"{row['false_no_fits']}/{row['runs']}")
            if process
            else ("", "")
        )
        head = "" if row["tier"] == last else row["tier"]
        if head and last:
            table.add_section()
        last = row["tier"]
        table.add_row(head, tool, str(row["cells"]), str(row["refused"]), *sizes, *signed, *wrong)
    out.print(table)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", choices=("calibration", "speed", "grid"), default="calibration")
    parser.add_argument("--json", action="store_true", help="print one JSON array")
    args = parser.parse_args()
    path = predictions_file(args.cells)
    if not path.exists():
        print(f"{path.name} is not there; run benchmarks.peers.run first", file=sys.stderr)
        return 2
    answers = {(row["rival"], row["key"]): row for row in read_lines(path)}
    found = list(jobs(args.cells))
    rows = table_of(found, answers)
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        print_table(Console(highlight=False), rows, len(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
