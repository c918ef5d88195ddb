"""An estimate as arithmetic: which moment is the peak and why, every line with its numbers put in.

Nothing is estimated here. The figures are those of `planner.estimate`; this says how each came about, and
where a figure was measured, by which measurement.
"""

from __future__ import annotations

from typing import Final, Literal

from msgspec import Struct

from planner.anatomy import CacheRate, LayerBytes, WeightGroup, cache_rate, layers_at_work, weight_groups
from planner.estimate import normal, normal_strategy
from planner.explain_lines import Terms, arithmetic
from planner.memory.adapters import adapter_parameters
from planner.memory.overheads import Context, context, sources
from planner.types import (
    Basis,
    Estimate,
    Gpu,
    GpuEstimate,
    Machine,
    MemoryLine,
    ModelRef,
    Strategy,
    Verdict,
    Workload,
)
from planner.units import format_bytes
from profiles.schema import Architecture

EXPLANATION_SCHEMA: Final = "fitwright.explanation/1"


class MomentBar(Struct, frozen=True):
    """One moment of the run."""

    name: str
    bytes: int
    of_peak: float
    """Share of the largest moment after loading."""


class ExplainedLine(Struct, frozen=True):
    """One component of the peak."""

    name: str
    bytes: int
    share: float
    arithmetic: str
    basis: Basis
    source: str | None = None
    """The measurement, where the line was measured."""


class Step(Struct, frozen=True):
    """One step from the allocated peak to what must be free: low, typical and high bytes."""

    name: str
    low: int
    typical: int
    high: int
    why: str
    basis: Basis


class CardExplanation(Struct, frozen=True, kw_only=True):
    """One card."""

    index: int
    peak_moment: str
    why: str
    moments: tuple[MomentBar, ...]
    lines: tuple[ExplainedLine, ...]
    steps: tuple[Step, ...]
    """They add up to the interval and the process bytes."""
    low_bytes: int
    process_bytes: int
    high_bytes: int
    budget_bytes: int | None
    budget_basis: str


class Rates(Struct, frozen=True, kw_only=True):
    """Figures to reckon with: what one more token, layer or parameter costs."""

    cache: CacheRate
    layers: tuple[LayerBytes, ...]
    logits_copy_bytes: int
    """Logits of all tokens of a batch, once, in float32 (training); of the last position (inference)."""
    logits_copies: float | None = None
    """How many of them the loss holds at its worst moment."""
    trained_parameters: int | None = None
    optimizer_bytes_per_parameter: float | None = None
    """On the card; managed memory is apart."""
    managed_bytes_per_parameter: float | None = None


class Explanation(Struct, frozen=True, kw_only=True):
    """The whole of it."""

    schema: Literal["fitwright.explanation/1"] = EXPLANATION_SCHEMA
    model: ModelRef
    verdict: Verdict
    reasons: tuple[str, ...]
    cards: tuple[CardExplanation, ...]
    weights: tuple[WeightGroup, ...]
    rates: Rates
    host: tuple[ExplainedLine, ...]


def explain(
    found: Estimate, arch: Architecture, machine: Machine, workload: Workload, strategy: Strategy
) -> Explanation:
    """How `found`, the estimate of this job, came about."""
    work = normal(workload)
    how = normal_strategy(strategy, work)
    rates = _rates(found, arch, work, how)
    terms = Terms(arch, work, how, rates.trained_parameters or 0)
    gpus = {gpu.index: gpu for gpu in machine.gpus}
    return Explanation(
        model=found.model,
        verdict=found.verdict,
        reasons=found.reasons,
        cards=tuple(_card(card, gpus.get(card.index), terms) for card in found.gpus),
        weights=weight_groups(arch, how),
        rates=rates,
        host=_lines(found.host.components, found.host.ram_bytes, terms, sources()["process_ram"]),
    )


def _card(card: GpuEstimate, gpu: Gpu | None, terms: Terms) -> CardExplanation:
    peak = card.allocated_peak_bytes
    moments = {name: n for name, n in card.moments.items() if name != card.peak_moment}
    moments[card.peak_moment] = peak
    ordered = [name for name in card.moments if name in moments] or [card.peak_moment]
    return CardExplanation(
        index=card.index,
        peak_moment=card.peak_moment,
        why=_why(card, moments),
        moments=tuple(MomentBar(name, moments[name], moments[name] / peak) for name in ordered),
        lines=_lines(card.components, peak, terms, sources()["cublas_workspace"]),
        steps=_steps(card, gpu, terms),
        low_bytes=card.low_bytes,
        process_bytes=card.process_bytes,
        high_bytes=card.high_bytes,
        budget_bytes=card.budget_bytes,
        budget_basis=card.budget_basis,
    )


