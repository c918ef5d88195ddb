"""The estimator held to what streamed generations and trainings took on a card: memory with the residency
they had, speed with that of the plan."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from planner.estimate import _card, _memory
from planner.machine import machine_from_gpus
from planner.memory.streamed import parts_of, streamed_memory
from planner.passes import train_seconds
from planner.placement import Tiers
from planner.plan import read_plan
from planner.rates import card_rates
from planner.seconds import Seconds
from planner.speed import _job
from planner.types import GpuEstimate
from profiles.architecture import architecture
from profiles.hardware import load_gpu

FOLDER = Path(__file__).parents[2] / "benchmarks" / "streaming"
MIB = 2**20
PAGE = 20 * MIB
"""Of an expandable segment."""
FINISHED = [
    row
    for row in map(json.loads, (FOLDER / "results.jsonl").read_text().splitlines())
    if row["exit_code"] == 0
]
MEASURED = [row for row in FINISHED if "superseded" not in row]
STREAMED = [
    row for row in MEASURED if row["report"]["engine"] == "stream" and row["report"]["layers_streamed"]
]
GENERATIONS = [row for row in STREAMED if row["report"]["train_tokens_per_s"] is None]
TRAININGS = [row for row in STREAMED if row not in GENERATIONS]


def ids(rows: list[dict[str, Any]]) -> list[str]:
    """Plans, numbered where one was measured again."""
    return [f"{row['plan'].split('.plan')[0]}-{number}" for number, row in enumerate(rows)]


def today(row: dict[str, Any], **changed: Any) -> GpuEstimate:
    """What is said now of the job of a row, its layers where they were. `changed`: of the plan's strategy."""
    plan, report = read_plan(FOLDER / row["plan"]), row["report"]
    how, arch = replace(plan.candidates[0].strategy, **changed), architecture(plan.model.config)
    kept = next((note for note in report["notes"] if note.startswith("kept in RAM: ")), "")
    tiers = Tiers(report["layers_resident"], 0, "embed_tokens" in kept, "lm_head" in kept)
    gpu = machine_from_gpus([(load_gpu("h200"), 1)]).gpus[0]
    memory = streamed_memory(_memory(arch, plan.workload, how, gpu), parts_of(arch, how), tiers)
    return _card(gpu, memory, arch, plan.workload, how)


def has_filled_its_cap(row: dict[str, Any]) -> bool:
    """The allocator keeps memory until it may hold no more: such a run tells nothing of its need."""
    report = row["report"]
    cap = int(re.search(r"--vram-cap (\d+)MiB", row["command"])[1]) * MIB  # type: ignore[index]
    left = cap - report["reserved_peak_bytes"] - report["context_bytes"] - report["managed_bytes"]
    return left < 2 * PAGE


@pytest.mark.parametrize("row", GENERATIONS, ids=ids(GENERATIONS))
def test_a_streamed_generation_takes_what_is_said(row: dict[str, Any]) -> None:
    card, report = today(row), row["report"]
    assert card.context_bytes == report["context_bytes"]
    assert abs(card.allocated_peak_bytes / report["allocated_peak_bytes"] - 1) <= 0.005
    assert abs(card.moments["load"] / report["moments"]["load"] - 1) <= 0.01


def test_generations_need_what_was_reserved() -> None:
    errors = [
        abs(today(row).required_bytes / row["report"]["reserved_peak_bytes"] - 1)
        for row in GENERATIONS
        if not has_filled_its_cap(row)
    ]
    assert len(errors) >= 10 and max(errors) <= 0.02


@pytest.mark.parametrize("row", TRAININGS, ids=ids(TRAININGS))
def test_a_streamed_training_takes_what_is_said(row: dict[str, Any]) -> None:
    card, report = today(row), row["report"]
    assert abs(card.context_bytes / report["context_bytes"] - 1) <= 0.013
    assert abs(card.allocated_peak_bytes / report["allocated_peak_bytes"] - 1) <= 0.016
    assert card.managed_bytes == report["managed_bytes"]
    for moment in ("load", "forward", "optimizer_step"):
        assert abs(card.moments[moment] / report["moments"][moment] - 1) <= 0.022, moment
    assert 0 <= card.moments["loss"] / report["moments"]["loss"] - 1 <= 0.045  # never the peak; not explained


def test_trainings_need_what_was_reserved() -> None:
    errors = [
        today(row).required_bytes / row["report"]["reserved_peak_bytes"] - 1
        for row in TRAININGS
        if not has_filled_its_cap(row)
    ]
    assert len(errors) >= 5 and max(map(abs, errors)) <= 0.025


CAPS = list(map(json.loads, (FOLDER / "caps.jsonl").read_text().splitlines()))


