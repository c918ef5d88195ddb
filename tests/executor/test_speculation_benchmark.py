"""The program that measures speculation with chosen shares of right drafts does what it says."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from conftest import make_plan, strategy

from planner.types import Workload

pytestmark = pytest.mark.executor
PROGRAM = Path(__file__).parents[2] / "benchmarks" / "streaming" / "speculation.py"


def test_shares_of_right_drafts_are_those_asked_for(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import executor.attempt

    monkeypatch.setattr(executor.attempt, "generate", executor.attempt.generate)  # put back afterwards
    spec = importlib.util.spec_from_file_location("speculation_benchmark", PROGRAM)
    assert spec is not None and spec.loader is not None
    program: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    job = Workload(prompt_tokens=16, new_tokens=8)
    plan = make_plan(tmp_path / "plan.json", tiny, job, strategy(quant="nf4", speculate="lookup"))
    results = tmp_path / "results.jsonl"
    arguments = ["speculation.py", str(plan), "--new-tokens", "60", "--results", str(results)]
    monkeypatch.setattr("sys.argv", arguments)
    assert program.main() == 0
    row = json.loads(results.read_text())
    assert sorted(map(int, row["pass_seconds"])) == list(program.LENGTHS)
    assert row["pass_64_over_1"] == row["pass_seconds"]["64"] / row["pass_seconds"]["1"]
    none, half, most = (row["forced"][str(share)] for share in program.SHARES)
    assert none["accepted"] == 0 and none["passes"] == 59
    assert 1.5 < half["tokens_per_pass"] < 2.5 < most["tokens_per_pass"]
    assert all(each["times_plain"] > 0 for each in (none, half, most))
