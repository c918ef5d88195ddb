"""The estimator against 52 measured runs, and the report's own arithmetic against runs made up by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.calibration import report
from planner.types import GpuEstimate, Strategy, Workload
from planner.units import GIB

ENVIRONMENT, RUNS = report.read_runs()


@pytest.fixture(scope="module")
def outcomes() -> list[report.Outcome]:
    return report.predict(RUNS, ENVIRONMENT["gpu"])


@pytest.fixture(scope="module")
def result(outcomes: list[report.Outcome]) -> dict:
    return report.score(outcomes)


def test_every_measured_run_is_there() -> None:
    assert len(RUNS) == 52
    assert {run.model for run in RUNS} == {path.stem for path in (report.HERE / "configs").glob("*.json")}


def test_loaded_weights(result: dict) -> None:
    assert result["tiers"]["load"]["p50"] <= 0.001
    # NF4 leaves small remainders of 20 MiB segments unsplit, which nothing here counts
    assert result["tiers"]["load"]["worst"] <= 0.01


def test_allocated_peak(result: dict) -> None:
    assert result["tiers"]["allocated"]["p50"] <= 0.002
    assert result["tiers"]["allocated"]["worst"] <= 0.01


def test_process_bytes_outside_the_measured_bracket(result: dict) -> None:
    assert result["tiers"]["process"]["p50"] <= 0.01
    assert result["tiers"]["process"]["p95"] <= 0.06


def test_no_false_fits(result: dict) -> None:
    assert result["verdicts"]["fails"]["fits"] == 0


def test_no_false_alarms(result: dict) -> None:
    assert result["verdicts"]["runs"]["does_not_fit"] == 0


def test_intervals_meet_what_was_measured_and_say_something(result: dict) -> None:
    assert result["interval"]["coverage"] >= 0.9
    assert result["interval"]["width_p50"] <= 0.10  # a very wide interval would cover everything


def test_every_group_is_within_one_percent(result: dict) -> None:
    assert {
        name: row["allocated"]["worst"] <= 0.01 for name, row in result["groups"].items()
    } == dict.fromkeys(result["groups"], True)


def test_trainable_parameters_are_those_peft_counted(outcomes: list[report.Outcome]) -> None:
    from planner.estimate import architecture_of
    from planner.memory.adapters import adapter_parameters
    from profiles.arithmetic import parameter_count

    checked = 0
    for outcome in outcomes:
        run = outcome.run
        if run.measured.trainable_parameters is None:
            continue
        arch = architecture_of(report.read_model(report.HERE / "configs" / f"{run.model}.json"))
        full = run.workload.method == "full"
        counted = parameter_count(arch) if full else adapter_parameters(arch, run.workload)
        assert counted == run.measured.trainable_parameters, run.model
        checked += 1
    assert checked == 39


# --------------------------------------------------------------------------- the report itself


def run_of(allocated: int, failed: float, worked: float, load_peak: int = 0) -> report.Run:
    measured = report.Measured(
        load_bytes=allocated // 2,
        load_peak_bytes=load_peak,
        allocated_peak_bytes=allocated,
        reserved_peak_bytes=allocated,
        process_peak_bytes=allocated + GIB,
        context_bytes=GIB,
        cap_failed_factor=failed,
        cap_worked_factor=worked,
    )
    return report.Run("m", Workload(task="infer"), Strategy(), measured)


def outcome_of(run: report.Run, process: int, low: int, high: int) -> report.Outcome:
    predicted = GpuEstimate(
        index=0, budget_bytes=None, budget_basis="", load_bytes=run.measured.load_bytes,
        allocated_peak_bytes=run.measured.allocated_peak_bytes, required_bytes=process - GIB,
        context_bytes=GIB, process_bytes=process, low_bytes=low, high_bytes=high, managed_bytes=0,
        peak_moment="prefill", components=(),
    )  # fmt: skip
    return report.Outcome(run, predicted)


def test_need_is_the_bracket_of_caps_with_the_context_on_top() -> None:
    assert run_of(10 * GIB, 1.0, 1.2).measured.need == (11 * GIB, 13 * GIB)
    # loading that peaks higher than the run decides both ends
    assert run_of(10 * GIB, 1.0, 1.2, load_peak=20 * GIB).measured.need == (21 * GIB, 21 * GIB)


@pytest.mark.parametrize(
    ("process", "error"), [(11, 0.0), (12, 0.0), (13, 0.0), (26, 1.0), (5.5, -0.5)], ids=str
)
def test_process_error_counts_from_the_nearer_end_of_the_bracket(process: float, error: float) -> None:
    bytes_ = int(process * GIB)
    assert outcome_of(run_of(10 * GIB, 1.0, 1.2), bytes_, bytes_, bytes_).process_error == pytest.approx(
        error
    )


def test_verdicts_are_counted_outside_the_bracket_only() -> None:
    # the need lies between 11 and 13 GiB, the predicted interval is 10 to 12 GiB
    outcome = outcome_of(run_of(10 * GIB, 1.0, 1.2), 11 * GIB, 10 * GIB, 12 * GIB)
    table = report.confusion([outcome])
    assert table["fails"] == {"fits": 0, "tight": 1, "does_not_fit": 3}  # 4, 6, 8 and 10 GiB
    assert table["runs"] == {"fits": 9, "tight": 0, "does_not_fit": 0}  # 16 to 141 GiB; 11 and 12 are unknown
    assert table["runs_near"] == {"fits": 1, "tight": 0, "does_not_fit": 0}  # 16 GiB < 1.25 x 13


def test_a_false_fit_is_found() -> None:
    outcome = outcome_of(run_of(10 * GIB, 1.0, 1.2), 7 * GIB, 6 * GIB, 8 * GIB)
    assert report.confusion([outcome])["fails"]["fits"] == 2  # 8 and 10 GiB
    assert not outcome.covered


def test_spread_keeps_signs_apart_from_sizes() -> None:
    errors = [0.01] * 18 + [-0.5, 0.2]
    assert report.spread(errors) == {
        "runs": 20, "p50": 0.01, "p95": 0.2, "worst": 0.5, "lowest": -0.5, "highest": 0.2,
    }  # fmt: skip


def test_the_program_prints_json_and_a_table(tmp_path: Path) -> None:
    program = [sys.executable, "benchmarks/calibration/report.py"]
    few = tmp_path / "few.jsonl"
    few.write_bytes(b"\n".join((report.HERE / "runs.jsonl").read_bytes().splitlines()[:3]))
    root = Path(report.__file__).parents[2]
    told = subprocess.run(
        [*program, "--json", "--runs", few], cwd=root, capture_output=True, text=True, check=True
    )
    assert json.loads(told.stdout)["tiers"]["allocated"]["runs"] == 2
    shown = subprocess.run([*program, "--runs", few], cwd=root, capture_output=True, text=True, check=True)
    assert "Signed errors" in shown.stdout and "torch 2.11.0+cu130" in shown.stdout
