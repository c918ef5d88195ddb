"""The runner on workers made up for it: shares, retries, timeouts, budgets, resuming, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
from accuracy_fakes import cell, measured, prediction
from msgspec import UNSET
from msgspec.structs import replace

from benchmarks.accuracy import run
from benchmarks.accuracy.cells import Cell, identified, read_lines
from benchmarks.accuracy.grid import line
from benchmarks.accuracy.schedule import Room, Share, next_cell, order, share_of
from planner.types import Strategy, Workload
from planner.units import GIB

ROOT = Path(__file__).resolve().parents[2]


class FakeWorker:
    """Ends at once with what `answers` says about its cell."""

    answers: ClassVar[dict] = {}
    log: ClassVar[list] = []

    def __init__(self, *_: object) -> None:
        self.cell, self.killed, self.ready = None, False, True

    def start(self, item: Cell, share_bytes: int | None, slack: float) -> None:
        self.cell, self.began = item, time.monotonic()
        self.log.append((item.id, share_bytes))

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def ended(self) -> bool:
        return self._answer() != "hangs"

    def result(self) -> dict:
        answer = self._answer()
        if answer == "hangs":
            return {"figures": {"load_bytes": 1}}
        return dict(answer) if isinstance(answer, dict) else {**measured(self.cell), "status": answer}

    def kill(self) -> None:
        self.killed = True

    def _answer(self):
        answers = self.answers.get(self.cell.id, "ok")
        tries = sum(key == self.cell.id for key, _ in self.log)
        return answers[min(tries, len(answers)) - 1] if isinstance(answers, list) else answers


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """`bench(cells, *options)` runs the runner in process; gives its exit code and the lines it wrote."""
    monkeypatch.setattr(run, "Worker", FakeWorker)
    FakeWorker.answers, FakeWorker.log = {}, []

    def call(cells, *options):
        grid, predictions = tmp_path / "grid.jsonl", tmp_path / "predictions.jsonl"
        grid.write_bytes(b"".join(line(item) + b"\n" for item in cells))
        predictions.write_text("".join(json.dumps(prediction(item)) + "\n" for item in cells))
        results = tmp_path / "results.jsonl"
        argv = ["run", "--grid", grid, "--predictions", predictions, "--results", results, *options]
        monkeypatch.setattr(sys, "argv", [str(each) for each in argv])
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            return run.main(), read_lines(results)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    return call


CELLS = [cell(n, seconds=1.0) for n in (256, 512, 768, 1024)]


def test_every_cell_gets_its_line_and_none_a_second(bench):
    code, rows = bench(CELLS)
    assert code == 0 and {row["id"] for row in rows} == {item.id for item in CELLS}
    assert all(row["status"] == "ok" and row["predictions_sha256"] and row["date"] for row in rows)
    code, again = bench(CELLS)
    assert code == 0 and again == rows
    assert len(FakeWorker.log) == len(CELLS)


def test_a_cell_that_outgrows_its_share_comes_again_with_twice_as_much(bench):
    late = CELLS[0].id
    FakeWorker.answers = {late: ["share_exceeded", "ok"]}
    code, rows = bench(CELLS)
    shares = [share for key, share in FakeWorker.log if key == late]
    assert code == 0 and len(shares) == 2 and shares[1] == pytest.approx(2 * shares[0], rel=1e-6)
    assert [row["status"] for row in rows] == ["ok"] * len(CELLS)


def test_failed_cells_keep_their_last_line_and_are_tried_again_only_when_asked(bench):
    FakeWorker.answers = {CELLS[1].id: [{"status": "failed", "error": "ValueError: no"}, "ok"]}
    code, rows = bench(CELLS)
    failed = next(row for row in rows if row["status"] == "failed")
    assert code == 0 and failed["error"] == "ValueError: no"
    assert len(bench(CELLS)[1]) == len(CELLS)
    code, rows = bench(CELLS, "--retry")
    assert code == 0 and len(rows) == len(CELLS) + 1 and rows[-1]["status"] == "ok"


def test_a_hanging_cell_is_given_up_and_keeps_what_it_told(bench, monkeypatch):
    monkeypatch.setattr(run, "CELL_SECONDS", 0.2)
    FakeWorker.answers = {CELLS[2].id: "hangs"}
    items = [replace(item, seconds=0.01) for item in CELLS]
    code, rows = bench(items)
    late = next(row for row in rows if row["id"] == CELLS[2].id)
    assert code == 0 and late["status"] == "timeout" and late["figures"] == {"load_bytes": 1}


def test_nothing_starts_that_cannot_end_within_the_budget(bench):
    code, rows = bench([replace(item, seconds=30.0) for item in CELLS], "--budget-seconds", "20")
    assert (code, rows, FakeWorker.log) == (1, [], [])


def test_a_machine_on_which_nothing_works_is_left(bench):
    many = [cell(n, seconds=1.0) for n in range(100, 140)]
    FakeWorker.answers = {item.id: {"status": "failed", "error": "no card"} for item in many}
    code, rows = bench(many, "--side-by-side", "2")
    assert code == 1 and run.HOPELESS <= len(rows) < len(many)


# --------------------------------------------------------------------------- room


def test_cells_share_a_card_only_as_far_as_it_goes():
    room = Room(card_bytes=40 * GIB, ram_bytes=64 * GIB, side_by_side=3)
    share = share_of(prediction(CELLS[0]))
    assert share.card_bytes > 8 * GIB
    taken = 0
    for item in CELLS:
        if room.fits(share):
            room.take(item, share)
            taken += 1
    assert taken == min(3, 40 * GIB // share.card_bytes)
    room.leave(CELLS[0])
    assert room.fits(share)
    assert not room.fits(Share(30 * GIB, GIB)) and not room.fits(Share(GIB, 63 * GIB))


def test_a_timed_cell_has_the_machine_for_itself():
    timed = identified(replace(CELLS[0], timed=True))
    waiting = order([timed, *CELLS[1:]])
    assert waiting[-1] is timed
    shares = {item.id: Share(GIB, GIB) for item in waiting}
    room = Room(100 * GIB, 100 * GIB, 4)
    assert next_cell([timed, CELLS[1]], shares, room, 1e9) is timed
    room.take(CELLS[1], shares[CELLS[1].id])
    assert next_cell([timed, CELLS[2]], shares, room, 1e9) is None


# --------------------------------------------------------------------------- real processes


@pytest.mark.executor
@pytest.mark.slow
def test_real_cells_on_the_cpu_stop_on_sigterm_and_resume(tmp_path):
    pytest.importorskip("torch")
    jobs = [
        Workload(task="train", method="lora", seq_len=32),
        Workload(task="infer", prompt_tokens=16, new_tokens=4, batch_size=2),
    ]
    cells = [
        identified(Cell(model="tiny-qwen2", workload=job, strategy=Strategy(dtype="fp32"), data=data))
        for job, data in zip(jobs, ("packed", "ragged"), strict=True)
    ]
    grid, results, predictions = (tmp_path / f"{name}.jsonl" for name in ("grid", "results", "predictions"))
    grid.write_bytes(b"".join(line(replace(item, seconds=UNSET)) + b"\n" for item in cells))
    predictions.write_text("".join(json.dumps(prediction(item)) + "\n" for item in cells))
    paths = ["--grid", grid, "--predictions", predictions, "--results", results]
    command = [sys.executable, "-m", "benchmarks.accuracy.run", "--device", "cpu", "--threads", "1", *paths]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    settings = {"cwd": tmp_path, "env": environment, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([*map(str, command)], **settings) as first:
        assert "2 of 2 cells to measure" in first.stdout.readline()
        time.sleep(1)
        first.terminate()
        out, _ = first.communicate(timeout=60)
    assert first.returncode == 130, out
    assert not results.exists()
    done = subprocess.run([*map(str, command)], **settings, check=False, timeout=200)
    assert done.returncode == 0, done.stdout
    rows = {row["id"]: row for row in read_lines(results)}
    train, infer = (rows[item.id]["figures"] for item in cells)
    assert len(train["losses"]) == 2 and train["train_tokens_per_s"] > 0
    assert any("packed into" in note for note in train["notes"])
    assert infer["decode_tokens_per_s"] > 0 and infer["host_peak_bytes"] > infer["host_base_bytes"] > 0
    assert all(row["figures"]["environment"]["libraries"]["torch"] for row in rows.values())


@pytest.mark.executor
@pytest.mark.parametrize("task", ["train", "infer"])
def test_the_second_allocator_begins_with_nothing_of_the_first(tmp_path, monkeypatch, task):
    import gc
    import weakref

    torch = pytest.importorskip("torch")
    from benchmarks.accuracy import bench as module

    work = Workload(task=task, method="lora", seq_len=32, lora_dropout=0.0, prompt_tokens=8, new_tokens=4)
    item = identified(
        Cell(
            model="tiny-qwen2",
            workload=work,
            strategy=Strategy(dtype="fp32"),
            allocators=("stock", "expandable"),
        )
    )
    bench = module.Bench(item, "cpu", tmp_path, lambda part: None)
    models, load = [], module.Kept._load

    def counted(self, *args):
        gc.collect()
        assert [ref for ref in models if ref() is not None] == []
        loaded = load(self, *args)
        models.append(weakref.ref(next(p for p in loaded.model.parameters() if isinstance(p, torch.Tensor))))
        return loaded

    monkeypatch.setattr(module.Kept, "_load", counted)
    bench.measure(None)
    assert len(models) == 2


@pytest.fixture
def card(monkeypatch):
    """A card whose cap the tests look at: `card(need)` makes work fail under caps below `need` bytes."""
    pytest.importorskip("torch")
    from benchmarks.accuracy import bench, capped

    caps = []
    monkeypatch.setattr(capped, "set_cap", caps.append)
    monkeypatch.setattr(bench, "set_cap", caps.append)

    def answers(need):
        def check():
            if caps and caps[-1] is not None and caps[-1] < need:
                raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")

        return check

    answers.caps = caps
    return answers


@pytest.mark.executor
def test_the_cap_of_training_is_searched_with_one_more_step_of_the_run(tmp_path, card):
    """Every try is a whole step: the same mixed precision, and the optimizer's state moves."""
    import torch

    from benchmarks.accuracy import bench as module
    from benchmarks.accuracy.capped import Search, empty_cache, searching_at_the_end
    from executor import train
    from executor.measure import MomentMeter

    work = Workload(task="train", method="lora", seq_len=32, lora_dropout=0.0)
    item = identified(Cell(model="tiny-qwen2", workload=work, strategy=Strategy(dtype="bf16")))
    attempt = module.Bench(item, "cpu", tmp_path, lambda part: None)._attempt(None)
    need, steps, seen, stock = int(1.07 * GIB), [], set(), train._make_trainer
    fails = card(need)

    class Known(Search):
        def run(self, low, high, work, between):
            assert between is empty_cache, "workspaces stay, as in a run that goes on"
            (trainer,) = trainers
            adapter = next(m for name, m in trainer.model.named_modules() if name.endswith("lora_A.default"))

            def step():
                fails()
                work()
                steps.append(int(trainer.optimizer.state[adapter.weight]["step"]))

            adapter.register_forward_hook(lambda *parts: seen.add(parts[-1].dtype))
            super().run(GIB, int(1.3 * GIB), step, between)
            assert all(p.grad is None for p in trainer.model.parameters())

    trainers = []
    search = Known(1.05, 2 * GIB)

    def noted(*args):
        trainers.append(stock(*args))
        return trainers[-1]

    train._make_trainer = noted
    try:
        with searching_at_the_end(search, lambda: MomentMeter(torch.device("cpu"))):
            outcome = attempt.run()
    finally:
        train._make_trainer = stock
    assert search.found["failed_bytes"] < need <= search.found["worked_bytes"] <= 1.08 * GIB
    assert len(card.caps) == search.found["attempts"] + 1 and card.caps[-1] == 2 * GIB
    assert seen == {torch.bfloat16}, "float32 adapters work in bf16 under autocast"
    assert steps == list(range(3, 3 + len(steps))) and steps
    assert len(outcome.trained.record.losses) == 2


