"""How long estimates take in process: processor time, so that a busy machine does not decide. Bounds are
about five times what a quiet core takes, which is named beside each."""

from __future__ import annotations

import time

import pytest
from msgspec.structs import replace

from planner.estimate import estimate, floor
from planner.limits import limits
from planner.machine import machine_from_gpus
from planner.memory.steady import steady_holes
from planner.types import Machine, Strategy, Workload
from profiles.catalogue import all_models, load_model
from profiles.hardware import load_gpu

INFER, NF4 = Workload(), Strategy(quant="nf4")
QLORA, FULL = Workload(task="train"), Workload(task="train", method="full")


def one(card: str = "rtx-3090") -> Machine:
    return machine_from_gpus([(load_gpu(card), 1)])


def longer(work: Workload, tokens: int) -> Workload:
    if work.task == "train":
        return replace(work, seq_len=work.seq_len + tokens)
    return replace(work, prompt_tokens=work.prompt_tokens + tokens)


@pytest.mark.parametrize(
    ("name", "work", "how", "seconds"),
    [
        ("qwen2.5-7b", INFER, Strategy(), 0.008),  # 1.4 ms
        ("qwen2.5-7b", QLORA, NF4, 0.025),  # 4.5 ms
        ("qwen2.5-7b", FULL, Strategy(), 0.05),  # 10 ms
        ("llama-3-70b", INFER, Strategy(), 0.03),  # 6 ms
        ("llama-3-70b", FULL, Strategy(), 0.1),  # 20 ms
        ("gpt-oss-20b", QLORA, NF4, 0.035),  # 6.5 ms
    ],
)
def test_a_job_never_seen_is_played_in_milliseconds(
    name: str, work: Workload, how: Strategy, seconds: float
) -> None:
    model, here, best = load_model(name), one(), float("inf")
    estimate(model, here, work, how)
    for i in range(1, 9):
        job = longer(work, 8 * i)
        before, misses = time.process_time(), steady_holes.cache_info().misses
        estimate(model, here, job, how)
        best = min(best, time.process_time() - before)
        assert steady_holes.cache_info().misses == misses + 1, "it was not new"
    assert best < seconds


@pytest.mark.parametrize("name", ["qwen2.5-7b", "llama-3-70b", "gpt-oss-20b"])
@pytest.mark.parametrize(("work", "how"), [(INFER, Strategy()), (QLORA, NF4), (FULL, Strategy())])
def test_a_job_that_was_played_is_estimated_in_a_fraction_of_one(
    name: str, work: Workload, how: Strategy
) -> None:
    """0.06 to 0.2 ms, cards and all."""
    model, machines = load_model(name), [one(card) for card in ("rtx-3090", "a10-24gb", "rtx-3060-12gb")]
    for here in machines:
        estimate(model, here, work, how)
    before = time.process_time()
    for _ in range(20):
        for here in machines:
            estimate(model, here, work, how)
    assert (time.process_time() - before) / 60 < 0.001


@pytest.mark.parametrize(("work", "how", "most"), [(INFER, Strategy(), 14), (QLORA, NF4, 9)])
def test_what_fits_is_found_by_playing_few_runs(work: Workload, how: Strategy, most: int) -> None:
    steady_holes.cache_clear()
    found = limits(load_model("qwen2.5-7b"), one(), replace(work), replace(how))
    assert found.context_tokens and found.batch_size
    assert steady_holes.cache_info().misses <= most


@pytest.mark.parametrize("card", ["rtx-3090", "mi300x"])
def test_no_estimate_falls_below_its_floor(card: str) -> None:
    here = one(card)
    for model in all_models()[::8]:
        for work, how in ((INFER, Strategy()), (QLORA, NF4), (FULL, Strategy())):
            least, found = floor(model, here, work, how), estimate(model, here, work, how).gpus[0]
            assert least is not None
            assert least.low_bytes <= found.low_bytes and least.process_bytes <= found.process_bytes, model.id


def test_there_is_no_floor_of_what_is_not_held_by_one_card() -> None:
    model, two = load_model("qwen2.5-7b"), machine_from_gpus([(load_gpu("rtx-3090"), 2)])
    assert floor(model, two, INFER, Strategy()) is None
    assert floor(model, one(), INFER, Strategy(placement="mixed_offload")) is None
    assert floor(model, one(), INFER, Strategy(placement="mixed_offload", engine="stream")) is None
