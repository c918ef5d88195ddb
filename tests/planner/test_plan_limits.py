"""The most that fits, the smallest cards, the models of a machine, and what training costs."""

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from plan_fakes import LLAMA_70B, QWEN_7B, QWEN_14B, card, estimate, needed_bytes, no_card, profile

from planner.energy import training_cost
from planner.limits import largest, limits
from planner.machine import budget
from planner.reverse import models_for, smallest_cards
from planner.types import Range, Speed, Strategy, Workload
from profiles.catalogue import all_models, load_model
from profiles.hardware import all_gpus, load_gpu

MODEL = profile(QWEN_7B)
NF4 = Strategy(quant="nf4")


@given(
    answer=st.integers(0, 10**6),
    most=st.integers(1, 10**6),
    shape=st.sampled_from(["line", "steps", "cliff", "curve"]),
)
def test_the_last_that_fits_is_found_whatever_the_shape_of_memory(answer, most, shape):
    calls = []

    def left(n):
        calls.append(n)
        slack = answer - n
        return {
            "line": slack * 1000,
            "steps": slack // 1000,
            "cliff": 0 if slack >= 0 else -1,
            "curve": answer**2 - n**2,
        }[shape]

    found = largest(left, 1, most, 1)
    assert found == (None if answer < 1 else min(answer, most))
    assert len(calls) <= 70 and all(1 <= n <= most for n in calls)


def counted(calls):
    def ask(*arguments):
        calls.append(arguments)
        return estimate(*arguments)

    return ask


@pytest.mark.parametrize("workload", [Workload(), Workload(task="train", method="qlora")])
def test_limits_fit_and_one_more_does_not(workload):
    machine, calls = card("rtx-3060-12gb"), []
    most = limits(MODEL, machine, workload, NF4, counted(calls))
    assert len(calls) <= 60

    def fits(job):
        return estimate(MODEL, machine, job, NF4).verdict == "fits"

    assert fits(replace(workload, batch_size=most.batch_size))
    assert not fits(replace(workload, batch_size=most.batch_size + 1))
    name, extra = ("seq_len", 0) if workload.task == "train" else ("prompt_tokens", workload.new_tokens)
    assert fits(replace(workload, **{name: most.context_tokens - extra}))
    assert not fits(replace(workload, **{name: most.context_tokens - extra + 128}))
    assert most.context_tokens % 64 == 0 and not most.context_capped


def test_limits_end_where_the_model_does():
    short = replace(MODEL, context_tokens=4096)
    most = limits(short, card("h200"), Workload(), NF4, estimate)
    assert most.context_tokens == 4096 and most.context_capped


def test_no_limits_where_nothing_fits():
    most = limits(profile(LLAMA_70B), card("rtx-3060-12gb"), Workload(), Strategy(), estimate)
    assert (most.context_tokens, most.batch_size, most.context_capped) == (None, None, False)


def test_the_smallest_cards_carry_the_job_and_no_smaller_card_does():
    nvidia = [gpu for gpu in all_gpus() if gpu.vendor == "nvidia"]
    workload = Workload()
    found = smallest_cards(MODEL, workload, nvidia, pinned={"quant": "none"}, count=3, estimator=estimate)
    assert len(found) == 3
    sizes = [each.gpu.memory_bytes for each in found]
    assert sizes == sorted(sizes)
    for each in found:
        assert each.estimate.verdict == "fits" and each.strategy.quant == "none"
    for gpu in nvidia:
        if gpu.memory_bytes < sizes[0]:
            strategy = replace(found[0].strategy, dtype="bf16")
            high = needed_bytes(MODEL, workload, strategy) * 105 // 100
            assert high > budget(card(gpu.id).gpus[0])[0] or gpu.memory_bytes == sizes[0]


def test_of_cards_of_one_size_the_cheaper_comes_first_and_an_unknown_price_last():
    base = replace(load_gpu("rtx-3090"), launch_price_usd=None)
    dear, cheap = (
        replace(base, id="dear", launch_price_usd=900),
        replace(base, id="cheap", launch_price_usd=300),
    )
    found = smallest_cards(MODEL, Workload(), [dear, base, cheap], estimator=estimate)
    assert [each.gpu.id for each in found] == ["cheap", "dear", base.id]


def test_models_for_a_card_are_best_first():
    models = [profile(QWEN_7B, "seven"), profile(QWEN_14B, "fourteen"), profile(LLAMA_70B, "seventy")]
    found = models_for(card("rtx-3090"), Workload(), models, estimator=estimate)
    assert [each.model.id for each in found] == ["fourteen", "seven"]
    # The largest model that is usable comes first, in the weights that lose least of those that fit.
    assert [each.strategy.quant for each in found] == ["int8", "none"]
    assert all(each.usable for each in found)
    assert models_for(no_card(8), Workload(), models[2:], estimator=estimate) == []


def test_the_whole_catalogue_is_answered_in_two_seconds():
    models = all_models()
    start = time.perf_counter()
    for workload in (Workload(), Workload(task="train")):
        found = models_for(card("rtx-3060-12gb"), workload, models)
        assert found and len({each.model.id for each in found}) == len(found)
        assert all(each.estimate.verdict in ("fits", "tight") for each in found)
    assert time.perf_counter() - start < 4


def test_hours_and_energy_of_a_training_run():
    machine = card("rtx-3090")
    speed = Speed(train_tokens_per_s=Range(500, 1000, 2000))
    cost = training_cost(machine, Workload(task="train", train_tokens=3_600_000), NF4, speed)
    assert (cost.hours.low, cost.hours.typical, cost.hours.high) == (0.5, 1.0, 2.0)
    assert cost.watts == machine.gpus[0].profile.power_watts == 350
    assert math.isclose(cost.kwh.typical, 0.35) and math.isclose(cost.kwh.high, 0.7)
    limited = replace(machine, gpus=(replace(machine.gpus[0], power_limit_watts=200),))
    assert training_cost(limited, Workload(task="train", train_tokens=10), NF4, speed).watts == 200
    assert training_cost(machine, Workload(task="train"), NF4, speed) is None
    assert training_cost(machine, Workload(task="train", train_tokens=1), NF4, Speed()) is None
    cpu = training_cost(no_card(), Workload(task="train", train_tokens=10), Strategy(placement="cpu"), speed)
    assert cpu.kwh is None and cpu.hours.typical > 0


def test_an_encoder_that_is_quantized_with_the_rest_does_not_rule_a_model_out():
    found = models_for(card("rtx-3060-12gb"), Workload(), [load_model("glm-4v-9b")])
    assert [fit.model.id for fit in found] == ["glm-4v-9b"]
