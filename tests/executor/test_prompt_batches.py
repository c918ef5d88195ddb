"""Prompts into batches: by length, and as many as need no more memory than was planned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_plan, strategy
from hypothesis import given
from hypothesis import strategies as st

from executor.prompt_batches import largest_batch, schedule
from planner.memory.infer import inference_memory
from planner.types import Strategy, Workload
from profiles.architecture import loaded_architecture
from profiles.catalogue import load_model

FACTS = load_model("llama-3.1-8b").config
PLANNED = Workload(prompt_tokens=1024, new_tokens=256, batch_size=4)


def largest(prompt: int, new: int = 256, work: Workload = PLANNED, **how: Any) -> int:
    return largest_batch(FACTS, work, Strategy(**how), prompt, new)


@given(st.lists(st.integers(1, 99), min_size=1, max_size=40), st.integers(1, 200))
def test_every_prompt_once_and_none_longer_than_the_batch_was_made_for(tokens: list[int], room: int) -> None:
    batches = schedule(tokens, lambda longest: max(1, room // longest))
    assert sorted(number for batch in batches for number in batch) == list(range(len(tokens)))
    lengths = [[tokens[number] for number in batch] for batch in batches]
    assert [n for batch in lengths for n in batch] == sorted(tokens, reverse=True)
    assert all(len(batch) <= max(1, room // batch[0]) for batch in lengths)


def test_prompts_of_equal_length_keep_their_order() -> None:
    assert schedule([3, 3, 3, 3], lambda _: 3) == [[0, 1, 2], [3]]


def test_a_batch_needs_what_was_planned_and_no_more() -> None:
    assert largest(1024) == 4
    short, long = largest(100), largest(4000)
    assert short > 8 and 1 <= long < 4 and largest(10**5) == 1
    arch = loaded_architecture(FACTS)
    needs = [
        inference_memory(arch, Workload(prompt_tokens=100, batch_size=size), Strategy(), 0).peak.bytes
        for size in (short, short + 1)
    ]
    planned = inference_memory(arch, PLANNED, Strategy(), 0).peak.bytes
    assert needs[0] <= planned < needs[1]


@pytest.mark.parametrize("cache", ["offloaded", "quantized", "static"])
def test_other_caches_are_estimated_as_such(cache: Any) -> None:
    assert largest(1024, cache=cache) == 4 and largest(64, cache=cache) > 4


def test_facts_of_no_architecture_keep_the_planned_size() -> None:
    assert largest_batch({"model_type": "no-such"}, PLANNED, Strategy(), 5, 5) == 4


@pytest.mark.executor
def test_answers_stand_in_the_order_asked(tmp_path: Path, tiny: Path) -> None:
    pytest.importorskip("torch")
    from executor.cli import main

    prompts = ["x" * length for length in (3, 40, 9, 60, 2, 33)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    plans = {
        name: make_plan(
            tmp_path / name, tiny, Workload(prompt_tokens=planned, new_tokens=6), strategy(dtype="fp32")
        )
        for name, planned in (("alone", 8), ("together", 512))
    }
    rows, reports = {}, {}
    for name, plan in plans.items():
        output = tmp_path / f"o-{name}"
        assert main(["run", *map(str, (plan, "--prompts", file, "--greedy", "--output", output))]) == 0
        rows[name] = [json.loads(line) for line in (output / "outputs.jsonl").read_text().splitlines()]
        reports[name] = json.loads((output / "report.json").read_text())
    assert [row["prompt"] for row in rows["together"]] == prompts
    assert rows["together"] == rows["alone"]
    assert reports["alone"]["workload"]["batch_size"] == 1 < reports["together"]["workload"]["batch_size"]
    assert any("prompts at once, shorter than planned" in note for note in reports["together"]["notes"])


@pytest.mark.executor
def test_a_broken_off_run_goes_on_in_its_own_order(tmp_path: Path, tiny: Path) -> None:
    """Batches of the longest prompts first; what was kept is in that order, too."""
    pytest.importorskip("torch")
    from executor.cli import main

    job = Workload(prompt_tokens=40, new_tokens=6, batch_size=2)
    plan = make_plan(tmp_path / "plan.json", tiny, job, strategy())
    flags = [part for size in (3, 30, 9, 31, 10) for part in ("--prompt", "y" * size)]
    command = ["run", str(plan), *flags, "--temperature", "1.3", "--output", str(tmp_path / "o")]
    assert main(command) == 0
    whole = (tmp_path / "o" / "outputs.jsonl").read_text()
    by_index = whole.splitlines(keepends=True)
    (tmp_path / "o" / "outputs.partial.jsonl").write_text(by_index[3] + by_index[1] + by_index[4])
    for name in ("outputs.jsonl", "report.json"):
        (tmp_path / "o" / name).unlink()
    assert main(command) == 0
    assert (tmp_path / "o" / "outputs.jsonl").read_text() == whole
