"""The one estimator. check, plan, preflight and report all call `estimate`.

Pure: a model's facts, a machine, a job and a strategy in; memory, speed and a verdict out. What does not
depend on the card is cached, so the same job over a whole catalogue of cards costs little more than one
estimate.
"""

from __future__ import annotations

import math
from functools import lru_cache

from msgspec import Struct
from msgspec.structs import replace

from planner.attention_kernel import as_it_runs
from planner.draft import draft_architecture
from planner.errors import BadOption
from planner.host_disk import disk_estimate, host_estimate
from planner.identity import identities_cache, identity_cache
from planner.machine import budget, free_ram, kind_of
from planner.memory.draft import with_draft
from planner.memory.host import host_memory
from planner.memory.infer import inference_memory
from planner.memory.moments import CardMemory
from planner.memory.offload import offloaded_memory, passing_bytes
from planner.memory.optimizer import OPTIMIZERS
from planner.memory.overheads import context, cublas_workspace, slack
from planner.memory.recurrent import is_followed
from planner.memory.steady import Holes, steady_holes
from planner.memory.streamed import Parts, parts_of, streamed_memory
from planner.memory.train import training_memory
from planner.memory.weights import WIDTH, weight_bytes
from planner.placement import (
    Split,
    Tiers,
    balanced,
    offload_map,
    one_device,
    resident_layers,
    several_cards,
    split_at,
    stream_map,
)
from planner.speed import predict_speed
from planner.strategies import INFER_SETTINGS, TRAIN_SETTINGS
from planner.streaming import choose_residents, spread_over_disk
from planner.types import (
    Estimate,
    Gpu,
    GpuEstimate,
    Machine,
    ModelRef,
    PlacementMap,
    Stack,
    Strategy,
    Workload,
)
from planner.verdict import RAM_UNCERTAINTY, judge
from profiles.architecture import loaded_architecture
from profiles.arithmetic import parameter_count
from profiles.schema import Architecture, Linear, ModelProfile

CALIBRATED_STACK = Stack(torch="2.11", transformers="5.17", bitsandbytes="0.50", peft="0.21")
"""The versions the model of memory was held against (benchmarks/)."""


class Exact(Struct, frozen=True):
    """Memory somebody traced on real modelling code (`planner.exact`), and the structure it was traced on."""

    arch: Architecture
    memory: CardMemory


def estimate(
    model: ModelProfile,
    machine: Machine,
    workload: Workload,
    strategy: Strategy,
    stack: Stack | None = None,
    exact: Exact | None = None,
) -> Estimate:
    """Memory, speed and verdict of one way to do one job.

    `machine.gpus` holds the cards of the job; none, or placement cpu, means the CPU alone. `exact`: memory
    that was traced instead. Errors: `BadOption` for an optimizer nobody described, `BadConfig` for a config
    that describes no model.
    """
    arch = exact.arch if exact else architecture_of(model)
    work = normal(workload)
    strategy = as_it_runs(strategy, arch.model_type, stack or CALIBRATED_STACK)
    how = normal_strategy(strategy, work)
    if how.placement == "cpu" or not machine.gpus:
        gpus: tuple[GpuEstimate, ...] = ()
        placement = one_device("cpu", arch)
    elif how.engine == "stream":
        gpus, placement = _streamed(arch, machine, work, how)
    elif how.placement in ("mixed_offload", "disk_offload"):
        gpus, placement = _offloaded(arch, machine, work, how)
    elif len(machine.gpus) > 1 and work.task == "infer":
        gpus, placement = _spread(arch, machine, work, how)
    else:
        # what was traced may be an architecture whose layers cannot be played
        gpus = tuple(
            _card(gpu, exact.memory, arch, work, how)
            if exact
            else _card(gpu, _memory(arch, work, how, gpu), arch, work, how, _holes(arch, work, how, gpu))
            for gpu in machine.gpus
        )
        placement = one_device(0, arch)
    parameters = model.parameters or count(arch)
    alone = exact.memory if exact else _memory(arch, work, how, machine.gpus[0] if gpus else None)
    host = host_estimate(arch, work, how, alone, gpus, placement)
    disk = disk_estimate(arch, parameters, work, how, placement)
    verdict, reasons = judge(machine, gpus, host, disk, how, work, placement)
    if how.speculate == "draft" and verdict != "does_not_fit" and draft_architecture(how.draft) is None:
        verdict, reasons = "unknown", (f"what the draft model {how.draft} holds is not known", *reasons)
    followed = exact or all(is_followed(layer.attention) for layer in arch.kinds)
    if verdict != "does_not_fit" and not followed:
        verdict, reasons = "unknown", ("what its recurrent layers hold is not modelled yet", *reasons)
    return Estimate(
        model=ModelRef(model.id, model.parameters),
        stack=stack or CALIBRATED_STACK,
        gpus=gpus,
        host=host,
        disk=disk,
        speed=predict_speed(arch, machine, workload, strategy, placement),
        verdict=verdict,
        reasons=reasons,
        placement=placement,
        defaulted=model.defaulted,
    )