@pytest.mark.parametrize(
    "cap", [row for row in CAPS if row["exit_code"]], ids=lambda row: row["command"][-7:]
)
def test_caps_under_which_a_training_ran_out_are_called_too_small(cap: dict[str, Any]) -> None:
    (row,) = (row for row in TRAININGS if row["plan_digest"] == cap["plan_digest"])
    card, tried = today(row), int(re.search(r"--vram-cap (\d+)MiB", cap["command"])[1]) * MIB  # type: ignore[index]
    assert tried < card.required_bytes + row["report"]["context_bytes"] + card.managed_bytes + PAGE


def test_checkpoints_on_the_card_leave_more_idle() -> None:
    """The 7B, no layer resident, ran out of memory under 2.5 GiB in one of two runs."""
    (row,) = (row for row in FINISHED if row["plan"].startswith("qwen7b-q") and "superseded" in row)
    assert row["report"]["layers_resident"] == 0
    there, away = (today(row, activation_offload=each) for each in (False, True))
    room = there.required_bytes - there.allocated_peak_bytes, away.required_bytes - away.allocated_peak_bytes
    assert room[0] - room[1] == 28 * 2 * MIB
    assert there.high_bytes - there.process_bytes > away.high_bytes - away.process_bytes + 28 * 8 * MIB


def step_of(name: str) -> Seconds:
    """A training step as it is reckoned now, for the residency of the plan `name`."""
    plan = read_plan(FOLDER / name)
    how, places = plan.candidates[0].strategy, plan.candidates[0].estimate.placement
    job = _job(architecture(plan.model.config), False, 0, plan.workload, how, places)
    found = train_seconds(job, card_rates(plan.machine, how.dtype, "typical"), "typical")
    assert found is not None
    return found


MISSED = {"qwen7b-qlora-2.5gib.plan.json": 0.13}
"""Plans of which a larger error is known, and what it may not pass."""


def fastest() -> dict[str, float]:
    """Tokens/s of each plan's best run: what else its host does can only make a run slower (the same resident
    8B ran at 3245 to 5411 in four calls). Superseded runs count where a plan has no other."""
    found: dict[str, dict[str, Any]] = {}
    for row in (*MEASURED, *FINISHED):
        speed = row["report"]["train_tokens_per_s"]
        if speed is None or (row["plan"] in found and "superseded" in row):
            continue
        before = found.setdefault(row["plan"], row)
        if speed > before["report"]["train_tokens_per_s"]:
            found[row["plan"]] = row
    return {name: row["report"]["train_tokens_per_s"] for name, row in found.items()}


def test_trainings_run_as_fast_as_is_said() -> None:
    """Resident and streamed, at the residency the plans have now; plans and the estimator say the same."""
    errors = {}
    for name, measured in fastest().items():
        plan = read_plan(FOLDER / name)
        speed = plan.candidates[0].speed.train_tokens_per_s
        assert speed is not None and speed.low < measured < speed.high
        tokens = plan.workload.batch_size * plan.workload.seq_len / step_of(name).total
        assert speed.typical == pytest.approx(tokens, rel=1e-3), "make_plans.sh makes them anew"
        errors[name] = abs(measured / tokens - 1)
    assert len(errors) == 11
    assert all(error <= MISSED.get(name, 0.07) for name, error in errors.items()), errors


@pytest.mark.parametrize("name", ["llama8b-qlora", "qwen14b-lora"])
def test_the_chunked_loss_takes_most_of_what_was_measured(name: str) -> None:
    """Beside large products it has small ones, so it is slower than what is counted, never much faster."""
    phases = map(json.loads, (FOLDER / "phases.jsonl").read_text().splitlines())
    # where the output projection comes in blocks, the loss waits for it: that of the resident run counts
    alone = [row for row in phases if row["plan"].startswith(f"{name}-{'resident' if '8b' in name else ''}")]
    (streamed,) = (path.name for path in FOLDER.glob(f"{name}-*gib.plan.json") if "resident" not in path.name)
    _, (loss, _), _ = step_of(streamed).parts
    assert len(alone) == 2
    for row in alone:
        assert 0.6 < 1000 * loss / row["card_ms"]["loss"] < 1.05


def test_streamed_layers_cost_the_host() -> None:
    """Between what two calls measured beside resident, 0.9 and 5.4 ms a layer, the lower one."""
    plan = read_plan(FOLDER / "llama8b-qlora-2.5gib.plan.json")
    layers = plan.candidates[0].estimate.placement.layers_in_ram
    more = (
        step_of("llama8b-qlora-2.5gib.plan.json").launch - step_of("llama8b-qlora-resident.plan.json").launch
    )
    assert layers == 29 and 0.0008 < more / layers < 0.0054
