"""How well card and host hide behind each other in training: what `train_overlap` was chosen by.

    python benchmarks/streaming/overlap.py

Steps of resident trainings, each predicted with a norm between 3 and 50 (`planner.seconds.side_by_side`)
and set beside what was measured: runs timed alone of the half `fit` of benchmarks/accuracy, the resident rows
of results.jsonl here, and the half `judge`, on which nothing is chosen. Prints the root mean square of the
logarithms of measured over predicted.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from benchmarks.accuracy.cells import GRID, RESULTS, machine_of, model_of, predict, read_cells  # noqa: E402
from planner.passes import train_seconds  # noqa: E402
from planner.plan import read_plan  # noqa: E402
from planner.rates import card_rates  # noqa: E402
from planner.seconds import Seconds, side_by_side  # noqa: E402
from planner.speed import _job  # noqa: E402
from planner.types import Machine, PlacementMap, Strategy, Workload  # noqa: E402
from profiles.architecture import architecture  # noqa: E402
from profiles.schema import Architecture  # noqa: E402

NORMS = (3, 4, 5, 6, 8, 12, 50)

Run = tuple[str, Seconds, float]
"""Its name, what its step is made of, and the seconds it took."""


def main() -> None:
    """Print an error for every norm and set of runs."""
    halves = list(accuracy())
    fit = [run for half, run in halves if half != "judge"] + list(resident())
    judge = [run for half, run in halves if half == "judge"]
    print(f"norm  fit ({len(fit)})  judge ({len(judge)})")
    for norm in NORMS:
        print(f"{norm:4}  {error(fit, norm):.3f}    {error(judge, norm):.3f}")


def error(runs: Iterable[Run], norm: float) -> float:
    """Root mean square of the logarithms of measured over predicted seconds."""
    found = [
        math.log(measured / (side_by_side(step.card, step.launch, norm) + step.alone))
        for _, step, measured in runs
    ]
    return math.sqrt(sum(each * each for each in found) / len(found))


def accuracy() -> Iterator[tuple[str, Run]]:
    """Trainings of the grid that were measured for their speed, with their halves."""
    cells = {cell.id: cell for cell in read_cells(GRID)}
    for row in map(json.loads, RESULTS.read_text().splitlines()):
        rate = (row.get("figures") or {}).get("train_tokens_per_s")
        cell = cells[row["id"]]
        if rate is None or not cell.timed:
            continue
        arch, placed = architecture(model_of(cell.model).config), predict(cell).placement
        step = seconds(arch, machine_of(), cell.workload, cell.strategy, placed)
        yield cell.half, (row["cell"], step, cell.workload.batch_size * cell.workload.seq_len / rate)


def resident() -> Iterator[Run]:
    """Resident trainings of this folder, by their plans."""
    for row in map(json.loads, (HERE / "results.jsonl").read_text().splitlines()):
        rate = row["report"].get("train_tokens_per_s")
        if rate is None or row["report"]["engine"] != "resident":
            continue
        plan = read_plan(HERE / row["plan"])
        how, work = plan.candidates[0].strategy, plan.workload
        placed = plan.candidates[0].estimate.placement
        step = seconds(architecture(plan.model.config), plan.machine, work, how, placed)
        yield row["plan"], step, work.batch_size * work.seq_len / rate


def seconds(
    arch: Architecture, machine: Machine, work: Workload, how: Strategy, placed: PlacementMap
) -> Seconds:
    """A step of a job on a card whose rates are known."""
    found = train_seconds(
        _job(arch, False, 0, work, how, placed), card_rates(machine, how.dtype, "typical"), "typical"
    )
    assert found is not None
    return found


if __name__ == "__main__":
    main()
