"""Where a streamed model's parts go: what holds of every choice, and the cards and RAM it was built for."""

from __future__ import annotations

import itertools
import time
from functools import lru_cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.estimate import estimate
from planner.machine import kind_of, machine_from_gpus
from planner.memory.stream import RING_BUFFERS
from planner.memory.streamed import Parts, ladders, parts_of, pinned_lines, split, streamed_memory, traffic
from planner.memory.train import training_memory
from planner.memory.weights import weight_bytes
from planner.placement import Tiers, one_device, tiers_of
from planner.search import search
from planner.speed import free_copies_tokens, predict_speed
from planner.strategies import _legal_strategies, legal_strategies
from planner.streaming import choose_residents, spread_over_disk
from planner.survey import Question, smallest_streamed
from planner.types import Estimate, Machine, Strategy, Workload
from planner.units import GIB, MIB
from profiles.architecture import architecture
from profiles.catalogue import load_model
from profiles.hardware import all_gpus, load_gpu
from profiles.schema import Architecture

MODELS = (
    "qwen2.5-0.5b", "llama-3.1-8b", "gemma-2-2b", "deepseek-v2-lite", "qwen3-next-80b-a3b-instruct",
    "gpt-oss-20b", "gemma-3n-e4b-it", "phi-3.5-mini-instruct",
)  # fmt: skip
"""Tied and untied heads, layers of one kind and of several, dense and routed."""
quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
models, quants = st.sampled_from(MODELS), st.sampled_from(("none", "nf4", "int8"))
INFER = Workload(prompt_tokens=512, new_tokens=64)
QLORA = Workload(task="train", seq_len=1024, batch_size=4)


@lru_cache(maxsize=32)
def known(name: str) -> Architecture:
    return architecture(load_model(name).config)


def streams(quant: str = "nf4", placement: str = "mixed_offload", **more) -> Strategy:
    return Strategy(placement=placement, engine="stream", quant=quant, **more)


def parts(name: str, quant: str = "nf4") -> Parts:
    return parts_of(known(name), streams(quant))


def machine(vram: float, ram: float | None = 256, card: str = "h200") -> Machine:
    size = None if ram is None else int(ram * GIB)
    return machine_from_gpus([(load_gpu(card), 1)], vram_bytes=int(vram * GIB), ram_bytes=size)


def chosen(
    name: str, vram: float, how: Strategy, work: Workload = INFER, ram: float | None = 256
) -> Estimate:
    return estimate(load_model(name), machine(vram, ram), work, how)


@quick
@given(models, quants, st.booleans(), st.data())
def test_every_byte_of_the_layers_is_in_one_tier(name, quant, away, data) -> None:
    sizes = parts(name, quant)
    resident = data.draw(st.integers(0, sizes.layers))
    on_disk = data.draw(st.integers(0, sizes.layers - resident))
    tiers = Tiers(resident, on_disk, away, away)
    places = tiers.places(sizes.layers)
    in_ram, read = split(sizes, tiers)
    stays = sum(size for size, place in zip(sizes.slabs, places, strict=True) if place == 0)
    assert (places.count(0), places.count("disk")) == (resident, on_disk)
    assert stays + sum(in_ram) + sum(read) == sum(sizes.slabs)
    assert sizes.away[resident].slab_bytes == sum(in_ram) + sum(read)
    ring = {line.name: line.bytes for line in pinned_lines(sizes, tiers)}.get("disk ring", 0)
    assert ring == min(RING_BUFFERS, on_disk) * max(read, default=0)


@quick
@given(models, quants, st.booleans())
def test_more_that_stays_never_takes_less_of_the_card(name, quant, away) -> None:
    work = Workload(task="train", method="lora" if quant == "none" else "qlora", seq_len=256)
    run = training_memory(known(name), work, Strategy(quant=quant), 0)
    sizes = parts(name, quant)
    counts = ladders(sizes)[away].counts
    needs = [streamed_memory(run, sizes, Tiers(n, 0, away, away)) for n in counts]
    assert all(count >= n for n, count in enumerate(counts)) and counts[-1] == sizes.layers
    rounding = 4 * 4096 + 512 * 1024  # a slab ends at a page, loaded tensors at 512 bytes
    for fewer, more in itertools.pairwise(needs):
        assert more.peak.bytes >= fewer.peak.bytes - rounding
    for memory in needs:
        assert all(sum(line.bytes for line in shot.lines) == shot.bytes for shot in memory.snapshots)
        assert memory.load_bytes <= memory.load_peak_bytes


