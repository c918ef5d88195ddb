"""The accuracy score can fail: each target is met by a right prediction and missed by a wrong one."""

from __future__ import annotations

import pytest
from accuracy_fakes import cell, measured, outcome, prediction
from msgspec.structs import replace

from benchmarks.accuracy.score import Outcome, score, spread, targets
from planner.units import GIB

SPEEDLESS = {"decode_tokens_per_s, median", "decode_tokens_per_s, P95"}
"""Nothing generates among these cells."""


def missed(outcomes):
    return {target.name for target in targets(score(outcomes)) if not target.met}


def test_right_predictions_meet_every_target():
    right = [outcome(n, allocated=40 * GIB + n * 2**20, timed=True) for n in range(1000, 1010)]
    assert missed(right) == SPEEDLESS


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"off": 0.008}, {"allocated peak, median"}),
        ({"off": 0.03}, {"allocated peak, median", "allocated peak, P95", "process, median"}),
        ({"off": -0.06}, {"allocated peak, worst", "process, worst under", "verdicts: false fits"}),
        ({"width": 0.09}, {"90 % interval: median width"}),
        ({"off": 0.2}, {"verdicts: false does_not_fit near the need", "90 % interval: coverage"}),
        ({"width": 0.4}, {"verdicts: share of tight"}),
    ],
)
def test_wrong_predictions_miss_their_targets(changes, names):
    wrong = [outcome(n, allocated=40 * GIB, timed=True, **changes) for n in range(1000, 1004)]
    assert names <= missed(wrong)


def test_a_refused_cell_is_an_error_of_100_percent():
    item = cell()
    refused = Outcome(item, {"id": item.id, "refused": "no"}, measured(item))
    unknown = Outcome(item, {**prediction(item), "unknown": True}, measured(item))
    for each in (refused, unknown):
        tiers = score([each])["tiers"]
        assert tiers["allocated"]["worst"] == tiers["process"]["worst"] == 1.0
        assert score([each])["interval"]["coverage"] == 0.0
        assert each.verdict(141 * GIB) == "unknown"


def test_inside_the_measured_bracket_there_is_no_process_error():
    assert outcome().process_error == 0.0
    assert outcome(off=0.01).process_error == pytest.approx(0.0094, abs=1e-3)
    assert outcome(off=-0.02).process_error == pytest.approx(-0.0141, abs=1e-3)


def test_nothing_measured_meets_no_target():
    assert all(not target.met for target in targets(score([])))


def test_a_cell_that_lost_its_cap_still_counts_for_what_it_has():
    item = cell()
    row = {**measured(item), "caps": {"stock": {"error": "still out of memory"}}, "status": "timeout"}
    found = score([Outcome(item, prediction(item), row)])
    assert found["tiers"]["process"] is None and found["interval"] is None
    assert found["tiers"]["allocated"]["p50"] == 0.0


def test_offloaded_cells_are_judged_by_bytes_and_not_by_budgets():
    """For another card their layers would be placed otherwise."""
    found = outcome(off=-0.06)
    away = replace(found, cell=replace(found.cell, vram_gib=9))
    assert sum(score([away])["verdicts"]["runs"].values()) == 0
    assert score([away])["tiers"]["process"]["worst"] > 0.04


def test_spread_is_by_nearest_rank_and_keeps_signs():
    row = spread([-0.1, *[0.01] * 18, 0.02])
    assert row == {"cells": 20, "p50": 0.01, "p95": 0.02, "worst": 0.1, "lowest": -0.1, "highest": 0.02}