class Floor(Struct, frozen=True):
    """What the estimate of a job does not fall below."""

    low_bytes: int
    process_bytes: int
    passing_bytes: int
    """Of these, what is there beside the loaded weights."""


def floor(model: ModelProfile, machine: Machine, workload: Workload, strategy: Strategy) -> Floor | None:
    """Bounds of `GpuEstimate.low_bytes` and `process_bytes` that need no played run: an allocator without
    holes. For jobs that one card holds entirely; None for others."""
    if len(machine.gpus) != 1 or strategy.placement != "full_gpu" or strategy.engine != "resident":
        return None
    arch, gpu, work = architecture_of(model), machine.gpus[0], normal(workload)
    how = normal_strategy(as_it_runs(strategy, arch.model_type, CALIBRATED_STACK), work)
    memory, around = _memory(arch, work, how, gpu), context(gpu.profile, arch, work, how)
    allocated = memory.peak.bytes
    surely = int(allocated * (1 - _uncertain(gpu, around.measured, played=False)))
    return Floor(
        max(memory.load_bytes, surely) + around.low,
        max(memory.load_peak_bytes, allocated) + around.typical,
        allocated - memory.load_bytes,
    )


# --------------------------------------------------------------------------- inputs


def _architecture(model: ModelProfile) -> Architecture:
    return loaded_architecture(model.config)


architecture_of = identity_cache(_architecture)
"""`architecture_of(model) -> Architecture`: the structure a profile describes, worked out once."""


@lru_cache(maxsize=512)
def count(arch: Architecture) -> int:
    """Parameters by the architecture's own arithmetic."""
    return parameter_count(arch)


@identity_cache
def normal(work: Workload) -> Workload:
    """The job without what its task does not use, so that equal jobs share cached work."""
    plain = Workload()
    if work.task == "infer":
        return Workload(
            task="infer",
            prompt_tokens=work.prompt_tokens,
            new_tokens=work.new_tokens,
            batch_size=work.batch_size,
            concurrency=work.concurrency,
        )
    return replace(
        work,
        prompt_tokens=plain.prompt_tokens,
        new_tokens=plain.new_tokens,
        concurrency=1,
        train_tokens=None,
    )


@identities_cache
def normal_strategy(how: Strategy, work: Workload) -> Strategy:
    """The strategy without what the task does not use."""
    plain = Strategy()
    if work.task == "infer":
        return replace(how, **{name: getattr(plain, name) for name in TRAIN_SETTINGS})
    if how.optimizer not in OPTIMIZERS:
        raise BadOption(
            f"unknown optimizer {how.optimizer[:40]!r}", f"known: {', '.join(sorted(OPTIMIZERS))}"
        )
    # k-bit preparation widens what a quantized base left alone; an unquantized base has nothing to prepare
    upcast = how.upcast_frozen and how.quant != "none"
    unused = {name: getattr(plain, name) for name in INFER_SETTINGS}
    return replace(how, upcast_frozen=upcast, **unused)


# --------------------------------------------------------------------------- one card