@quick
@given(models, st.integers(0, 60_000), st.integers(1, 20_000), st.booleans(), st.floats(1.0, 1.3))
def test_a_larger_budget_never_streams_more(name, room, more, liger, margin) -> None:
    """On a stand-in for the estimator: bytes that stay, times a margin, beside two slots."""
    sizes = parts(name)
    work = QLORA if liger else INFER
    how = streams(kernels="liger" if liger else "torch")

    def high(tiers: Tiers) -> int:
        away = sizes.away[tiers.resident]
        tables = sizes.head * (not sizes.tied and not tiers.embeddings_away) + sizes.head * (
            not tiers.head_away
        )
        kept = sizes.away[0].left_bytes - away.left_bytes + min(2, away.count) * away.largest_slab + tables
        return int(margin * kept)

    small = choose_residents(sizes, high, room * MIB // 8, work, how)
    large = choose_residents(sizes, high, (room + more) * MIB // 8, work, how)
    assert traffic(sizes, large, False).link <= traffic(sizes, small, False).link
    if (small.embeddings_away, small.head_away) == (large.embeddings_away, large.head_away):
        assert large.resident >= small.resident
    if high(small) > room * MIB // 8:
        least = small.resident == 0 or sizes.away[small.resident].count == 0
        assert least or len(set(sizes.slabs)) > 1
    elif small.resident < sizes.layers and len(set(sizes.slabs)) == 1:
        one_more = Tiers(small.resident + 1, 0, small.embeddings_away, small.head_away)
        assert high(one_more) > room * MIB // 8


@quick
@given(
    models, quants, st.floats(1.2, 40), st.floats(2, 300), st.sampled_from(("mixed_offload", "disk_offload"))
)
def test_what_is_said_to_fit_fits(name, quant, vram, ram, placement) -> None:
    how = streams(quant, placement)
    found = chosen(name, vram, how, ram=ram)
    (card,), free = found.gpus, int(ram * GIB)
    assert sum(line.bytes for line in card.components) == card.allocated_peak_bytes
    if found.verdict == "fits":
        assert card.high_bytes <= card.budget_bytes and found.host.ram_bytes <= free
    placed, sizes = found.placement, parts(name, quant)
    tiers = tiers_of(known(name), placed)
    assert placed.layers_on_gpu + placed.layers_in_ram + placed.layers_on_disk == sizes.layers
    assert found.host.pinned_bytes == sum(line.bytes for line in pinned_lines(sizes, tiers))
    if placement == "disk_offload":
        assert placed.layers_in_ram == 0


@quick
@given(models, st.integers(0, 80_000))
def test_the_disk_takes_what_ram_does_not(name, mib) -> None:
    sizes, how = parts(name), streams()
    most = mib * MIB // 8
    tiers = spread_over_disk(sizes, Tiers(3), how, most)
    pinned = sum(line.bytes for line in pinned_lines(sizes, tiers))
    everything = sizes.layers - 3
    assert pinned <= most or tiers.on_disk in (0, everything)
    if tiers.on_disk > 0:
        assert sum(line.bytes for line in pinned_lines(sizes, Tiers(3, tiers.on_disk - 1))) > most or (
            len(set(sizes.slabs)) > 1
        )
    assert spread_over_disk(sizes, Tiers(3), how, None).on_disk == 0
    assert spread_over_disk(sizes, Tiers(3), streams(placement="disk_offload"), most).on_disk == everything


def test_traffic_of_a_pass_and_of_a_step() -> None:
    """Decoding brings every streamed slab once, training twice, less what its slots hold at each turn."""
    sizes = parts("llama-3.1-8b")
    slab, blocks = sizes.slabs[0], sizes.head_blocks
    assert sum(blocks) == sizes.head == 128256 * 4096 * 2
    tiers = Tiers(12)
    assert traffic(sizes, tiers, train=False).link == 20 * slab
    assert traffic(sizes, tiers, train=True).link == 2 * (20 - 2) * slab
    with_head = Tiers(12, 0, True, True)
    assert traffic(sizes, with_head, train=False).link == 20 * slab + sizes.head
    turns = 2 * slab + sum(blocks[-2:])
    assert traffic(sizes, with_head, train=True).link == 2 * (20 * slab + sizes.head) - turns
    assert traffic(sizes, Tiers(30), train=False).link == 0, "both layers stay in their slots"
    assert traffic(sizes, Tiers(0, 32), train=False).disk == 32 * slab


@pytest.mark.parametrize(
    ("name", "vram", "quant", "work"),
    [
        ("llama-3.1-8b", 2, "nf4", INFER),
        ("llama-3-70b", 6, "nf4", QLORA),
        ("llama-3.1-8b", 2.5, "nf4", Workload(task="train")),
        ("qwen2.5-7b", 2.5, "nf4", Workload(task="train")),
        ("qwen2.5-32b", 8, "nf4", Workload(task="train")),
        ("qwen2.5-14b", 6, "none", Workload(task="train", method="lora", seq_len=1024, batch_size=4)),
    ],
)
def test_large_models_on_small_cards(name, vram, quant, work) -> None:
    more = {"loss": "fused", "optimizer": "paged_adamw_8bit", "activation_offload": True}
    how = streams(quant, **(more if work.task == "train" else {}))
    found = chosen(name, vram, how, work)
    assert found.verdict == "fits", found.reasons
    lines = {line.name: line.bytes for line in found.host.components}
    loaded = weight_bytes(known(name), quant, "none", "bf16").total(known(name).order)
    assert lines["streamed layers"] + lines["tables in RAM"] <= 1.03 * loaded


def test_embeddings_leave_before_a_layer_and_the_head_where_nothing_else_fits() -> None:
    whole, some, least = (chosen("llama-3.1-8b", vram, streams()) for vram in (24, 4, 2))
    where = [
        (found.placement.device_map["model.embed_tokens"], found.placement.device_map["lm_head"])
        for found in (whole, some, least)
    ]
    assert where == [(0, 0), ("cpu", 0), ("cpu", "cpu")]
    assert (
        whole.placement.layers_in_ram == 0
        and 0 < least.placement.layers_on_gpu < some.placement.layers_on_gpu
    )
    tied = chosen("gemma-2-2b", 4, streams("none"))
    assert {tied.placement.device_map[name] for name in ("model.embed_tokens", "lm_head")} in ({0}, {"cpu"})
    liger = streams(kernels="liger", loss="fused", optimizer="paged_adamw_8bit")
    placed = chosen("llama-3-70b", 24, liger, QLORA).placement.device_map
    assert placed["model.embed_tokens"] == placed["lm_head"] == 0, "its loss reads weights where they are"


def test_ram_that_is_too_small_sends_layers_to_the_disk() -> None:
    rich, poor = (chosen("llama-3-70b", 8, streams(), ram=ram) for ram in (64, 24))
    assert rich.placement.layers_on_disk == 0 < poor.placement.layers_on_disk
    assert poor.verdict == "fits" and poor.speed.bound == "disk"
    assert poor.host.ram_bytes * 1.15 <= 24 * GIB < rich.host.ram_bytes
    unknown = chosen("llama-3-70b", 8, streams(), ram=None)
    assert unknown.placement.layers_on_disk == 0, "how much there is was not said: what it takes is shown"


def test_the_smallest_cards_a_70b_streams_through() -> None:
    model = load_model("llama-3-70b")
    works = {"infer": Workload(), "train": Workload(task="train")}
    found = smallest_streamed(Question(model, known("llama-3-70b"), works), all_gpus(), ("nf4", "qlora"), 3)
    for job in ("nf4", "qlora"):
        cards = [load_gpu(each.card).memory_bytes for each in found[job]]
        assert cards == sorted(cards) and len(cards) == 3 and cards[0] <= 8 * GIB
        # the figures are each card's own
        for each, there in zip(found[job], cards, strict=True):
            assert 34 * GIB < each.ram_bytes < 45 * GIB and 0 < there - each.card_bytes < 2 * GIB


def test_reasons_say_where_layers_are_and_from_where_on_copies_are_free() -> None:
    def said(work: Workload, vram: float, ram: float = 64) -> str:
        here = machine(vram, ram)
        pinned = {"quant": "nf4", "placement": "mixed_offload"}
        return " ".join(search(load_model("llama-3-70b"), here, work, pinned=pinned).candidates[0].reasons)

    step = said(QLORA, 8)
    assert "of 80 layers stay on the card" in step and "streaming costs no time: 4,096 tokens a step" in step
    short = said(Workload(task="train", seq_len=64), 16)
    assert "copies hide behind the computation from about" in short and "here it is 64" in short
    answer = said(INFER, 4, 24)
    assert "are read from disk" in answer and "comes in 32 blocks" in answer and "a pass of up to" in answer


def test_free_copies_begin_where_card_and_link_take_equally_long() -> None:
    name, how = "llama-3-70b", streams(loss="fused", optimizer="paged_adamw_8bit")
    resident = Strategy(quant="nf4", loss="fused", optimizer=how.optimizer)
    here, arch = machine(16), known(name)
    found = chosen(name, 16, how, Workload(task="train", seq_len=1024))
    tokens = free_copies_tokens(arch, here, Workload(task="train", seq_len=64), how, found.placement)
    assert tokens is not None
    for times, free in ((0.7, False), (1.5, True)):
        work = Workload(task="train", seq_len=64, batch_size=max(1, round(times * tokens / 64)))
        speeds = [
            predict_speed(arch, machine(141), work, each, where).train_tokens_per_s.typical
            for each, where in (
                (how, found.placement),
                (resident, one_device(0, arch)),
            )
        ]
        # what the host does for each streamed layer is not wholly hidden either
        assert (speeds[0] > 0.998 * speeds[1]) == free, speeds


def test_a_sweep_over_all_cards_is_quick() -> None:
    model, how = load_model("llama-3-70b"), streams()
    machines = [machine_from_gpus([(card, 1)], ram_bytes=24 * GIB) for card in all_gpus()]
    for work in (Workload(), Workload(task="train")):
        estimate(model, machines[0], work, how)
        before = time.process_time()
        for each in machines:
            estimate(model, each, work, how)
        assert (time.process_time() - before) / len(machines) < 0.001


@pytest.mark.parametrize("name", ["qwen2.5-7b", "llama-3-70b"])
def test_a_sweep_over_all_cards_and_strategies_is_quick(name: str) -> None:
    """About half a second on a quiet core; what a busy one takes is left open."""
    model = load_model(name)
    for work in (Workload(), Workload(task="train")):
        before, ways = time.process_time(), 0
        for card in all_gpus():
            here = machine_from_gpus([(card, 1)], ram_bytes=64 * GIB, disk_bytes=1024 * GIB)
            for how in legal_strategies(known(name), here, work)[0]:
                estimate(model, here, work, how)
                ways += 1
        assert ways > 5000 and time.process_time() - before < 2.5


@pytest.mark.parametrize("name", ["qwen2.5-7b", "gpt-oss-20b", "gemma-2-2b"])
def test_a_kind_of_machine_holds_all_that_decides_what_is_legal(name: str) -> None:
    for card in all_gpus():
        here = machine_from_gpus([(card, 2)], ram_bytes=64 * GIB)
        for work in (Workload(), Workload(task="train", method="full")):
            found = [
                _legal_strategies(known(name), each, work, (), "speed") for each in (here, kind_of(here))
            ]
            assert found[0] == found[1]
