"""The estimator held to its targets on the half of the measured cells that nothing was fitted on."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from benchmarks.accuracy.cells import RESULTS
from benchmarks.accuracy.report import halves, outcomes
from benchmarks.accuracy.score import score, targets

if not RESULTS.exists():
    pytest.skip("benchmarks/accuracy has no results.jsonl yet: nothing is measured", allow_module_level=True)

FOUND = outcomes()
JUDGED = halves(FOUND)["judge"]
NAMES = [target.name for target in targets(score([]))]


NOT_YET: dict[str, float] = {}
"""Targets that are missed, with what they keep until then: benchmarks/accuracy/README.md says why."""


@pytest.mark.parametrize("name", NAMES)
def test_target_is_met(name):
    target = next(target for target in targets(JUDGED) if target.name == name)
    if name in NOT_YET:
        assert not target.met, f"{name} is met now: take it off the list"
        target = replace(target, bound=NOT_YET[name])
    assert target.met, f"{target.name} is {target.value}, has to be {target.bound}"


@pytest.mark.parametrize("half", ["fit", "judge"])
def test_both_halves_keep_their_intervals(half):
    score_of_half = halves(FOUND)[half]
    assert score_of_half["interval"]["coverage"] >= 0.9
    assert score_of_half["interval"]["width_p50"] <= 0.06
    assert score_of_half["verdicts"]["fails"]["fits"] == 0


def test_enough_was_measured():
    assert len(FOUND) >= 200
    assert len({outcome.architecture for outcome in FOUND}) >= 20


def test_architectures_without_a_model_in_the_catalogue_stay_in_the_bounds():
    assert len(halves(FOUND)["all"]["strangers"]) >= 5
