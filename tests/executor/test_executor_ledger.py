"""Runs end in the ledger, whole lines only, and `executor report` and the planner find them there."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from conftest import make_plan, strategy
from msgspec.structs import replace

from executor import cli
from executor.ledger import append
from planner import cli as planner
from planner.estimate import normal
from planner.inspect.ledger import ledger_file, read_ledger
from planner.inspect.system import System
from planner.ledger import Entry, Figures, line_of
from planner.types import Stack, Strategy, Workload

ENTRY = Entry(
    date="2026-03-01T10:00:00Z",
    kind="run",
    machine="GPU-1",
    device="a card",
    stack=Stack("2.11", "5.17", "0.50", "0.21"),
    model="m",
    config_hash="h",
    workload=Workload(),
    strategy=Strategy(),
    vram_cap_bytes=8 * 2**30,
    predicted=Figures(allocated_peak_bytes=100, decode_tokens_per_s=50.0),
    measured=Figures(allocated_peak_bytes=90, decode_tokens_per_s=60.0, ram_bytes=5),
)


def entries() -> tuple[Entry, ...]:
    return read_ledger(System())[0]


def ledger() -> Path:
    path = ledger_file(System())
    assert path is not None
    return path


# --------------------------------------------------------------------------- the file


def test_lines_are_added_after_what_is_there() -> None:
    for _ in range(3):
        append(ledger(), ENTRY)
    assert ledger().read_bytes() == 3 * line_of(ENTRY)


def test_a_torn_line_does_not_take_the_next_one_with_it() -> None:
    append(ledger(), ENTRY)
    with open(ledger(), "ab") as file:
        file.write(line_of(ENTRY)[:50])
    assert read_ledger(System()) == ((ENTRY,), 0)
    append(ledger(), ENTRY)
    assert read_ledger(System()) == ((ENTRY, ENTRY), 1)


def test_lines_of_several_writers_do_not_mix() -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: append(ledger(), ENTRY), range(200)))
    assert ledger().read_bytes().splitlines(keepends=True) == 200 * [line_of(ENTRY)]


# --------------------------------------------------------------------------- report


def test_report_of_an_empty_ledger(capsys: Any) -> None:
    assert cli.main(["report"]) == 0
    assert "no run has finished here yet" in capsys.readouterr().out
    assert cli.main(["report", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"schema": "fitwright.report/1", "runs": [], "figures": {}}


def test_report_shows_every_run_and_how_good_predictions_were(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    append(ledger(), ENTRY)
    append(ledger(), ENTRY)
    with open(ledger(), "ab") as file:
        file.write(b"rubbish\n")
    assert cli.main(["report"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("run of m") == 2 and "cap 8 GiB" in printed.out
    assert "-10.0%" in printed.out and "+20.0%" in printed.out
    assert "1 lines" in printed.err
    assert cli.main(["report", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["figures"]["allocated_peak_bytes"] == {"runs": 2, "median_error": pytest.approx(0.1),
                                                         "worst_error": pytest.approx(-0.1)}  # fmt: skip
    assert found["runs"][0]["error"]["decode_tokens_per_s"] == pytest.approx(0.2)
    assert "ram_bytes" not in found["figures"]


@pytest.mark.parametrize("content", [None, b"{", b"{}", b'{"schema": "fitwright.run/2"}', b"\xff"])
def test_a_folder_without_a_report_is_one_line(tmp_path: Path, capsys: Any, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "report.json").write_bytes(content)
    assert cli.main(["report", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith("error: ") and len(printed.err.splitlines()) <= 2


# --------------------------------------------------------------------------- a run


@pytest.mark.executor
def test_a_rehearsal_is_remembered_and_found_by_the_planner(tmp_path: Path, tiny: Path, capsys: Any) -> None:
    job = ["--prompt-tokens", "16", "--new-tokens", "4", "--placement", "cpu", "--dtype", "fp32"]
    file, output = tmp_path / "plan.json", tmp_path / "o"
    assert planner.main(["plan", str(tiny), *job, "-o", str(file)]) == 0
    before = json.loads(file.read_text())
    assert before["ledger_hash"] is None
    assert cli.main(["rehearse", str(file), "--output", str(output)]) == 0
    (kept,) = entries()
    assert (kept.kind, kept.model, kept.config_hash) == (
        "rehearsal", before["model"]["id"], before["model"]["config_hash"],
    )  # fmt: skip
    assert kept.measured.ram_bytes and kept.measured.decode_tokens_per_s and kept.libraries["torch"]
    assert kept.predicted.ram_bytes == before["candidates"][0]["estimate"]["host"]["ram_bytes"]
    # a finished run is shown, not counted again
    assert cli.main(["rehearse", str(file), "--output", str(output)]) == 0
    assert len(entries()) == 1
    capsys.readouterr()
    assert cli.main(["report", str(output)]) == 0
    assert "RAM" in capsys.readouterr().out
    _planner_shows_it(tiny, job, kept, tmp_path, capsys)


def _planner_shows_it(tiny: Path, job: list[str], kept: Entry, folder: Path, capsys: Any) -> None:
    asked = ["estimate", str(tiny), *job, "--quant", kept.strategy.quant]
    assert planner.main([*asked, "--json"]) == 0
    here = json.loads(capsys.readouterr().out)["measured_here"]
    assert (here["runs"], here["kind"], here["ram_bytes"]) == (1, "rehearsal", kept.measured.ram_bytes)
    for command, shown in ((asked, True), ([*asked, "--no-ledger"], False)):
        assert planner.main(command) == 0
        assert ("measured here:" in capsys.readouterr().out) is shown
    assert planner.main(["check", str(tiny), *job]) == 0
    assert "Measured here" in capsys.readouterr().out
    for name, more in (("a", []), ("b", []), ("c", ["--no-ledger"])):
        assert planner.main(["plan", str(tiny), *job, "-o", str(folder / name), *more]) == 0
    plans = [json.loads((folder / name).read_text()) for name in "abc"]
    assert plans[0]["ledger_hash"] == plans[1]["ledger_hash"] is not None and plans[2]["ledger_hash"] is None
    assert plans[0]["candidates"][0]["estimate"]["measured_here"]["runs"] == 1
    assert "measured here:" in capsys.readouterr().out


@pytest.mark.executor
def test_a_smaller_batch_than_planned_is_remembered_as_what_it_was(tmp_path: Path, tiny: Path) -> None:
    work = Workload(prompt_tokens=48, new_tokens=4, batch_size=2, concurrency=2)
    plan = make_plan(tmp_path / "plan.json", tiny, work, strategy(dtype="fp32"))
    for name, prompts in (("one", 1), ("all", 4)):
        asked = ["run", plan, *(["--prompt", "x"] * prompts), "--greedy", "--output", tmp_path / name]
        assert cli.main([str(argument) for argument in asked]) == 0
    one, whole = entries()
    assert one.workload == replace(whole.workload, batch_size=1, concurrency=1)
    assert one.predicted == Figures() and one.measured.decode_tokens_per_s
    assert whole.workload == normal(work) and whole.predicted.ram_bytes == 10**9


@pytest.mark.executor
def test_a_ledger_that_cannot_be_written_does_not_fail_the_run(
    tmp_path: Path, tiny: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FITWRIGHT_HOME", str(tmp_path / "file" / "below"))
    work = Workload(prompt_tokens=8, new_tokens=2)
    plan = make_plan(tmp_path / "plan.json", tiny, work, strategy(dtype="fp32"))
    assert cli.main(["rehearse", str(plan), "--output", str(tmp_path / "o")]) == 0
    assert "was not added to" in capsys.readouterr().err