LASTING = frozenset(
    {
        "weights",
        "upcast weights",
        "slots",
        "draft model",
        "adapters",
        "optimizer state",
        "library workspace",
        "inputs and rope",
    }
)
"""Lines that are there in every moment of a run."""


def _why(card: GpuEstimate, moments: dict[str, int]) -> str:
    """What makes this moment the largest, and by how much."""
    moment = card.peak_moment.replace("_", " ")
    if moments.get("load", 0) > card.allocated_peak_bytes:
        moment = f"loading holds more for an instant, before the run; of the run itself {moment}"
    passing = [line for line in card.components if line.name not in LASTING]
    if not passing:
        return f"{moment}: what is loaded is all there is"
    biggest = max(passing, key=lambda line: line.bytes)
    kept = card.allocated_peak_bytes - sum(line.bytes for line in passing)
    text = (
        f"{moment}: {format_bytes(kept)} are there all the time, and {biggest.name} comes on top "
        f"with {format_bytes(biggest.bytes)}"
    )
    others = {name: n for name, n in moments.items() if name not in (card.peak_moment, "load")}
    if not others:
        return text
    second = max(others, key=lambda name: others[name])
    less = format_bytes(card.allocated_peak_bytes - others[second])
    return f"{text}; the next largest moment, {second.replace('_', ' ')}, holds {less} less"


def _lines(lines: tuple[MemoryLine, ...], whole: int, terms: Terms, source: str) -> tuple[ExplainedLine, ...]:
    return tuple(
        ExplainedLine(
            line.name,
            line.bytes,
            line.bytes / max(whole, 1),
            arithmetic(line, terms),
            line.basis,
            source if line.basis == "measured" else None,
        )
        for line in lines
    )


ALLOCATOR = (
    "holes between blocks that no cap can do without: the run played on torch's allocator, and what measured "
    "caps needed beside it (benchmarks/accuracy, benchmarks/calibration)"
)


def _steps(card: GpuEstimate, gpu: Gpu | None, terms: Terms) -> tuple[Step, ...]:
    around = context(gpu.profile, terms.arch, terms.work, terms.how) if gpu is not None else None
    beside = around or Context(card.context_bytes, card.context_bytes, card.context_bytes, False)
    allocated = card.allocated_peak_bytes
    room = card.required_bytes - allocated
    low, high = card.low_bytes - beside.low, card.high_bytes - beside.high
    return (
        Step("allocated peak", allocated, allocated, allocated, "the lines above", "counted"),
        Step(
            "allocator, margin",
            low - allocated,
            room,
            high - allocated,
            ALLOCATOR,
            "modelled",
        ),
        Step(
            "context",
            beside.low,
            card.context_bytes,
            beside.high,
            sources()["context" if beside.measured else "context_elsewhere"],
            "measured" if beside.measured else "modelled",
        ),
    )


def _rates(found: Estimate, arch: Architecture, work: Workload, how: Strategy) -> Rates:
    cache, layers = cache_rate(arch, how), layers_at_work(arch, work, how)
    if work.task == "infer":
        return Rates(cache=cache, layers=layers, logits_copy_bytes=4 * work.sequences * arch.vocab_size)
    copy = 4 * work.batch_size * work.seq_len * arch.vocab_size
    trained = found.model.parameters if work.method == "full" else adapter_parameters(arch, work)
    card = found.gpus[0] if found.gpus else None
    lines = {line.name: line.bytes for line in card.components} if card else {}
    fused = how.loss == "fused" or how.kernels == "liger"
    state = lines.get("optimizer state", 0)
    return Rates(
        cache=cache,
        layers=layers,
        logits_copy_bytes=copy,
        logits_copies=None if fused or "logits and loss" not in lines else lines["logits and loss"] / copy,
        trained_parameters=trained,
        optimizer_bytes_per_parameter=state / trained if card and trained else None,
        managed_bytes_per_parameter=card.managed_bytes / trained if card and trained else None,
    )
