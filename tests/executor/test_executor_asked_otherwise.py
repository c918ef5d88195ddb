"""Plans carried out otherwise than they were made: under another engine, or where their card is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

pytest.importorskip("torch")

import torch
from conftest import make_plan, strategy

from executor.cli import main
from executor.preflight import Now
from executor.report import pairs
from planner.plan import read_plan
from planner.types import Host, Machine, Workload

pytestmark = pytest.mark.executor
INFER = Workload(task="infer", prompt_tokens=16, new_tokens=2)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--engine", "stream"], "the plan's are for engine resident"),
        (["--engine", "resident"], None),
        ([], None),
    ],
)
def test_predictions_are_for_the_planned_engine(
    tmp_path: Path, tiny: Path, more: list[str], says: str | None, capsys: Any
) -> None:
    plan = make_plan(tmp_path / "plan.json", tiny, INFER, strategy())
    folder = tmp_path / "o"
    assert main(["run", str(plan), "--prompt", "x", "--greedy", "--output", str(folder), *more]) == 0
    screen = capsys.readouterr().out
    report = json.loads((folder / "report.json").read_text())
    ram = next(line for line in screen.splitlines() if "host RAM" in line)
    if says is None:
        assert set(report["error"]) == {"ram_bytes"} and "954 MiB" in ram
    else:
        assert report["error"] == {} and any(says in note for note in report["notes"])
        assert "954 MiB" not in ram and says in screen


def test_other_residents_than_planned_have_no_prediction(tmp_path: Path, tiny: Path) -> None:
    from executor.report import read_report

    plan = make_plan(tmp_path / "plan.json", tiny, INFER, strategy(engine="stream"))
    arguments = ["run", plan, "--prompt", "x", "--output", tmp_path / "o", "--resident-layers", "2", "--json"]
    assert main([*map(str, arguments)]) == 0
    report = read_report(tmp_path / "o" / "report.json")
    assert report.error == {} and any("engine stream with 0 resident layers" in note for note in report.notes)
    (candidate,) = read_plan(plan).candidates
    planned = msgspec.structs.replace(report, layers_resident=0)
    assert pairs(candidate, planned)["ram_bytes"][0] == 10**9


def test_a_cards_plan_without_a_card_says_so(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Also where its RAM would be too little, too, and where a later candidate could do without."""
    here = Now(machine=Machine(host=Host(ram_available_bytes=1)))
    monkeypatch.setattr("executor.run.look", lambda *_: here)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ways = (strategy(placement="full_gpu"), strategy(placement="full_gpu", quant="nf4"), strategy())
    plan = make_plan(tmp_path / "plan.json", tiny, INFER, *ways)
    assert main(["rehearse", str(plan), "--output", str(tmp_path / "o")]) == 2
    first, hint = capsys.readouterr().err.splitlines()
    assert first == "error: the candidate is for a CUDA card and torch sees none here"
    assert hint.startswith("hint: ") and not (tmp_path / "o").exists()


def test_what_never_ran_did_not_run_out_of_memory(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from executor.engines import resident

    def load(request: Any) -> Any:
        if request.candidate.rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        raise AssertionError("the second is refused before it is loaded")

    monkeypatch.setattr(resident, "load", load)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = make_plan(tmp_path / "plan.json", tiny, INFER, strategy(), strategy(placement="full_gpu"))
    assert main(["run", str(plan), "--prompt", "x", "--output", str(tmp_path / "o")]) == 2
    last = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert "out of memory on every" not in last and "candidate 2: the candidate is for a CUDA card" in last