@pytest.mark.executor
def test_the_cap_of_generation_is_searched_with_the_loaded_model(tmp_path, card, monkeypatch):
    from benchmarks.accuracy import bench as module
    from benchmarks.accuracy.capped import Search

    work = Workload(task="infer", prompt_tokens=16, new_tokens=4)
    item = identified(Cell(model="tiny-qwen2", workload=work, strategy=Strategy(dtype="fp32")))
    bench = module.Bench(item, "cpu", tmp_path, lambda part: None)
    attempt = bench._attempt(None)
    attempt.run()
    need = int(1.07 * GIB)
    fails, again = card(need), attempt.again

    def under_cap(folder):
        again(folder)
        fails()

    monkeypatch.setattr(attempt, "again", under_cap)
    search = Search(1.05, None)
    search.run(GIB, int(1.3 * GIB), bench._generating(attempt))
    assert search.found["failed_bytes"] < need <= search.found["worked_bytes"] <= 1.08 * GIB
    assert card.caps[-1] is None
    assert not list(tmp_path.glob("run-*/outputs.jsonl")), "tries leave nothing on the disk"

    def broken(folder):
        raise RuntimeError("an error of another kind")

    monkeypatch.setattr(attempt, "again", broken)
    with pytest.raises(RuntimeError, match="another kind"):
        search.run(GIB, int(1.3 * GIB), bench._generating(attempt))
