"""Recalibration reads the measurements and nothing else: what is committed is what they say."""

from __future__ import annotations

import json

from accuracy_fakes import measured

from benchmarks.accuracy.cells import read_cells
from benchmarks.accuracy.recalibrate import OVERHEADS, contexts, figures, rewritten


def test_the_committed_figures_are_what_the_runs_say():
    facts = json.loads(OVERHEADS.read_text())
    found = figures()
    ram = found.pop("cuda_bytes", facts["process_ram"]["cuda_bytes"])
    measured_facts = facts["context"]["measured"]
    assert {name: measured_facts[name] for name in found} == found
    assert measured_facts["source"].startswith(f"{sum(1 for _ in contexts())} runs, one")
    assert facts["process_ram"]["cuda_bytes"] == ram


def test_only_the_half_that_may_be_fitted_counts(tmp_path):
    results = tmp_path / "results.jsonl"
    cells = [cell for cell in read_cells() if cell.workload.task == "train" and not cell.timed]
    rows = [measured(cell, context_bytes=10**9 if cell.half == "judge" else 7 * 10**8) for cell in cells]
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = figures(results)
    assert found["train_bytes"] == 7 * 10**8
    assert found["high_factor"] < 1.3


def test_the_file_changes_in_its_figures_alone():
    before = OVERHEADS.read_text()
    after = rewritten(before, {"train_bytes": 123456789, "low_factor": 0.9}, 99)
    old, new = json.loads(before), json.loads(after)
    assert new["context"]["measured"]["train_bytes"] == 123456789
    assert new["context"]["measured"]["low_factor"] == 0.9
    assert new["context"]["measured"]["source"].startswith("99 runs, one")
    assert new["context"]["elsewhere"] == old["context"]["elsewhere"]
    assert len(after.splitlines()) == len(before.splitlines())
