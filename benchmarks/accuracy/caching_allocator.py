"""torch's caching allocator on made-up addresses: what a sequence of requests reserves, and under which cap.

Rules of c10/cuda/CUDACachingAllocator.cpp (torch 2.11) with its default settings: requests are rounded up to
512 bytes; up to 1 MiB they come from segments of 2 MiB, below 10 MiB from segments of 20 MiB, above from
segments of their own size in steps of 2 MiB. The smallest free block that is large enough is taken, and split
where more than 1 MiB (512 bytes in small segments) is left. Where a new segment would exceed the cap, all
segments that are wholly free go back first. One stream, no garbage collection threshold.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable

from planner.memory.tape import rounded
from planner.units import MIB

SMALL = MIB
SMALL_SEGMENT = 2 * MIB
LARGE_SEGMENT = 20 * MIB
OWN_SEGMENT_FROM = 10 * MIB
GRANULE = 2 * MIB
WITHOUT_CAP = 1 << 60

Event = tuple[Hashable, int]
"""A name and its bytes where it is allocated, or 0 where it is freed."""


class OutOfMemory(Exception):
    """A request did not fit under the cap."""


class _Block:
    __slots__ = ("free", "key", "large", "next", "previous", "size")

    def __init__(self, size: int, large: bool) -> None:
        self.size, self.large, self.free = size, large, True
        self.previous: _Block | None = None
        self.next: _Block | None = None
        self.key = (0, 0)


class CachingAllocator:
    """Requests and frees; `allocated` and `reserved` bytes now, and the most there were.

    `base`: bytes that are there from the beginning and stay, in full segments.
    """

    def __init__(self, cap: int = WITHOUT_CAP, base: int = 0) -> None:
        self.cap, self._number = cap, 0
        self._free: dict[bool, list[tuple[int, int, _Block]]] = {False: [], True: []}
        self.allocated = self.reserved = self.allocated_peak = self.reserved_peak = base

    def request(self, n: int) -> _Block:
        """A block of at least `n` bytes. Errors: `OutOfMemory`."""
        n = rounded(n)
        large = n > SMALL
        pool = self._free[large]
        at = bisect_left(pool, (n, -1))
        block = pool.pop(at)[2] if at < len(pool) else self._segment(n, large)
        rest = block.size - n
        if rest > SMALL or (not large and rest):
            self._split(block, n)
        block.free = False
        self.allocated += block.size
        self.allocated_peak = max(self.allocated_peak, self.allocated)
        return block

    def give(self, block: _Block) -> None:
        """Free a block; neighbours that are free become one with it."""
        self.allocated -= block.size
        for near in (block.previous, block.next):
            if near is not None and near.free:
                self._take(near)
                if near is block.previous:
                    block.previous = near.previous
                    if near.previous is not None:
                        near.previous.next = block
                else:
                    block.next = near.next
                    if near.next is not None:
                        near.next.previous = block
                block.size += near.size
        self._put(block)

    def play(self, events: Iterable[Event], blocks: dict[Hashable, _Block]) -> dict[Hashable, _Block]:
        """Go through `events`; `blocks`: those that are there by name, changed and handed back."""
        for name, n in events:
            if n:
                blocks[name] = self.request(n)
            else:
                self.give(blocks.pop(name))
        return blocks

    def empty_cache(self) -> None:
        """Give segments that are wholly free back to the driver."""
        for large, pool in self._free.items():
            whole = [item for item in pool if item[2].previous is None and item[2].next is None]
            self.reserved -= sum(size for size, _, _ in whole)
            gone = {number for _, number, _ in whole}
            self._free[large] = [item for item in pool if item[1] not in gone]

    def _segment(self, n: int, large: bool) -> _Block:
        own = -(-n // GRANULE) * GRANULE
        size = SMALL_SEGMENT if not large else LARGE_SEGMENT if n < OWN_SEGMENT_FROM else own
        if self.reserved + size > self.cap:
            self.empty_cache()
            if self.reserved + size > self.cap:
                raise OutOfMemory(n)
        self.reserved += size
        self.reserved_peak = max(self.reserved_peak, self.reserved)
        return _Block(size, large)

    def _split(self, block: _Block, n: int) -> None:
        rest = _Block(block.size - n, block.large)
        rest.previous, rest.next = block, block.next
        if block.next is not None:
            block.next.previous = rest
        block.next, block.size = rest, n
        self._put(rest)

    def _put(self, block: _Block) -> None:
        block.free = True
        self._number += 1
        block.key = (block.size, self._number)
        insort(self._free[block.large], (*block.key, block), key=lambda item: item[:2])

    def _take(self, block: _Block) -> None:
        pool = self._free[block.large]
        del pool[bisect_left(pool, block.key, key=lambda item: item[:2])]


def replay(events: Iterable[Event], cap: int = WITHOUT_CAP, base: int = 0) -> CachingAllocator:
    """The allocator after `events`. Errors: `OutOfMemory`; `KeyError` for a free without a request."""
    allocator = CachingAllocator(cap, base)
    allocator.play(events, {})
    return allocator


def smallest_cap(events: list[Event], base: int = 0, tolerance: float = 0.002) -> int:
    """The smallest cap under which `events` go through, to `tolerance` of their allocated peak.

    >>> smallest_cap([("a", 64 * MIB), ("b", 64 * MIB), ("a", 0), ("c", 64 * MIB)]) // MIB
    128
    """
    freely = replay(events, base=base)
    low, high = freely.allocated_peak - 1, freely.reserved_peak
    while high - low > tolerance * freely.allocated_peak:
        middle = (low + high) // 2
        try:
            replay(events, middle, base)
            high = middle
        except OutOfMemory:
            low = middle
    return high
