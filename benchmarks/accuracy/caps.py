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
    low: int, high: int, attempt: Callable[[int], bool], tolerance: float = 0.005, most: int = 16
) -> Cap:
    """Bisect between `low` (fails by definition: the allocated peak) and `high` (what a free run reserved).

    The first caps lie 0.5, 1, 2, 4, ... % above `low`, because most jobs need little more; the gap found
    there is halved until it is at most `tolerance` of `low`, or a piece of the driver. `high` itself is
    tried only when everything below has failed, then up to twice as much.

    >>> smallest_cap(1000 * GRANULE, 1300 * GRANULE, lambda cap: cap >= 1033 * GRANULE).worked_bytes / GRANULE
    1035.0
    >>> smallest_cap(1000 * GRANULE, 1300 * GRANULE, lambda cap: True)
    Cap(failed_bytes=2097152000, worked_bytes=2107637760, attempts=1)

    Errors: `NoCapWorks` when `most` attempts, or twice `high`, have shown none.
    """
    failed, worked, attempts = low, None, 0
    step = tolerance
    while worked is None:
        if attempts >= most or failed >= 2 * max(high, low):
            raise NoCapWorks(f"still out of memory under {failed} bytes")
        cap = whole_pieces(low * (1 + step))
        cap = max(cap, failed + GRANULE)
        if failed < high < cap:
            cap = max(whole_pieces(high), failed + GRANULE)
        attempts += 1
        if attempt(cap):
            worked = cap
        else:
            failed, step = cap, 2 * step
    precision = GRANULE + tolerance * low  # a cap is rounded up to whole pieces
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
