"""The order of candidates: the contract's, total, and explained."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from plan_fakes import GEMMA_2_2B, QWEN_7B, card, estimate, no_card, profile

from planner.rank import (
    LEAST_TRAIN_SHARE,
    Field,
    Scored,
    fastest_that_fits,
    footprint,
    headroom,
    quality,
    rank,
    rank_key,
    usable,
)
from planner.reasons import compared, notes, reasons
from planner.strategies import legal_strategies
from planner.types import Range, Speed, Strategy, Workload
from planner.units import GIB
from profiles.architecture import architecture

QWEN = architecture(QWEN_7B)
MODEL = profile(QWEN_7B)
MACHINE = card("rtx-3090", 1, 64, 8)
INFER, TRAIN = Workload(), Workload(task="train", method="lora")
PLAIN_STRATEGY = Strategy()
PLAIN = estimate(MODEL, MACHINE, INFER, PLAIN_STRATEGY)


def scored(strategy=PLAIN_STRATEGY, *, tokens=50.0, verdict="fits", high_gib=12, workload=INFER):
    """A strategy whose estimate has just the figures that decide."""
    speed = None if tokens is None else Range(tokens / 2, tokens, tokens * 2)
    gpu = replace(
        PLAIN.gpus[0], process_bytes=high_gib * GIB, high_bytes=high_gib * GIB, budget_bytes=24 * GIB
    )
    speeds = Speed(decode_tokens_per_s=speed) if workload.task == "infer" else Speed(train_tokens_per_s=speed)
    return Scored(strategy, replace(PLAIN, gpus=(gpu,), speed=speeds, verdict=verdict))


def order(candidates, prefer="quality", workload=INFER):
    ranked = rank(Field(QWEN, MACHINE, workload, prefer), candidates)
    return [each.strategy for each in ranked]


NF4, INT8 = Strategy(quant="nf4"), Strategy(quant="int8")


def test_what_fits_comes_before_what_is_tight_whatever_its_quality():
    assert order([scored(verdict="tight"), scored(NF4)]) == [NF4, Strategy()]


def test_what_is_usable_comes_before_what_is_too_slow():
    assert order([scored(tokens=4.9), scored(NF4, tokens=5.0)]) == [NF4, Strategy()]
    # Being too slow weighs less than not fitting.
    assert order([scored(tokens=1.0), scored(NF4, verdict="tight")]) == [Strategy(), NF4]


def test_training_is_usable_from_a_fifth_of_the_fastest_that_fits():
    fast, slow = scored(NF4, tokens=1000, workload=TRAIN), scored(tokens=199, workload=TRAIN)
    assert order([slow, fast], workload=TRAIN) == [NF4, Strategy()]
    enough = scored(tokens=1000 * LEAST_TRAIN_SHARE, workload=TRAIN)
    assert order([enough, fast], workload=TRAIN) == [Strategy(), NF4]
    assert (
        fastest_that_fits([fast, replace(slow, estimate=replace(slow.estimate, verdict="does_not_fit"))])
        == 1000
    )


def test_quality_speed_and_headroom_each_lead_when_preferred():
    best = scored(tokens=20, high_gib=20)
    fast = scored(NF4, tokens=80, high_gib=16)
    small = scored(INT8, tokens=40, high_gib=8)
    assert order([small, fast, best], "quality") == [Strategy(), INT8, NF4]
    assert order([small, fast, best], "speed") == [NF4, INT8, Strategy()]
    assert order([small, fast, best], "headroom") == [INT8, NF4, Strategy()]


def test_an_unknown_speed_stands_between_usable_and_too_slow():
    unknown, quick, slow = scored(NF4, tokens=None), scored(INT8, tokens=9), scored(tokens=1)
    assert order([unknown, slow, quick]) == [INT8, NF4, Strategy()]
    assert [usable(each, INFER, None) for each in (quick, unknown, slow)] == [0, 1, 2]


@pytest.mark.parametrize("prefer", ["quality", "speed", "headroom"])
def test_the_cpu_beside_a_card_comes_last(prefer):
    """Its speed is not known; a slow way on the card is still the better first answer."""
    cpu, slow = scored(Strategy(placement="cpu"), tokens=None, high_gib=1), scored(NF4, tokens=1)
    assert order([cpu, slow], prefer) == [NF4, cpu.strategy]


def test_speeds_too_near_to_tell_apart_leave_the_defaults_ahead():
    lever = Strategy(optimizer="paged_adamw_8bit")
    near = scored(lever, tokens=101, high_gib=8, workload=TRAIN)
    assert order([near, scored(tokens=100, workload=TRAIN)], workload=TRAIN) == [Strategy(), lever]


def test_quality_of_training_treats_quantized_bases_alike():
    assert quality(QWEN, TRAIN, NF4) == quality(QWEN, TRAIN, INT8) > quality(QWEN, TRAIN, Strategy())
    assert quality(QWEN, INFER, Strategy()) < quality(QWEN, INFER, INT8) < quality(QWEN, INFER, NF4)


def test_leaving_out_an_attention_cap_is_a_loss():
    gemma = architecture(GEMMA_2_2B)
    eager = Strategy(attention="eager")
    assert quality(gemma, INFER, eager) < quality(gemma, INFER, Strategy())
    assert quality(QWEN, INFER, eager) == quality(QWEN, INFER, Strategy())


def test_headroom_is_that_of_the_tightest_card_and_of_ram_without_cards():
    two = replace(
        PLAIN, gpus=(PLAIN.gpus[0], replace(PLAIN.gpus[0], high_bytes=18 * GIB, budget_bytes=24 * GIB))
    )
    assert headroom(two, MACHINE) == 0.25
    cpu = estimate(MODEL, no_card(32), INFER, Strategy(placement="cpu"))
    assert headroom(cpu, no_card(32)) == 1 - cpu.host.ram_bytes / (32 * GIB)
    assert footprint(cpu) == cpu.host.ram_bytes and footprint(two) == sum(g.process_bytes for g in two.gpus)


FIGURES = st.tuples(
    st.one_of(st.none(), st.floats(0.01, 1e5)),
    st.sampled_from(["fits", "tight"]),
    st.integers(1, 24),
)
EVERY = legal_strategies(QWEN, MACHINE, INFER, {}, "speed")[0]


@given(
    figures=st.lists(FIGURES, min_size=len(EVERY), max_size=len(EVERY)),
    prefer=st.sampled_from(["quality", "speed", "headroom"]),
    seed=st.integers(0, 2**32),
)
def test_ranking_is_a_total_order(figures, prefer, seed):
    candidates = [
        scored(strategy, tokens=tokens, verdict=verdict, high_gib=high)
        for strategy, (tokens, verdict, high) in zip(EVERY, figures, strict=True)
    ]
    field = Field(QWEN, MACHINE, INFER, prefer)
    keys = [rank_key(field, each, None) for each in candidates]
    assert len(set(keys)) == len(keys)
    shuffled = random.Random(seed).sample(candidates, len(candidates))
    ranked = rank(field, shuffled)
    assert ranked == rank(field, candidates)
    verdicts = [each.estimate.verdict for each in ranked]
    assert verdicts == sorted(verdicts)
    for verdict in ("fits", "tight"):
        steps = [usable(each, INFER, None, True) for each in ranked if each.estimate.verdict == verdict]
        assert steps == sorted(steps)


def test_reasons_are_texts_with_the_figures():
    field = Field(QWEN, MACHINE, INFER)
    lines = reasons(field, scored(NF4, tokens=42.0, high_gib=9), None)
    assert lines[0] == "fits: 9.00 GiB of 24.00 GiB on card 0, at least 15.00 GiB to spare"
    assert "NF4" in lines[1]
    assert lines[2].startswith("42 tokens/s decode (21 to 84)")
    slow = reasons(field, scored(tokens=2.0), None)
    assert "too slow to use: under 5 tokens/s" in slow
    assert any("unknown" in line for line in reasons(field, scored(tokens=None), None))


@pytest.mark.parametrize(
    ("machine", "workload", "strategy", "word"),
    [
        (card("rx-7900-xtx"), INFER, Strategy(), "not built for amd"),
        (card("rtx-3090", 2), INFER, Strategy(), "split over 2 cards"),
        (card("rtx-3090", 2), TRAIN, Strategy(), "replica"),
        (card("t4"), INFER, Strategy(dtype="fp16"), "no bf16"),
        (no_card(), TRAIN, Strategy(placement="cpu", optimizer="paged_adamw_8bit"), "not paged"),
    ],
)
def test_notes_on_the_hardware(machine, workload, strategy, word):
    assert any(word in line for line in notes(Field(QWEN, machine, workload), strategy))


def test_a_note_on_a_checkpoint_that_is_quantized_already():
    packed = replace(QWEN, pretrained_quantization="fp8")
    assert any("fp8" in line for line in notes(Field(packed, MACHINE, INFER), Strategy()))
    packed = replace(QWEN, pretrained_quantization="bitsandbytes-nf4")
    assert not any("needs a copy" in line for line in notes(Field(packed, MACHINE, INFER), NF4))


def test_the_first_difference_is_named():
    field = Field(QWEN, MACHINE, INFER)
    assert compared(field, scored(), scored(NF4), None) == "keeps less quality"
    assert (
        compared(field, scored(tokens=50), scored(Strategy(cache="offloaded"), tokens=20), None) == "slower"
    )
    assert compared(field, scored(), scored(NF4, verdict="tight"), None) == "fits less well"


def test_a_note_where_transformers_has_no_sdpa():
    gemma = architecture(GEMMA_2_2B)
    assert any("eager" in line for line in notes(Field(gemma, MACHINE, INFER), Strategy(attention="eager")))
    offloaded = Strategy(placement="mixed_offload", engine="accelerate")
    assert any(
        "first of the 2 cards" in line for line in notes(Field(QWEN, card("rtx-3090", 2), INFER), offloaded)
    )


def test_a_note_on_more_tokens_than_the_model_was_made_for():
    inside, beyond = Workload(prompt_tokens=131072 - 256), Workload(prompt_tokens=131072 - 255)
    assert notes(Field(QWEN, MACHINE, inside), Strategy()) == ()
    assert any("131072" in line for line in notes(Field(QWEN, MACHINE, beyond), Strategy()))
