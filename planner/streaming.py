"""How engine stream spreads a model over card, RAM and disk: as much stays where it is read fastest as fits.

On the card: first everything, else as many layers as surely fit beside the slots, with the token embeddings
in RAM where that lets more of them stay (a pass reads a few of their rows), and the output projection in RAM
where nothing else would fit. In RAM: what is streamed, as far as RAM goes. On disk: the rest, or under
placement disk_offload all of it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator

from planner.memory.streamed import Parts, ladders, pinned_lines
from planner.placement import Tiers
from planner.types import Strategy, Workload


def choose_residents(
    parts: Parts, high_bytes: Callable[[Tiers], int], room: int, work: Workload, how: Strategy
) -> Tiers:
    """The way that streams least of those that need at most `room` bytes of the card by `high_bytes`; where
    none does, the way that takes least."""
    everything = Tiers(parts.layers)
    if high_bytes(everything) <= room:
        return everything
    smallest = Tiers(0)
    for smallest in _outside(work, how, parts):
        found = _most_residents(parts, smallest, high_bytes, room)
        if found is not None:
            return found
    return smallest


def _outside(work: Workload, how: Strategy, parts: Parts) -> Iterator[Tiers]:
    """Which of embeddings and output projection leave the card, in the order they do.

    Embeddings go before the first layer: a pass reads a few of their rows, and every layer it streams whole.
    """
    if work.task == "train" and how.kernels == "liger":
        yield Tiers(0)  # its loss reads weights where they are
        return
    yield Tiers(0) if parts.tied else Tiers(0, embeddings_away=True)
    yield Tiers(0, embeddings_away=True, head_away=True)


def _most_residents(
    parts: Parts, outside: Tiers, high_bytes: Callable[[Tiers], int], room: int
) -> Tiers | None:
    """The most layers that stay beside `outside`; None where none may.

    Need is nearly linear in the bytes that stay: a straight line finds the number in a few steps.
    """
    ladder = ladders(parts)[outside.head_away]
    need = ladder.need

    def at_least(count: int) -> Tiers:
        return Tiers(ladder.counts[count], 0, outside.embeddings_away, outside.head_away)

    low, high = 0, parts.layers + 1
    at_low = high_bytes(at_least(0)) - room
    if at_low > 0:
        return None
    slope = 1.0
    while high - low > 1:
        guess = bisect_right(need, need[low] - int(at_low / slope), low + 1, high) - 1
        guess = min(max(guess, low + 1), high - 1)
        there = high_bytes(at_least(guess)) - room
        slope = max(1.0, (there - at_low) / max(1, need[guess] - need[low]))
        if there > 0:
            high = guess
        else:
            low, at_low = guess, there
    return at_least(low)


def spread_over_disk(parts: Parts, tiers: Tiers, how: Strategy, most_pinned: int | None) -> Tiers:
    """The same with layers on disk: all that are streamed where the placement says so, else those for which
    `most_pinned` bytes of page-locked RAM have no room. None: as many as there are."""
    streamed = parts.layers - tiers.resident
    if how.placement == "disk_offload":
        return _on_disk(tiers, streamed)
    if most_pinned is None or _pinned(parts, tiers) <= most_pinned:
        return tiers
    if _pinned(parts, _on_disk(tiers, streamed)) > most_pinned:
        return tiers  # the disk would not make it fit
    low, high = 0, streamed
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (
            (low, middle) if _pinned(parts, _on_disk(tiers, middle)) <= most_pinned else (middle, high)
        )
    return _on_disk(tiers, high)


def _on_disk(tiers: Tiers, count: int) -> Tiers:
    return Tiers(tiers.resident, count, tiers.embeddings_away, tiers.head_away)


def _pinned(parts: Parts, tiers: Tiers) -> int:
    return sum(item.bytes for item in pinned_lines(parts, tiers))
