"""The smallest allocator cap under which a job still runs, searched inside one process.

Pure: what is tried, and in what order, is decided here; `attempt(cap)` runs the job and says whether it
worked. Memory is monotone only roughly (a larger cap can fragment differently), so what is reported is an
observed pair: a cap that failed and a larger one that worked, `tolerance` apart.
"""

from __future__ import annotations

from collections.abc import Callable

from msgspec import Struct

GRANULE = 2 * 2**20
"""The driver hands out device memory in pieces of this size: caps in between are the same cap."""


class Cap(Struct, frozen=True):
    """The bracket of the smallest working cap."""

    failed_bytes: int
    """The largest cap that is known to fail: below the allocated peak nothing can work."""
    worked_bytes: int
    """The smallest cap that was seen to work."""
    attempts: int


class NoCapWorks(Exception):
    """The job did not even run under the upper bound."""


def whole_pieces(n: float) -> int:
    """`n` bytes in whole pieces of the driver, rounded up."""
    return -(-int(n) // GRANULE) * GRANULE


def smallest_cap(
    low: int,
    high: int,
    attempt: Callable[[int], bool],
    guess: int = 0,
    tolerance: float = 0.005,
    most: int = 16,
) -> Cap:
    """Bisect between `low` (fails by definition: the allocated peak) and `high` (what a free run reserved).

    The first cap tried is `guess`, or 0.5 % above `low`. From there the steps double, downwards after a cap
    that worked and upwards after one that failed; the gap found is halved until it is at most `tolerance` of
    `low`, or a piece of the driver. What is reported was observed, wherever the search began.

    >>> smallest_cap(1000 * GRANULE, 1300 * GRANULE, lambda cap: cap >= 1033 * GRANULE).worked_bytes / GRANULE
    1035.0
    >>> smallest_cap(1000 * GRANULE, 1300 * GRANULE, lambda cap: cap >= 1033 * GRANULE, 1035 * GRANULE)
    Cap(failed_bytes=2160066560, worked_bytes=2170552320, attempts=2)
    >>> smallest_cap(1000 * GRANULE, 1300 * GRANULE, lambda cap: True)
    Cap(failed_bytes=2097152000, worked_bytes=2107637760, attempts=1)

    Errors: `NoCapWorks` when `most` attempts, or twice `high`, have shown none.
    """
    precision = GRANULE + tolerance * low  # a cap is rounded up to whole pieces
    first = max(whole_pieces(max(guess, low * (1 + tolerance))), low + GRANULE)
    step = max(tolerance * low, GRANULE)
    if attempt(first):
        found = _below(Cap(low, first, 1), attempt, step, precision)
    else:
        found = _above(first, max(high, low), attempt, step, most)
    return _narrowed(found, attempt, precision, most)


def _below(found: Cap, attempt: Callable[[int], bool], step: float, precision: float) -> Cap:
    """Lower a cap that worked by growing steps until one fails or nothing is left to try."""
    failed, worked, attempts = found.failed_bytes, found.worked_bytes, found.attempts
    while worked - failed > precision:
        cap = whole_pieces(worked - step)
        if cap <= failed:
            break
        attempts += 1
        if not attempt(cap):
            return Cap(cap, worked, attempts)
        worked, step = cap, 2 * step
    return Cap(failed, worked, attempts)


def _above(failed: int, high: int, attempt: Callable[[int], bool], step: float, most: int) -> Cap:
    """Raise a cap that failed by growing steps until one works; `high` is not passed over."""
    attempts = 1
    while attempts < most and failed < 2 * high:
        wanted = failed + step
        cap = max(whole_pieces(high if failed < high < wanted else wanted), failed + GRANULE)
        attempts += 1
        if attempt(cap):
            return Cap(failed, cap, attempts)
        failed, step = cap, 2 * step
    raise NoCapWorks(f"still out of memory under {failed} bytes")


def _narrowed(found: Cap, attempt: Callable[[int], bool], precision: float, most: int) -> Cap:
    """Halve the gap until it is at most `precision` bytes."""
    failed, worked, attempts = found.failed_bytes, found.worked_bytes, found.attempts
    while worked - failed > precision and attempts < most:
        middle = whole_pieces((failed + worked) / 2)
        if not failed < middle < worked:
            break
        attempts += 1
        if attempt(middle):
            worked = middle
        else:
            failed = middle
    return Cap(failed, worked, attempts)
