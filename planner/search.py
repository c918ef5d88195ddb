"""All the ways to do a job, estimated, ranked and cut to the few worth trying.

What fits becomes candidates, best first; the rest becomes rejections with a reason and what would make it
fit. A candidate is kept when it is the first of its placement, needs less memory there than all before
it, or is a faster precision: so each one is a real alternative, or somewhere to go when memory runs out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from msgspec import Struct
from msgspec.structs import replace

from planner.estimate import architecture_of
from planner.estimate import estimate as estimate_job
from planner.machine import free_ram
from planner.needs import need_text, shortfall_text, what_would_fit
from planner.rank import Field, Scored, fastest_that_fits, footprint, rank, usable
from planner.reasons import compared, reasons, static_text
from planner.rules import is_legal
from planner.strategies import Prefer, legal_strategies
from planner.types import GOOD, Candidate, Estimate, Machine, Rejected, Stack, Strategy, Workload
from profiles.schema import ModelProfile

MOST_CANDIDATES = 8
_MEANINGFUL_SAVING = 0.98
_CLEARLY_FASTER = 1.5
"""Of two ways that are both too slow, the faster one is worth this much more waiting."""


class Estimator(Protocol):
    """`planner.estimate.estimate`, or a stand-in."""

    def __call__(
        self,
        model: ModelProfile,
        machine: Machine,
        workload: Workload,
        strategy: Strategy,
        stack: Stack | None = None,
    ) -> Estimate: ...


class Outcome(Struct, frozen=True):
    """Candidates best first, and everything that lost."""

    candidates: tuple[Candidate, ...]
    rejected: tuple[Rejected, ...]
    stack: Stack
    """Versions of the libraries the estimates describe."""


def search(
    model: ModelProfile,
    machine: Machine,
    workload: Workload,
    *,
    pinned: Mapping[str, Any] | None = None,
    prefer: Prefer = "quality",
    stack: Stack | None = None,
    estimator: Estimator = estimate_job,
) -> Outcome:
    """Every way to do a job on a machine, ranked. `pinned`: fields of `Strategy` that the user fixed.

    Errors: `BadOption` when what is fixed excludes itself.
    """
    field = Field(architecture_of(model), machine, workload, prefer)
    legal, excluded = legal_strategies(field.arch, machine, workload, pinned, prefer)
    estimated = [Scored(each, estimator(model, machine, workload, each, stack)) for each in legal]
    unjudged = (
        [] if "placement" in (pinned or {}) else [s for s in estimated if _needs_unknown_ram(s, machine)]
    )
    scored = [each for each in estimated if each not in unjudged and not _offloads_nothing(each)]
    rejected = [*excluded, *_needless(estimated)]
    fitting = rank(field, [s for s in scored if s.estimate.verdict in GOOD])
    fastest = fastest_that_fits(fitting)
    kept = worth_keeping(field, fitting, fastest)
    candidates = tuple(_candidate(field, each, n, fastest) for n, each in enumerate(kept, start=1))
    if prefer != "speed" and "cache" not in (pinned or {}):
        ask = partial(estimator, model, machine, workload, stack=stack)
        candidates = tuple(_with_hint(field, each, ask) for each in candidates)
    passed_over = [_passed_over(field, each, kept, fastest) for each in fitting if each not in kept]
    failing = _least_of_each([s for s in scored if s.estimate.verdict not in GOOD] + unjudged, kept)
    hopeless = not kept
    too_large = [
        Rejected(
            strategy=each.strategy,
            reason=shortfall_text(each.estimate, machine),
            needs=_needs(model, field, each, estimator) if hopeless else need_text(each.estimate, machine),
            process_bytes=_on_cards(each.estimate),
        )
        for each in failing
    ]
    return Outcome(candidates, (*passed_over, *too_large, *rejected), estimated[0].estimate.stack)


def _on_cards(estimate: Estimate) -> int | None:
    return footprint(estimate) if estimate.gpus else None


def _offloads_nothing(scored: Scored) -> bool:
    placed = scored.estimate.placement
    offloads = scored.strategy.placement in ("mixed_offload", "disk_offload")
    layers = placed.layers_in_ram + placed.layers_on_disk
    return offloads and not layers and all(isinstance(place, int) for place in placed.device_map.values())


def _needs_unknown_ram(scored: Scored, machine: Machine) -> bool:
    """Whether a way on a machine looked at for its cards rests on RAM nobody named."""
    return bool(machine.gpus) and scored.strategy.placement == "cpu" and free_ram(machine) is None


def _needless(estimated: Sequence[Scored]) -> list[Rejected]:
    """Offload placements that would offload nothing, each named once."""
    needless = {s.strategy.placement: s for s in reversed(estimated) if _offloads_nothing(s)}
    return [
        Rejected(
            strategy=each.strategy,
            reason="nothing has to be offloaded: every layer fits on the card",
            process_bytes=_on_cards(each.estimate),
        )
        for _, each in sorted(needless.items())
    ]


def worth_keeping(field: Field, ranked: Sequence[Scored], fastest: float | None) -> list[Scored]:
    """The few of a ranking that differ in something that matters; of what is too slow, one a placement and
    what is clearly faster."""
    kept: list[Scored] = []
    least: dict[str, float] = {}
    quickest: dict[str, float] = {}
    seen = set()
    for each in ranked:
        strategy, needed = each.strategy, footprint(each.estimate)
        kind = (strategy.placement, strategy.quant)
        typical = each.speed.typical if each.speed else 0.0
        slow = usable(each, field.workload, fastest) == 2
        if slow and typical < _CLEARLY_FASTER * quickest.get(strategy.placement, 0.0):
            continue
        faster = kind not in seen and typical > quickest.get(strategy.placement, 0.0)
        saves = needed < _MEANINGFUL_SAVING * least.get(strategy.placement, float("inf"))
        if strategy.placement not in least or saves or faster:
            kept.append(each)
            seen.add(kind)
            quickest[strategy.placement] = max(typical, quickest.get(strategy.placement, 0.0))
            least[strategy.placement] = min(needed, least.get(strategy.placement, needed))
        if len(kept) == MOST_CANDIDATES:
            break
    return kept


def _candidate(field: Field, scored: Scored, place: int, fastest: float | None) -> Candidate:
    return Candidate(
        rank=place,
        strategy=scored.strategy,
        engine=scored.strategy.engine,
        device_map=scored.estimate.placement.device_map,
        estimate=scored.estimate,
        speed=scored.estimate.speed,
        reasons=reasons(field, scored, fastest),
    )


def _with_hint(field: Field, candidate: Candidate, ask: Callable[[Strategy], Estimate]) -> Candidate:
    """A candidate that says what a recorded decode step over a static cache would give."""
    static = replace(candidate.strategy, cache="static")
    if candidate.strategy.placement != "full_gpu" or candidate.strategy.cache != "dynamic":
        return candidate
    if field.workload.task != "infer" or not is_legal(field.arch, field.machine, field.workload, static):
        return candidate
    text = static_text(Scored(candidate.strategy, candidate.estimate), Scored(static, ask(static)))
    return replace(candidate, reasons=(*candidate.reasons, text)) if text else candidate


def _passed_over(field: Field, scored: Scored, kept: Sequence[Scored], fastest: float | None) -> Rejected:
    """A way that fits and is no alternative: named beside the nearest candidate that beats it."""
    strategy = scored.strategy
    alike = [
        n
        for n, other in enumerate(kept, start=1)
        if (other.strategy.placement, other.strategy.quant) == (strategy.placement, strategy.quant)
    ]
    number = alike[0] if alike else 1
    clause = compared(field, kept[number - 1], scored, fastest)
    return Rejected(
        strategy=strategy,
        reason=f"{scored.estimate.verdict}, but beside candidate {number} no alternative: {clause}",
        process_bytes=_on_cards(scored.estimate),
    )


def _least_of_each(failing: Sequence[Scored], kept: Sequence[Scored]) -> list[Scored]:
    """Of each placement and precision that does not fit in any form, the form that needs least."""
    fits = {(s.strategy.placement, s.strategy.quant) for s in kept}
    least: dict[tuple[str, str], Scored] = {}
    for each in failing:
        kind = (each.strategy.placement, each.strategy.quant)
        if kind in fits:
            continue
        if kind not in least or footprint(each.estimate) < footprint(least[kind].estimate):
            least[kind] = each
    return list(least.values())


def _needs(model: ModelProfile, field: Field, scored: Scored, ask: Estimator) -> str:
    """What would make a way fit, changes of the job included."""
    if scored.estimate.verdict != "does_not_fit":
        return need_text(scored.estimate, field.machine)
    changes = what_would_fit(model, field.machine, field.workload, scored.strategy, ask)
    return "; or ".join((need_text(scored.estimate, field.machine), *changes))
