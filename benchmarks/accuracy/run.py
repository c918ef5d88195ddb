"""Measure the cells of the grid on this machine, several side by side.

    python -m benchmarks.accuracy.run --results FILE [--budget-seconds N] [--side-by-side N] [--only TEXT]

Every cell is a process of its own (`worker.py`). Each finished cell is one JSON line appended to the results,
with predictions' digest and environment; a cell that has a line is not measured again, so the same command
goes on where an earlier one ended. Stops by itself within the budget, and on SIGTERM or ctrl-C: cells that
were running leave no line. Exit code 0 when every cell has a line, 1 when some are left, 130 when stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.cells import GRID, PREDICTIONS, RESULTS, Cell, read_cells, read_lines
from benchmarks.accuracy.processes import Worker
from benchmarks.accuracy.schedule import Room, Share, next_cell, order, share_of
from planner.units import GIB

GRACE_SECONDS = 8.0
"""Kept of the budget for ending what still runs."""
CELL_SECONDS = 150.0
"""After this long a cell is given up, whatever it should have taken."""
HOPELESS = 8
"""When so many cells have failed and none has worked, something is wrong with the machine: stop."""


class Runner:
    """Starts cells as room is there, collects what they measured."""

    def __init__(self, args: argparse.Namespace, cells: Sequence[Cell]) -> None:
        self.args = args
        self.began = time.monotonic()
        self.predictions = {row["id"]: row for row in read_lines(args.predictions) if "id" in row}
        self.digest = hashlib.sha256(args.predictions.read_bytes()).hexdigest()[:12]
        self.waiting = order(cells)
        self.shares = {cell.id: self._share(cell) for cell in cells}
        self.factors: dict[str, float] = {}
        self.room = Room(int(args.card_gib * GIB), int(args.ram_gib * GIB), args.side_by_side)
        self.running: dict[str, tuple[Cell, Worker]] = {}
        self.spare: list[Worker] = []
        self.stopped = False
        self.done = self.good = 0

    @property
    def seconds_left(self) -> float:
        """Of the budget, without the grace at its end."""
        return self.args.budget_seconds - GRACE_SECONDS - (time.monotonic() - self.began)

    def run(self) -> int:
        """Until nothing is left, the budget is spent, or somebody says stop; how many cells were left."""
        with tempfile.TemporaryDirectory(prefix="accuracy-") as folder:
            self.folder = Path(folder)
            try:
                while not self._over():
                    self._start()
                    self._collect()
                    if not self.running and not self._startable():
                        break
                    time.sleep(0.05)
            finally:
                for worker in [*self.spare, *(worker for _, worker in self.running.values())]:
                    worker.kill()
        return len(self.waiting) + len(self.running)

    def _over(self) -> bool:
        hopeless = self.good == 0 and self.done >= HOPELESS
        return self.stopped or hopeless or self.seconds_left <= 0 or not (self.waiting or self.running)

    def stop(self, *_: object) -> None:
        """Signal handler: end at the next look."""
        self.stopped = True

    # ------------------------------------------------------------------ starting

    def _share(self, cell: Cell, factor: float = 1.0) -> Share:
        return share_of(self.predictions.get(cell.id, {}), factor)

    def _slack(self, cell: Cell) -> float:
        predicted = self.predictions.get(cell.id, {})
        if not predicted.get("allocated_peak_bytes"):
            return 1.0
        return float(predicted["required_bytes"] / predicted["allocated_peak_bytes"])

    def _startable(self) -> bool:
        return self._next() is not None

    def _next(self) -> Cell | None:
        return next_cell(self.waiting, self.shares, self.room, self.seconds_left)

    def _start(self) -> None:
        self._warm_up()
        while not any(cell.timed for cell, _ in self.running.values()):
            cell = self._next()
            if cell is None:
                return
            if cell.timed and not all(worker.ready for worker in self.spare):
                return  # importing beside it would take its time
            worker = self.spare.pop(0) if self.spare else self._new_worker()
            self.waiting.remove(cell)
            self.room.take(cell, self.shares[cell.id])
            share = self.shares[cell.id].allocator_bytes if self.args.device == "cuda" else None
            worker.start(cell, share, self._slack(cell))
            self.running[cell.id] = (cell, worker)
            self._warm_up()

    def _warm_up(self) -> None:
        """Keep processes ready ahead: they import while others measure, but never beside a timed cell."""
        timed = any(cell.timed for cell, _ in self.running.values())
        next_timed = bool(self.waiting) and self.waiting[0].timed
        if timed or (next_timed and self.spare):
            return
        many = self.args.side_by_side if next_timed else self.args.spare
        while len(self.spare) < min(many, len(self.waiting)):
            self.spare.append(self._new_worker())

    def _new_worker(self) -> Worker:
        return Worker(self.folder, self.args.device, self.args.threads)

    # ------------------------------------------------------------------ collecting

    def _collect(self) -> None:
        for cell, worker in list(self.running.values()):
            late = worker.seconds > max(CELL_SECONDS, 4 * (cell.seconds or 0))
            if not worker.ended and not late:
                continue
            found = worker.result()
            if late:
                worker.kill()
                found |= {"status": "timeout", "error": f"given up after {worker.seconds:.0f} s"}
            self._end(cell, found)

    def _end(self, cell: Cell, found: dict[str, Any]) -> None:
        del self.running[cell.id]
        beside = len(self.room.taken) - 1
        self.room.leave(cell)
        factor = self.factors.get(cell.id, 1.0)
        if found["status"] == "share_exceeded" and factor < 4:
            self.factors[cell.id] = 2 * factor
            self.shares[cell.id] = self._share(cell, 2 * factor)
            self.waiting.insert(0, cell)
            return
        row = {
            "id": cell.id,
            "status": found.pop("status"),
            "cell": cell.name,
            "predictions_sha256": self.digest,
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "cells_beside": beside,
            **found,
        }
        with open(self.args.results, "a") as f:
            f.write(json.dumps(row, sort_keys=True) + "\n")
            f.flush()
            os.fsync(f.fileno())
        self.done += 1
        self.good += row["status"] == "ok"
        print(self._line(cell, row), flush=True)

    def _line(self, cell: Cell, row: dict[str, Any]) -> str:
        text = (
            f"[{time.monotonic() - self.began:4.0f} s, {len(self.waiting)} left] {cell.name}: {row['status']}"
        )
        figures, predicted = row.get("figures", {}), self.predictions.get(cell.id, {})
        if figures.get("allocated_peak_bytes") and predicted.get("allocated_peak_bytes"):
            error = predicted["allocated_peak_bytes"] / figures["allocated_peak_bytes"] - 1
            text += f", allocated {error:+.2%}"
        for allocator, cap in row.get("caps", {}).items():
            if "worked_bytes" in cap:
                text += f", {allocator} {cap['worked_bytes'] / figures['allocated_peak_bytes']:.3f} x"
        return text + (f" ({row['error'][:200]})" if row.get("error") else "")


def main() -> int:
    """Command line."""
    args = _parse()
    measured = {
        row["id"]
        for path in (args.results, *args.also_done)
        for row in read_lines(path)
        if row["status"] == "ok" or not args.retry
    }
    wanted = {"all": (False, True), "memory": (False,), "timed": (True,)}[args.kind]
    every = [cell for cell in read_cells(args.grid) if args.only in cell.name and cell.timed in wanted]
    cells = [cell for cell in every if cell.id not in measured]
    runner = Runner(args, cells)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, runner.stop)
    print(f"{len(cells)} of {len(every)} cells to measure", flush=True)
    left = runner.run()
    spent = time.monotonic() - runner.began
    print(f"{runner.done} cells measured in {spent:.0f} s, {left} of {len(every)} left", flush=True)
    return 130 if runner.stopped else int(left > 0)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grid", type=Path, default=GRID)
    parser.add_argument("--predictions", type=Path, default=PREDICTIONS)
    parser.add_argument("--results", type=Path, default=RESULTS, help="lines are appended here")
    parser.add_argument(
        "--also-done", type=Path, action="append", default=[RESULTS], help="results of earlier sessions"
    )
    parser.add_argument("--only", default="", help="only cells with this in their name")
    parser.add_argument("--kind", choices=("all", "memory", "timed"), default="all", help="which cells")
    parser.add_argument("--retry", action="store_true", help="measure failed cells again")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"))
    parser.add_argument("--side-by-side", type=int, default=7, help="cells at once at most")
    parser.add_argument("--spare", type=int, default=3, help="processes that import ahead")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of a cell")
    parser.add_argument("--card-gib", type=float, default=136.0, help="what of the card may be shared out")
    parser.add_argument("--ram-gib", type=float, default=100.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
