"""The estimator held to what a card measured: every committed result of `benchmarks/*/results.jsonl`.

The plans beside the results hold the predictions made before measuring; here today's estimator answers again.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from statistics import median

import pytest

from planner.estimate import estimate
from planner.plan import read_plan
from profiles.catalogue import load_model

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
RESULTS = [
    (path.parent / row["plan"], row)
    for path in sorted(FOLDER.glob("*/results.jsonl"))
    for row in map(json.loads, path.read_text().splitlines())
    if "measured" in row
]
WORST = 0.01
MEDIAN = 0.002


def today(path: Path):
    plan = read_plan(path)
    return estimate(load_model(plan.model.id), plan.machine, plan.workload, plan.candidates[0].strategy).gpus[
        0
    ]


@pytest.mark.parametrize(("path", "row"), RESULTS, ids=[f"{p.parent.name}/{p.name}" for p, _ in RESULTS])
def test_allocated_peak_and_load_as_measured(path, row):
    card, measured = today(path), row["measured"]
    assert abs(card.allocated_peak_bytes / measured["allocated_peak_bytes"] - 1) <= WORST
    assert abs(card.load_bytes / measured["load_bytes"] - 1) <= WORST
    assert card.managed_bytes == measured["managed_bytes"]


def test_median_of_all_results():
    errors = [
        abs(today(path).allocated_peak_bytes / row["measured"]["allocated_peak_bytes"] - 1)
        for path, row in RESULTS
    ]
    assert len(errors) >= 25
    assert median(errors) <= MEDIAN


def test_predictions_were_made_for_these_very_plans():
    for path, row in RESULTS:
        assert read_plan(path).digest == row["plan_digest"]


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a shell")
def test_script_of_the_streaming_plans_makes_each_of_them():
    folder = FOLDER / "streaming"
    script = folder / "make_plans.sh"
    assert subprocess.run(["sh", "-n", script]).returncode == 0
    made = [line.split()[1] for line in script.read_text().splitlines() if line.startswith("make_plan ")]
    assert sorted(made) == sorted(path.name.split(".plan")[0] for path in folder.glob("*.plan.json"))