def _memory(arch: Architecture, work: Workload, how: Strategy, gpu: Gpu | None) -> CardMemory:
    return _memory_beside(arch, work, how, cublas_workspace(gpu.profile) if gpu else 0)


@identities_cache
def _memory_beside(arch: Architecture, work: Workload, how: Strategy, workspace: int) -> CardMemory:
    place = replace(how, placement="full_gpu", engine="stream" if how.engine == "stream" else "resident")
    if work.task == "train":
        return training_memory(arch, work, place, workspace)
    memory = inference_memory(arch, work, place, workspace)
    draft = draft_architecture(how.draft) if how.speculate == "draft" else None
    return memory if draft is None else with_draft(memory, draft, work, place)


UNCERTAIN_ELSEWHERE = 0.15
"""Share of the allocated peak left open on cards of other vendors, where nothing was measured yet."""


def _uncertain(gpu: Gpu, measured: bool, played: bool) -> float:
    """Share of the allocated peak left open on both sides. Residuals of played runs are of measured caps on
    the measured card, errors of the peak counted in."""
    if gpu.profile.vendor != "nvidia":
        return UNCERTAIN_ELSEWHERE
    return (0.003 if played else 0.01) if measured else 0.02


def _holes(arch: Architecture, work: Workload, how: Strategy, gpu: Gpu) -> Holes | None:
    """Of the whole job on one card, played on the allocator."""
    return _holes_beside(arch, work, how, cublas_workspace(gpu.profile))


@identities_cache
def _holes_beside(arch: Architecture, work: Workload, how: Strategy, workspace: int) -> Holes | None:
    return steady_holes(arch, work, replace(how, placement="full_gpu", engine="resident"), workspace)


_slack = identities_cache(slack)


def _card(
    gpu: Gpu,
    memory: CardMemory,
    arch: Architecture,
    work: Workload,
    how: Strategy,
    holes: Holes | None = None,
) -> GpuEstimate:
    """Allocated, required and process bytes of a card, with their interval."""
    room = _slack(memory, arch, work, how, holes)
    around = context(gpu.profile, arch, work, how)
    peak = memory.peak
    allocated = peak.bytes
    required = max(memory.load_peak_bytes, allocated + room.typical)
    budget_bytes, basis = budget(gpu)
    uncertain = _uncertain(gpu, around.measured, holes is not None)
    below = required - max(memory.load_bytes, allocated * (1 - uncertain) + room.low)
    above = max(memory.load_peak_bytes, allocated * (1 + uncertain) + room.high) - required
    less, more = around.typical - around.low, around.high - around.typical
    # what the allocator and the context may differ by from the typical is independent of each other
    low = required + around.typical - int(math.hypot(max(0, below), less) if holes else below + less)
    high = required + around.typical + int(math.hypot(max(0, above), more) if holes else above + more)
    return GpuEstimate(
        index=gpu.index,
        budget_bytes=budget_bytes,
        budget_basis=basis,
        load_bytes=memory.load_bytes,
        allocated_peak_bytes=allocated,
        required_bytes=required,
        context_bytes=around.typical,
        process_bytes=required + around.typical,
        low_bytes=min(low, required + around.typical),
        high_bytes=max(high, required + around.typical),
        managed_bytes=memory.managed_bytes,
        peak_moment=peak.moment,
        components=peak.lines,
        moments={"load": memory.load_peak_bytes, **memory.by_moment},
    )


# --------------------------------------------------------------------------- several places


