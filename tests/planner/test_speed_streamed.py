"""Speed where layers stream: what must hold of every training step and of the copies beside it."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from planner.machine import machine_from_gpus
from planner.memory.stream import SLOTS
from planner.memory.streamed import parts_of, traffic
from planner.passes import train_seconds
from planner.placement import Tiers, one_device, stream_map
from planner.rates import LEVELS, Level, Rates, card_rates
from planner.seconds import Seconds, side_by_side
from planner.speed import _job, free_copies_tokens, predict_speed
from planner.types import Host, Machine, Strategy, Workload
from profiles.architecture import architecture
from profiles.catalogue import load_model
from profiles.hardware import load_gpu
from profiles.schema import Architecture

MODELS = ("qwen2.5-0.5b", "llama-3.1-8b", "gemma-2-2b", "deepseek-v2-lite", "llama-3-70b")
CARDS = ("h200", "rtx-3090", "rtx-4060-8gb", "mi300x")
ROUNDED = 1 - 1e-9
quick = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
seconds = st.floats(0, 100)


@lru_cache(maxsize=16)
def known(name: str) -> Architecture:
    return architecture(load_model(name).config)


@lru_cache(maxsize=8)
def machine(card: str) -> Machine:
    return machine_from_gpus([(load_gpu(card), 1)])


def rates(card: str, level: Level = "typical") -> Rates:
    return card_rates(machine(card), "bf16", level)


def step(arch: Architecture, tiers: Tiers, work: Workload, how: Strategy, at: Rates, level: Level) -> Seconds:
    found = train_seconds(_job(arch, False, 0, work, how, stream_map(arch, tiers)), at, level)
    assert found is not None
    return found


@st.composite
def steps(draw: st.DrawFn) -> tuple[Architecture, Tiers, Workload, Strategy]:
    arch = known(draw(st.sampled_from(MODELS)))
    resident, head = draw(st.integers(0, arch.layers)), draw(st.booleans())
    on_disk = draw(st.sampled_from((0, arch.layers - resident)))
    quant = draw(st.sampled_from(("none", "nf4", "int8")))
    work = Workload(
        task="train",
        method="lora" if quant == "none" else "qlora",
        seq_len=draw(st.sampled_from((1, 64, 512, 4096))),
        batch_size=draw(st.sampled_from((1, 4))),
        gradient_accumulation_steps=draw(st.sampled_from((1, 8))),
    )
    how = Strategy(
        quant=quant,
        placement="mixed_offload",
        engine="stream",
        gradient_checkpointing=draw(st.booleans()),
        activation_offload=draw(st.booleans()),
        loss=draw(st.sampled_from(("full", "fused"))),
        kernels=draw(st.sampled_from(("torch", "liger"))),
    )
    return arch, Tiers(resident, on_disk, head, head), work, how


cards, levels = st.sampled_from(CARDS), st.sampled_from(LEVELS)


# --------------------------------------------------------------------------- card and host


@given(seconds, seconds, st.floats(1, 100))
def test_two_side_by_side_take_between_the_slower_and_both_in_turn(
    card: float, host: float, overlap: float
) -> None:
    both = side_by_side(card, host, overlap)
    assert max(card, host) * ROUNDED <= both <= (card + host) / ROUNDED
    assert both == side_by_side(host, card, overlap)
    assert side_by_side(card, host, math.inf) == max(card, host)
    assert math.isclose(side_by_side(card, host, 1.0), card + host)


# --------------------------------------------------------------------------- what is copied


@quick
@given(steps())
def test_stretches_add_up_to_the_link_of_a_step(
    job: tuple[Architecture, Tiers, Workload, Strategy],
) -> None:
    arch, tiers, _, how = job
    sizes = parts_of(arch, how)
    moved = traffic(sizes, tiers, train=True)
    there, between, back = moved.stretches
    assert moved.link == there + between + back <= 2 * traffic(sizes, tiers, train=False).link
    assert tiers.head_away or between == 0
    assert moved.disk <= moved.link


def test_what_comes_in_each_stretch() -> None:
    """The first two layers are left from backward, and what forward ends with is there for the turn."""
    how = Strategy(quant="nf4", engine="stream", placement="mixed_offload")
    sizes = parts_of(known("llama-3.1-8b"), how)
    slab, layers, blocks = sizes.slabs[0], sizes.layers, sizes.head_blocks
    assert traffic(sizes, Tiers(12), True).stretches == (18 * slab, 0, 18 * slab)
    assert traffic(sizes, Tiers(layers - SLOTS), True).stretches == (0, 0, 0)
    head = sum(blocks) + sum(blocks[:-SLOTS])
    assert traffic(sizes, Tiers(12, 0, True, True), True).stretches == (18 * slab, head, 20 * slab)
    alone = traffic(sizes, Tiers(layers, 0, True, True), True)
    assert alone.stretches == (0, sum(blocks[SLOTS:]) + sum(blocks[:-SLOTS]), 0), "no layer streams"


# --------------------------------------------------------------------------- a step


@quick
@given(steps(), cards, levels)
def test_a_step_takes_no_less_than_anything_it_waits_for(
    job: tuple[Architecture, Tiers, Workload, Strategy], card: str, level: Level
) -> None:
    found = step(*job, rates(card, level), level)
    least = max(found.card, found.launch, found.streamed, found.read)
    assert found.total >= (least + found.link + found.alone) * ROUNDED
    assert math.isclose(sum(copies for _, copies in found.parts), found.streamed, abs_tol=1e-12)


@quick
@given(steps(), cards, st.floats(1.0, 50.0), st.sampled_from(("link", "direct")))
def test_a_slower_link_or_disk_is_never_faster(
    job: tuple[Architecture, Tiers, Workload, Strategy], card: str, factor: float, what: str
) -> None:
    at = rates(card)
    slow = replace(at, **{what: getattr(at, what) / factor})
    before, after = (step(*job, each, "typical").total for each in (at, slow))
    assert after >= before * ROUNDED


@quick
@given(steps(), cards)
def test_levels_are_in_their_order(job: tuple[Architecture, Tiers, Workload, Strategy], card: str) -> None:
    found = [step(*job, rates(card, level), level).total for level in LEVELS]
    assert all(slower >= faster * ROUNDED for slower, faster in pairwise(found))


@quick
@given(steps(), cards, levels)
def test_streaming_is_never_faster_than_staying(
    job: tuple[Architecture, Tiers, Workload, Strategy], card: str, level: Level
) -> None:
    arch, tiers, work, how = job
    how = replace(how, activation_offload=False)
    stays = replace(how, engine="resident", placement="full_gpu")
    resident = train_seconds(
        _job(arch, False, 0, work, stays, one_device(0, arch)), rates(card, level), level
    )
    assert resident is not None
    assert step(arch, tiers, work, how, rates(card, level), level).total >= resident.total * ROUNDED


def test_few_tokens_read_the_weights_in_every_stretch() -> None:
    """Products of 16 tokens take as long as their weights take to be read: that time hides copies as well."""
    how = Strategy(engine="stream", placement="mixed_offload")
    work = Workload(task="train", method="lora", seq_len=16)
    found = step(known("llama-3-70b"), Tiers(60), work, how, rates("rtx-3090"), "typical")
    assert found.memory > found.compute
    assert math.isclose(sum(busy for busy, _ in found.parts), found.busy, rel_tol=0.02)


def test_a_cpu_streams_nothing() -> None:
    """All layers are in RAM, and none is brought."""
    arch, work = known("qwen2.5-0.5b"), Workload(task="train", method="lora")
    here = Machine(host=Host(cores=8))
    resident, stream = (
        predict_speed(arch, here, work, Strategy(placement="cpu", engine=engine), one_device("cpu", arch))
        for engine in ("resident", "stream")
    )
    assert resident.train_tokens_per_s == stream.train_tokens_per_s is not None


# --------------------------------------------------------------------------- where copies are free


@pytest.mark.parametrize(("quant", "head"), [("none", False), ("none", True), ("nf4", True)])
def test_no_stretch_waits_from_there_on(quant: str, head: bool) -> None:
    """Among the stretches of NF4 some wait for the host whatever the tokens."""
    how = Strategy(quant=quant, engine="stream", placement="mixed_offload", loss="fused")
    work = Workload(task="train", method="lora" if quant == "none" else "qlora", seq_len=16)
    arch, tiers = known("llama-3.1-8b"), Tiers(8, 0, head, head)
    tokens = free_copies_tokens(arch, machine("h200"), work, how, stream_map(arch, tiers))
    assert tokens is not None and tokens > 1000
    for times, free in ((1.02, True), (0.9, False)):
        batch = replace(work, batch_size=round(times * tokens / 16))
        found = step(arch, tiers, batch, how, rates("h200"), "typical")
        assert all(busy >= copies for busy, copies in found.stretches) == free


def test_a_sequence_whose_copies_are_free_may_be_longer_than_it_must() -> None:
    arch, how = known("llama-3.1-8b"), Strategy(quant="nf4", engine="stream", placement="mixed_offload")
    tokens = free_copies_tokens(
        arch, machine("h200"), Workload(task="train", seq_len=8192), how, stream_map(arch, Tiers(8))
    )
    assert tokens is not None and 0 < tokens < 8192


def test_nothing_is_said_where_nothing_is_copied() -> None:
    arch = known("llama-3.1-8b")
    how = Strategy(quant="nf4", engine="stream", placement="mixed_offload")
    kept = stream_map(arch, Tiers(arch.layers - SLOTS))
    assert free_copies_tokens(arch, machine("h200"), Workload(task="train"), how, kept) is None
