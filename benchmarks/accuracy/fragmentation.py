"""What the stock allocator needs above the allocated peak: played runs beside every cap that was measured.

    python -m benchmarks.accuracy.fragmentation

Training cells were searched under three protocols, and the same run (`planner.memory.replay`) is played for
each: one more step with the workspaces of cuBLAS kept (`caps`) or cleared (`caps_workspaces_cleared`), and
the whole job begun again under the cap (`caps_from_the_start`). All over the measured allocated peak; nothing
is fitted here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.accuracy.cells import GRID, RESULTS, Cell, model_of, read_cells, read_lines
from benchmarks.accuracy.score import spread
from planner.attention_kernel import as_it_runs
from planner.estimate import CALIBRATED_STACK, architecture_of, normal, normal_strategy
from planner.memory.replay import TrainingRun
from planner.memory.train import training_memory, training_pass
from planner.units import MIB

WORKSPACE = 32 * MIB
"""Of cuBLAS on the card that was measured (profiles/overheads.json)."""
PROTOCOLS = ("caps", "caps_workspaces_cleared", "caps_from_the_start")


def need(cell: Cell, protocol: str) -> int:
    """Bytes of the smallest cap for a training cell, searched as `protocol` says."""
    arch, work = architecture_of(model_of(cell.model)), normal(cell.workload)
    how = normal_strategy(as_it_runs(cell.strategy, arch.model_type, CALIBRATED_STACK), work)
    run = TrainingRun(arch, work, how, training_pass(arch, work, how), WORKSPACE)
    if protocol == "caps_from_the_start":
        found = run.play_from_the_start()
    else:
        found = run.play(cleared=protocol == "caps_workspaces_cleared")
    return training_memory(arch, work, how, WORKSPACE).peak.bytes + found.holes


def error(needed: int, bracket: dict[str, Any]) -> float:
    """0 inside the measured bracket, else the signed distance to its nearer end."""
    failed, worked = bracket["failed_bytes"], bracket["worked_bytes"]
    return needed / failed - 1 if needed < failed else needed / worked - 1 if needed > worked else 0.0


def rows() -> list[tuple[Cell, dict[str, tuple[float, float]]]]:
    """Training cells with (played need, measured cap) over the allocated peak, by protocol."""
    cells = {cell.id: cell for cell in read_cells(GRID)}
    found = []
    for row in read_lines(RESULTS):
        cell = cells[row["id"]]
        if cell.workload.task != "train" or cell.strategy.placement != "full_gpu" or "figures" not in row:
            continue
        peak, shown = row["figures"]["allocated_peak_bytes"], dict[str, tuple[float, float]]()
        for protocol in PROTOCOLS:
            bracket = row.get(protocol, {}).get("stock", {})
            if "worked_bytes" in bracket:
                needed = need(cell, protocol)
                shown[protocol] = needed / peak, bracket["worked_bytes"] / peak
                shown[f"{protocol} error"] = error(needed, bracket), 0.0
        if shown:
            found.append((cell, shown))
    return found


def _line(name: str, errors: Sequence[float]) -> str:
    found = spread(errors)
    assert found is not None
    return (
        f"{name}: {found['cells']:.0f} cells, median {found['p50']:.2%}, P95 {found['p95']:.2%}, "
        f"from {found['lowest']:+.2%} to {found['highest']:+.2%}"
    )


def main() -> int:
    """Command line."""
    found, out = rows(), Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    table = Table("cell", *(name for protocol in PROTOCOLS for name in (protocol, "measured")))
    for cell, shown in found:
        figures = [shown.get(protocol) for protocol in PROTOCOLS]
        table.add_row(cell.name[11:], *(f"{n:.3f}" if n else "" for pair in figures for n in pair or (0, 0)))
    out.print(table)
    for protocol in PROTOCOLS:
        for half in ("fit", "judge"):
            name = f"{protocol} error"
            errors = [shown[name][0] for cell, shown in found if name in shown and cell.half == half]
            if errors:
                out.print(_line(f"{protocol}, half {half}", errors))
    return 0


if __name__ == "__main__":
    sys.exit(main())
