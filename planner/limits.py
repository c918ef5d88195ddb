"""The longest context and the largest batch that still fit: a search on the estimator.

More tokens never need less memory, so what fits is everything up to a point. Memory is nearly linear in
tokens, so the point is guessed from what is left at both ends and found in a handful of estimates.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct
from msgspec.structs import replace

from planner.estimate import estimate, floor
from planner.machine import budget
from planner.types import Estimate, Machine, Strategy, Workload
from profiles.schema import ModelProfile

MOST_BATCH = 65536
MOST_CONTEXT = 2**20
"""Looked at where the model names no longest context."""
_EXACT_BELOW = 64
_STEP = 64
_GUESSES = 3
_HOLES = {"infer": 0.4, "train": 0.07}
"""About what `high_bytes` adds to what a run takes beside its weights; the number of guesses depends on
it."""

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
        return _left(ask, model, machine, replace(workload, **changed), strategy)

    if most < least:
        return None
    now = workload.seq_len if train else workload.prompt_tokens + workload.new_tokens
    found = largest(left, least, most, _STEP, now)
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
        return _left(ask, model, machine, replace(workload, batch_size=batch), strategy)

    return largest(left, 1, most, 1, workload.batch_size)


def _left(ask: Ask, model: ModelProfile, machine: Machine, work: Workload, how: Strategy) -> int:
    """`spare_bytes` of a job; where a card is too small even for a run without holes, about what it lacks."""
    if ask is estimate and (least := floor(model, machine, work, how)) is not None:
        room = budget(machine.gpus[0])[0]
        if least.process_bytes > room:
            return room - least.process_bytes - int(_HOLES[work.task] * least.passing_bytes)
    return spare_bytes(ask(model, machine, work, how))


def spare_bytes(estimate: Estimate) -> int:
    """What the tightest card has left; negative, at least -1, where the verdict is not `fits`."""
    left = min((gpu.budget_bytes - gpu.high_bytes for gpu in estimate.gpus if gpu.budget_bytes), default=0)
    return max(0, left) if estimate.verdict == "fits" else min(-1, left)


def largest(
    left: Callable[[int], int], least: int, most: int, step: int, start: int | None = None
) -> int | None:
    """The largest number from `least` to `most` for which `left` is not negative, to within `step`; None if
    there is none. `left` never grows with its argument. `start`: a number in between that is looked at first,
    as what is known already.

    >>> largest(lambda n: 1000 - n, 1, 10**6, 1)
    1000
    """
    low, high = least, most
    at_first = left(first := least if start is None else min(max(start, least), most))
    if at_first < 0:
        if first == least or (at_low := left(least)) < 0:
            return None
        high, at_high = first, at_first
    else:
        low, at_low = first, at_first
        if first == most or (at_high := left(most)) >= 0:
            return most
    guesses, width, towards = 0, high - low, 0
    while high - low > (grain := step if low > least + _EXACT_BELOW else 1):
        guesses += 1
        if guesses % _GUESSES:
            probe = _beyond_crossing(low, high, at_low, at_high, grain, towards)
        else:
            # Where memory is no line, halving bounds the number of estimates.
            halve, width = 4 * (high - low) > width, high - low
            probe = (
                (low + high) // 2 if halve else _beyond_crossing(low, high, at_low, at_high, grain, towards)
            )
        at_probe = left(probe)
        if at_probe < 0:
            high, at_high, towards = probe, at_probe, -1
        else:
            low, at_low, towards = probe, at_probe, 1
    return low


def _beyond_crossing(low: int, high: int, at_low: int, at_high: int, grain: int, towards: int) -> int:
    """Where a straight line between both ends crosses zero, as the method of false position has it, and a
    little further on: the end that moved last (`towards` the other: 1 for `low`, -1 for `high`) is near
    already, so that the other comes near too."""
    crossing = low + (high - low) * at_low // (at_low - at_high)
    if towards > 0:
        crossing += max(grain // 2, 1, (crossing - low) // 16)
    elif towards < 0:
        crossing -= (high - crossing) // 16
    room = min(grain, (high - low) // 2)
    return min(max(crossing, low + room), high - room)
