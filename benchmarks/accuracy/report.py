"""Hold the estimator to what was measured.

    python -m benchmarks.accuracy.report [--results FILE] [--json] [--committed] [--allocator expandable]

Predicts every measured cell again with the estimator as it is now (`--committed`: takes the predictions made
before measuring) and prints errors, verdicts, intervals and speeds: of the half on which constants may be
fitted, and of the half that judges. Exit code 1 if the judging half misses a target.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.accuracy.cells import GRID, PREDICTIONS, RESULTS, Cell, read_cells, read_lines
from benchmarks.accuracy.predict import prediction
from benchmarks.accuracy.score import NEAR, Outcome, score, targets


def outcomes(
    results: Path = RESULTS,
    grid: Path = GRID,
    predictions: Mapping[str, Mapping[str, Any]] | None = None,
    allocator: str = "stock",
) -> list[Outcome]:
    """Every cell of which something was measured, with today's prediction or that of `predictions`.

    How many layers of an offloaded model stay on the card follows from the estimate; today's could be of
    another run, so such cells keep the prediction they were measured with.
    """
    cells = {cell.id: cell for cell in read_cells(grid)}
    rows = {row["id"]: row for row in read_lines(results) if "figures" in row and row["id"] in cells}
    before = predictions or committed()

    def said(cell: Cell) -> Mapping[str, Any]:
        moves = cell.strategy.placement != "full_gpu" and cell.id in before
        return before[cell.id] if predictions or moves else prediction(cell)

    return [Outcome(cells[key], said(cells[key]), row, allocator) for key, row in rows.items()]


def failed(results: Path = RESULTS) -> list[dict[str, Any]]:
    """Cells of which nothing was measured, the last line of each."""
    rows = {row["id"]: row for row in read_lines(results)}
    return [row for row in rows.values() if "figures" not in row]


def halves(found: Sequence[Outcome]) -> dict[str, Any]:
    """The score of both halves and of all."""
    parts: dict[str, list[Outcome]] = {"fit": [], "judge": [], "all": list(found)}
    for outcome in found:
        parts[outcome.cell.half].append(outcome)
    return {name: score(some) for name, some in parts.items()}


def committed(path: Path = PREDICTIONS) -> dict[str, dict[str, Any]]:
    """Predictions made before measuring, by cell."""
    return {row["id"]: row for row in read_lines(path) if "id" in row}


# --------------------------------------------------------------------------- screens


def print_report(out: Console, result: Mapping[str, Any], missing: Sequence[Mapping[str, Any]]) -> None:
    """Tables for a person."""
    for half in ("fit", "judge"):
        part = result[half]
        if not part["cells"]:
            out.print(f"nothing measured of the half {half}")
            continue
        title = f"{half}: {part['cells']} cells, {part['refused']} refused"
        out.print(_errors(title, {"all": part["tiers"], **part["groups"]}, ("allocated", "process")))
        out.print(_verdicts(part["verdicts"]))
        out.print(_interval(part["interval"]))
    everything = result["all"]
    out.print(_errors("every tier, all cells", {"all": everything["tiers"]}, tuple(everything["tiers"])))
    out.print(_errors("architectures, all cells", everything["architectures"], ("allocated", "process")))
    out.print(_speeds(everything["speeds"]))
    out.print(_targets(result["judge"]))
    if everything["strangers"]:
        names = ", ".join(everything["strangers"])
        out.print(f"within the targets without a model in the catalogue: {names}")
    for row in missing:
        out.print(f"not measured: {row['cell']}: {row['status']}: {row.get('error', '')}", style="dim")


def _table(title: str, *columns: str, text: int = 1) -> Table:
    table = Table(*columns, title=title)
    for column in table.columns[text:]:
        column.justify = "right"
    return table


def _errors(title: str, groups: Mapping[str, Any], tiers: Sequence[str]) -> Table:
    table = _table(title, "cells of", "tier", "n", "P50", "P95", "worst", "from", "to", text=2)
    for group, rows in groups.items():
        known = [(tier, rows[tier]) for tier in tiers if rows[tier] is not None]
        for i, (tier, row) in enumerate(known):
            sizes = (f"{row[key]:.2%}" for key in ("p50", "p95", "worst"))
            signed = (f"{row[key]:+.2%}" for key in ("lowest", "highest"))
            head = group if i == 0 else ""
            table.add_row(head, tier, str(row["cells"]), *sizes, *signed, end_section=i == len(known) - 1)
    return table


def _verdicts(table: Mapping[str, Mapping[str, int]]) -> Table:
    names = {
        "fails": "fails",
        "fails_near": f"fails, budget within {NEAR} x",
        "runs": "runs",
        "runs_near": f"runs, budget within {NEAR} x",
    }
    out = _table("verdicts, budgets of 4 to 141 GiB", "in truth", "fits", "tight", "does not fit", "unknown")
    for truth, label in names.items():
        out.add_row(label, *(str(n) for n in table[truth].values()))
    return out


def _interval(row: Mapping[str, float] | None) -> str:
    if row is None:
        return "no cap was searched"
    return (
        f"90 % interval: meets the measured bracket in {row['coverage']:.1%} of {row['cells']} cells; "
        f"width {row['width_p50']:.1%} of the process (median), at most {row['width_worst']:.1%}"
    )


def _speeds(speeds: Mapping[str, Mapping[str, float] | None]) -> Table:
    table = _table("speeds, measured alone", "", "n", "P50", "P95", "worst", "from", "to")
    for name, row in speeds.items():
        if row is not None:
            sizes = (f"{row[key]:.1%}" for key in ("p50", "p95", "worst"))
            signed = (f"{row[key]:+.1%}" for key in ("lowest", "highest"))
            table.add_row(name, str(row["cells"]), *sizes, *signed)
    return table


def _targets(result: Mapping[str, Any]) -> Table:
    table = _table("targets, on the half not fitted", "figure", "is", "has to be", "")
    for target in targets(result):
        value = "not measured" if target.value is None else f"{target.value:.2%}"
        if "false fits" in target.name and target.value is not None:
            value = str(int(target.value))
        sign = ">=" if target.at_least else "<="
        table.add_row(target.name, value, f"{sign} {target.bound:.1%}", "met" if target.met else "MISSED")
    return table


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--grid", type=Path, default=GRID)
    parser.add_argument("--committed", action="store_true", help="the predictions made before measuring")
    parser.add_argument("--allocator", choices=("stock", "expandable"), default="stock")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    predictions = committed() if args.committed else None
    found = outcomes(args.results, args.grid, predictions, args.allocator)
    if not found:
        print(f"nothing measured in {args.results}", file=sys.stderr)
        return 2
    result = halves(found)
    if args.json:
        print(json.dumps({**result, "not_measured": failed(args.results)}, indent=1))
    else:
        print_report(Console(highlight=False), result, failed(args.results))
    return int(not all(target.met for target in targets(result["judge"])))


if __name__ == "__main__":
    sys.exit(main())
