"""The longest context and the largest batch that still fit: a search on the estimator.

More tokens never need less memory, so what fits is everything up to a point. Memory is nearly linear in
tokens, so the point is guessed from what is left at both ends and found in a handful of estimates.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct
from msgspec.structs import replace

from planner.estimate import estimate
from planner.types import Estimate, Machine, Strategy, Workload
from profiles.schema import ModelProfile

MOST_BATCH = 65536
MOST_CONTEXT = 2**20
"""Looked at where the model names no longest context."""
_EXACT_BELOW = 64
_STEP = 64

Ask = Callable[[ModelProfile, Machine, Workload, Strategy], Estimate]


class Limits(Struct, frozen=True):
    """The most that fits, each with the rest of the job unchanged; None where nothing fits."""

    context_tokens: int | None
    """Prompt and new tokens together, or tokens of a training sequence."""
    batch_size: int | None
    context_capped: bool = False
    """The model ends before the memory does."""


def limits(
    model: ModelProfile,
    machine: Machine,
    workload: Workload,
    strategy: Strategy,
    ask: Ask = estimate,
) -> Limits:
    """Longest context and largest batch with which a strategy fits (not tight)."""
    most = model.context_tokens or MOST_CONTEXT
    context = longest_context(model, machine, workload, strategy, ask, most)
    batch = largest_that_fits(model, machine, workload, strategy, ask)
    return Limits(context, batch, context == most)


def longest_context(
    model: ModelProfile, machine: Machine, workload: Workload, strategy: Strategy, ask: Ask, most: int
) -> int | None:
    """Most tokens of one sequence, up to `most`, in steps of 64; None if even the shortest does not fit."""
    train = workload.task == "train"
    least = 1 if train else workload.new_tokens + 1

    def left(tokens: int) -> int:
        changed = {"seq_len": tokens} if train else {"prompt_tokens": tokens - workload.new_tokens}
        return spare_bytes(ask(model, machine, replace(workload, **changed), strategy))

    if most < least:
        return None
    found = largest(left, least, most, _STEP)
    if found is None or found == most or found < least + _EXACT_BELOW:
        return found
    return max(least, found // _STEP * _STEP)


def largest_that_fits(
    model: ModelProfile,
    machine: Machine,
    workload: Workload,
    strategy: Strategy,
    ask: Ask,
    most: int = MOST_BATCH,
) -> int | None:
    """Most sequences of one batch; None if a single one does not fit."""

    def left(batch: int) -> int:
        return spare_bytes(ask(model, machine, replace(workload, batch_size=batch), strategy))

    return largest(left, 1, most, 1)


def spare_bytes(estimate: Estimate) -> int:
    """What the tightest card has left; negative, at least -1, where the verdict is not `fits`."""
    left = min((gpu.budget_bytes - gpu.high_bytes for gpu in estimate.gpus if gpu.budget_bytes), default=0)
    return max(0, left) if estimate.verdict == "fits" else min(-1, left)


def largest(left: Callable[[int], int], least: int, most: int, step: int) -> int | None:
    """The largest number from `least` to `most` for which `left` is not negative, to within `step`; None if
    there is none. `left` never grows with its argument.

    >>> largest(lambda n: 1000 - n, 1, 10**6, 1)
    1000
    """
    low, high = least, most
    at_low = left(low)
    if at_low < 0:
        return None
    at_high = left(high)
    if at_high >= 0:
        return most
    guesses = 0
    while high - low > (grain := step if low > least + _EXACT_BELOW else 1):
        guesses += 1
        if guesses % 3:
            # Where a straight line between both ends crosses zero, as the method of false position has it.
            crossing = low + (high - low) * at_low // (at_low - at_high)
            probe = min(max(crossing, low + grain), high - grain)
        else:
            # A third guess is needed where memory is no line; halving then bounds the number of estimates.
            probe = (low + high) // 2
        probe = min(max(probe, low + 1), high - 1)
        at_probe = left(probe)
        if at_probe < 0:
            high, at_high, at_low = probe, at_probe, at_low // 2
        else:
            low, at_low, at_high = probe, at_probe, min(-1, at_high // 2)
    return low
