"""Order of the ways that fit.

What fits comes before what is tight; what is usable before what is too slow; then, by `--prefer`, quality
kept, speed or headroom first and the others after it. Speeds within a few per cent of each other are the same
speed; between ways that are alike so far, the one nearer the defaults wins, then the one with more to spare.
The last ties are broken by the simpler placement and the strategy's own text, so the order is total and the
same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
from msgspec import Struct

from planner.machine import free_ram
from planner.rules import lacks_sdpa
from planner.strategies import PLACEMENTS, Prefer, departures
from planner.types import GOOD, Estimate, Machine, Range, Strategy, Workload
from profiles.schema import Architecture

LEAST_DECODE_TOKENS_PER_S = 5.0
"""A person reads about this fast; slower answers are waited for."""
LEAST_TRAIN_SHARE = 0.2
"""Of the fastest way that fits: five nights instead of one."""
SPEED_STEP = 1.05
"""Predicted speeds nearer to each other than this are not told apart."""
VERDICTS = ("fits", "tight", "unknown", "does_not_fit")


class Quality(Struct, frozen=True):
    """One row of the table below: what a setting loses of the model, 0 for nothing."""

    loss: int
    reason: str


# Perplexity after weight quantization: LLM.int8 keeps it within noise (arXiv:2208.07339, table 1), NF4 loses
# a little (arXiv:2305.14314, table 2).
INFER_WEIGHTS = {
    "none": Quality(0, "weights keep their precision"),
    "int8": Quality(1, "int8 weights: within noise of 16 bits on most benchmarks"),
    "nf4": Quality(2, "NF4 weights: a small, measurable loss against 16 bits"),
}
# Adapters learn around the quantization error: NF4 QLoRA reaches 16-bit fine-tuning (arXiv:2305.14314,
# table 3), so int8 under the adapters gains nothing over NF4.
TRAIN_WEIGHTS = {
    "none": Quality(0, "weights keep their precision"),
    "int8": Quality(1, "adapters make up for the quantized weights under them"),
    "nf4": Quality(1, "adapters make up for the quantized weights under them"),
}
CACHE = {
    "dynamic": Quality(0, ""),
    "static": Quality(0, ""),
    "offloaded": Quality(0, ""),
    "quantized": Quality(1, "keys and values in 4 bits lose a little"),
}


class Scored(Struct, frozen=True):
    """A strategy with its estimate, ready to be compared."""

    strategy: Strategy
    estimate: Estimate

    @property
    def speed(self) -> Range | None:
        """The figure the task is judged by."""
        speed = self.estimate.speed
        return speed.train_tokens_per_s or speed.decode_tokens_per_s


class Field(Struct, frozen=True):
    """What every candidate of a ranking is compared in."""

    arch: Architecture
    machine: Machine
    workload: Workload
    prefer: Prefer = "quality"


def quality(arch: Architecture, workload: Workload, strategy: Strategy) -> tuple[int, ...]:
    """What a strategy loses, worst first: weights, experts, cache, attention. Smaller is better."""
    weights = TRAIN_WEIGHTS if workload.task == "train" else INFER_WEIGHTS
    return (
        weights[strategy.quant].loss,
        int(strategy.quant_experts != "none"),
        CACHE[strategy.cache].loss if workload.task == "infer" else 0,
        # sdpa leaves out a cap on attention logits, or sinks, that the model was trained with.
        int(lacks_sdpa(arch) and strategy.attention == "sdpa"),
    )


def headroom(estimate: Estimate, machine: Machine) -> float:
    """Part of the tightest budget that stays free; negative where it is exceeded or not known."""
    if estimate.gpus:
        shares = [share_left(gpu.high_bytes, gpu.budget_bytes) for gpu in estimate.gpus]
        return min(shares)
    return share_left(estimate.host.ram_bytes, free_ram(machine))


def footprint(estimate: Estimate) -> int:
    """Bytes a way needs where memory is scarce: on all cards together, or in RAM without cards."""
    if estimate.gpus:
        return sum(gpu.process_bytes for gpu in estimate.gpus)
    return estimate.host.ram_bytes


def share_left(needed: int, budget: int | None) -> float:
    """Part of a budget that stays free; -1 where it is not known."""
    return 1 - needed / budget if budget else -1.0


def usable(scored: Scored, workload: Workload, fastest: float | None, card: bool = False) -> int:
    """0 for usable, 1 for not known, 2 for too slow, 3 for the CPU where there is a card: its speed is not
    known, but that it leaves the card idle is. `fastest`: of all that fit, in training."""
    speed = scored.speed
    if speed is None:
        return 3 if card and scored.strategy.placement == "cpu" else 1
    least = LEAST_DECODE_TOKENS_PER_S if workload.task == "infer" else LEAST_TRAIN_SHARE * (fastest or 0.0)
    return 0 if speed.typical >= least else 2


def _slowness(scored: Scored, fastest: float | None) -> int:
    """Steps of 5 % behind the fastest, rounded down; more than any for an unknown speed."""
    speed = scored.speed
    if speed is None or speed.typical <= 0:
        return 10**6
    return math.floor(math.log((fastest or 1.0) / speed.typical) / math.log(SPEED_STEP))


def rank_key(field: Field, scored: Scored, fastest: float | None) -> tuple[object, ...]:
    """Sorts candidates best first; two different strategies never have equal keys."""
    lost = quality(field.arch, field.workload, scored.strategy)
    slowness = _slowness(scored, fastest)
    tightness = -round(headroom(scored.estimate, field.machine), 4)
    away = len(departures(field.machine, field.workload, scored.strategy))
    order: dict[Prefer, tuple[object, ...]] = {
        "quality": (lost, slowness, away, tightness),
        "speed": (slowness, lost, away, tightness),
        "headroom": (tightness, lost, slowness, away),
    }
    return (
        VERDICTS.index(scored.estimate.verdict),
        usable(scored, field.workload, fastest, bool(field.machine.gpus)),
        *order[field.prefer],
        PLACEMENTS.index(scored.strategy.placement),
        msgspec.json.encode(scored.strategy),
    )


def fastest_that_fits(scored: Sequence[Scored]) -> float | None:
    """Typical speed of the fastest candidate that fits or is tight; None if none has a speed."""
    speeds = [s.speed.typical for s in scored if s.speed and s.estimate.verdict in GOOD]
    return max(speeds, default=None)


def rank(field: Field, scored: Sequence[Scored]) -> list[Scored]:
    """Candidates best first."""
    fastest = fastest_that_fits(scored)
    return sorted(scored, key=lambda each: rank_key(field, each, fastest))