def _offloaded(
    arch: Architecture, machine: Machine, work: Workload, how: Strategy
) -> tuple[tuple[GpuEstimate, ...], PlacementMap]:
    """accelerate's offload on the first card: as many layers stay as surely fit beside one passing module."""
    gpu = machine.gpus[0]
    memory = _memory(arch, work, how, gpu)
    weights = weight_bytes(arch, how.quant, how.quant_experts, how.dtype)

    def card(split: Split) -> GpuEstimate:
        passing = passing_bytes(arch, split, WIDTH[how.dtype])
        holes = None if split.offloaded_bytes else _holes(arch, work, how, gpu)
        return _card(gpu, offloaded_memory(memory, split, arch.layers, passing), arch, work, how, holes)

    room = budget(gpu)[0] or 0
    split = resident_layers(arch, weights, card(Split(arch.layers, 0)).high_bytes - room)
    if not split.outer_offloaded:
        # the estimate's margins shrink with what leaves and grow with what passes: settle by trying
        while split.resident > 0 and card(split).high_bytes > room:
            split = split_at(arch, weights, split.resident - 1)
        while split.resident < arch.layers:
            more = split_at(arch, weights, split.resident + 1)
            if card(more).high_bytes > room:
                break
            split = more
        if card(split).high_bytes > room:
            split = resident_layers(arch, weights, weights.total(arch.order))
    where = "cpu" if how.placement == "mixed_offload" else "disk"
    return (card(split),), offload_map(arch, split, where)


def _streamed(
    arch: Architecture, machine: Machine, work: Workload, how: Strategy
) -> tuple[tuple[GpuEstimate, ...], PlacementMap]:
    """Layer streaming on the first card: as much stays as surely fits beside the slots."""
    gpu = machine.gpus[0]
    memory, parts = _memory(arch, work, how, gpu).lean, parts_of(arch, how)
    room = budget(gpu)[0] or 0
    alike, known = kind_of(machine).gpus[0], _high_bytes(memory, parts, arch, work, how)
    kind = (alike.profile.vendor, alike.profile.compute_capability)

    def card(tiers: Tiers, gpu: Gpu = gpu) -> GpuEstimate:
        return _card(gpu, streamed_memory(memory, parts, tiers), arch, work, how)

    def high_bytes(tiers: Tiers) -> int:
        if (*kind, tiers) not in known:
            known[*kind, tiers] = card(tiers, alike).high_bytes
        return known[*kind, tiers]

    tiers = choose_residents(parts, high_bytes, room, work, how)
    free = free_ram(machine)
    most = None
    if free is not None:
        beside = host_memory(
            on_card=True, managed_bytes=memory.managed_bytes, pinned_bytes=memory.host_bytes
        ).ram_bytes
        most = int(free / (1 + RAM_UNCERTAINTY)) - beside
    return (card(tiers),), stream_map(arch, spread_over_disk(parts, tiers, how, most))


@identities_cache
def _high_bytes(
    memory: CardMemory, parts: Parts, arch: Architecture, work: Workload, how: Strategy
) -> dict[tuple[str, str | None, Tiers], int]:
    """What a run needs at most, by vendor and compute capability of the card and what stays there: filled as
    cards are asked for."""
    return {}


def _spread(
    arch: Architecture, machine: Machine, work: Workload, how: Strategy
) -> tuple[tuple[GpuEstimate, ...], PlacementMap]:
    """Layers over several cards, as accelerate's device_map runs them: one card works at a time."""
    weights = weight_bytes(arch, how.quant, how.quant_experts, how.dtype)
    counts = balanced(arch, weights, [budget(gpu)[0] for gpu in machine.gpus])
    cards, start = [], 0
    for position, (gpu, layers) in enumerate(zip(machine.gpus, counts, strict=True)):
        part = _part(arch, start, start + layers, position == 0, position == len(counts) - 1)
        cards.append(_card(gpu, _memory(part, work, how, gpu), part, work, how))
        start += layers
    return tuple(cards), several_cards(arch, counts)


@lru_cache(maxsize=512)
def _part(arch: Architecture, start: int, stop: int, first: bool, last: bool) -> Architecture:
    """The share of one card. A tied output projection shares the embedding only on the same card."""
    head = arch.head
    if last and head is None and not first:
        head = Linear("lm_head", arch.hidden_size, arch.vocab_size)
    return replace(
        arch,
        order=arch.order[start:stop] or arch.order[:0],
        embeddings=arch.embeddings if first else (),
        head=head if last else None,
        towers=arch.towers if first else (),
        linears=arch.linears if first else (),
        parameters=arch.parameters if first else (),
        final_norm=arch.final_norm if last else None,
    )


__all__ = ["CALIBRATED_STACK", "architecture_of", "estimate"]
