"""The questions asked the other way round: which cards carry a job, and which models a machine carries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from msgspec import Struct

from planner.errors import BadConfig, BadOption
from planner.estimate import architecture_of, floor
from planner.estimate import estimate as estimate_job
from planner.machine import budget, free_ram, machine_from_gpus
from planner.memory.weights import weight_bytes
from planner.rank import INFER_WEIGHTS, TRAIN_WEIGHTS, Scored, fastest_that_fits, usable
from planner.search import Estimator
from planner.strategies import QUANTS, legal_strategies
from planner.types import GOOD, Estimate, Machine, Strategy, Workload
from profiles.schema import GpuProfile, ModelProfile


class CardFit(Struct, frozen=True):
    """A card that carries a job entirely."""

    gpu: GpuProfile
    strategy: Strategy
    estimate: Estimate


class ModelFit(Struct, frozen=True):
    """The best way a machine carries one model."""

    model: ModelProfile
    strategy: Strategy
    estimate: Estimate
    usable: bool
    """Fast enough, as the ranking of plans has it; true where the speed is not known."""


def smallest_cards(
    model: ModelProfile,
    workload: Workload,
    cards: Iterable[GpuProfile],
    *,
    pinned: Mapping[str, Any] | None = None,
    count: int = 3,
    estimator: Estimator = estimate_job,
) -> list[CardFit]:
    """The cards with least memory on which a job fits (not just barely), smallest first.

    Of equal memory the cheaper at launch comes first, then the newer. `pinned`: fields of `Strategy` the user
    fixed; placement is full_gpu.
    """
    found: list[CardFit] = []
    fixed = {**(pinned or {}), "placement": "full_gpu"}
    for card in sorted(cards, key=_size_price_age):
        if len(found) == count:
            break
        fit = _fit(model, machine_from_gpus([(card, 1)]), workload, fixed, ("fits",), estimator)
        if fit is not None:
            found.append(CardFit(card, fit.strategy, fit.estimate))
    return found


def _size_price_age(card: GpuProfile) -> tuple[int, float, str, str]:
    price = float("inf") if card.launch_price_usd is None else float(card.launch_price_usd)
    newest_first = "".join(chr(255 - ord(c)) for c in card.launch_date or "")
    return (card.memory_bytes, price, newest_first or chr(256), card.id)


def models_for(
    machine: Machine,
    workload: Workload,
    models: Iterable[ModelProfile],
    *,
    pinned: Mapping[str, Any] | None = None,
    estimator: Estimator = estimate_job,
) -> list[ModelFit]:
    """What a machine can run or train, best first: fits before tight, usable before slow, then the larger
    model, then the weights that lose less. Models that cannot be described are left out.
    """
    fixed = {"placement": "full_gpu" if machine.gpus else "cpu", **(pinned or {})}
    fits = []
    for model in models:
        try:
            fit = _fit(model, machine, workload, fixed, GOOD, estimator)
        except (BadConfig, BadOption):
            continue
        if fit is not None:
            fits.append((model, fit))
    fastest = fastest_that_fits([fit for _, fit in fits]) if workload.task == "infer" else None
    table = TRAIN_WEIGHTS if workload.task == "train" else INFER_WEIGHTS
    out = [
        ModelFit(model, fit.strategy, fit.estimate, usable(fit, workload, fastest) != 2)
        for model, fit in fits
    ]
    return sorted(
        out,
        key=lambda each: (
            GOOD.index(each.estimate.verdict),
            not each.usable,
            -(each.model.parameters or 0),
            table[each.strategy.quant].loss,
            each.model.id,
        ),
    )


def _fit(
    model: ModelProfile,
    machine: Machine,
    workload: Workload,
    fixed: Mapping[str, Any],
    good: Sequence[str],
    estimator: Estimator,
) -> Scored | None:
    """The first way that fits, precise weights and defaults tried first; else the first that is tight."""
    arch = architecture_of(model)
    room = _room(machine, workload)
    table = TRAIN_WEIGHTS if workload.task == "train" else INFER_WEIGHTS
    tight: Scored | None = None
    for quant in sorted(QUANTS, key=lambda q: (table[q].loss, q != "nf4")):
        if fixed.get("quant", quant) != quant:
            continue
        try:
            legal, _ = legal_strategies(arch, machine, workload, {**fixed, "quant": quant})
        except BadOption:
            continue
        for strategy in legal:
            loaded = weight_bytes(arch, strategy.quant, strategy.quant_experts, strategy.dtype)
            if room is not None and loaded.total(arch.order) > room:
                break
            if estimator is estimate_job and _too_large(model, machine, workload, strategy, good):
                continue
            scored = Scored(strategy, estimator(model, machine, workload, strategy))
            if scored.estimate.verdict == "fits":
                return scored
            if scored.estimate.verdict == "tight" and "tight" in good:
                tight = tight or scored
    return tight


def _too_large(
    model: ModelProfile, machine: Machine, workload: Workload, strategy: Strategy, good: Sequence[str]
) -> bool:
    """Is a verdict among `good` out of the question, without asking the allocator?"""
    least = floor(model, machine, workload, strategy)
    if least is None:
        return False
    return (least.low_bytes if "tight" in good else least.process_bytes) > budget(machine.gpus[0])[0]


def _room(machine: Machine, workload: Workload) -> int | None:
    """Bytes that weights could take at most: all cards for inference, one for training, RAM without cards."""
    if not machine.gpus:
        return free_ram(machine)
    budgets = [budget(gpu)[0] for gpu in machine.gpus]
    return sum(budgets) if workload.task == "infer" else min(budgets)
