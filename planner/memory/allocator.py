"""torch's caching allocator on made-up addresses: what requests over 1 MiB book and reserve.

Rules of c10/cuda/CUDACachingAllocator.cpp (torch 2.11) with its default settings, for one stream: requests
are rounded up to 512 bytes; below 10 MiB they come from segments of 20 MiB, above from segments of their own
size in steps of 2 MiB. The smallest free block that is large enough is taken, and what is left is split off
where it is more than 1 MiB. Blocks up to 1 MiB have segments of their own and are always split: they are
exact, and not followed here.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

from planner.memory.tape import LARGE, SEGMENT, UNSPLIT, rounded
from planner.units import MIB

SHARED = 20 * MIB
"""A segment for requests under 10 MiB."""
NOWHERE = -1
"""No block."""
AT_ONCE = -1
"""Place of a block that is freed before anything else happens."""
_BITS = 64
_ADDRESS = (1 << _BITS) - 1
_TOP = 1 << 62
"""Above every address that is counted upwards."""


def size_of(block: int) -> int:
    """Bytes of a block, what was not asked for counted in."""
    return block >> _BITS


def address_of(block: int) -> int:
    """Where a block begins."""
    return block & _ADDRESS


class Allocator:
    """Requests over 1 MiB of one run: what they book and reserve, now and at most.

    A block is one number, its bytes above its address, so that blocks sort as they are taken: the smallest
    first, of one size the lowest. Segments lie one above the other in the order in which they were taken,
    with a byte in between: blocks that touch are of one segment. `thrifty`: segments that are wholly free go
    back before a new one is taken, as under the tightest cap that works. `downwards`: each segment lies below
    the one before, as the driver mostly hands out addresses.
    """

    __slots__ = (
        "_end",
        "_ends",
        "_ready",
        "_segments",
        "_starts",
        "_whole",
        "allocated",
        "allocated_peak",
        "downwards",
        "reserved",
        "reserved_peak",
        "thrifty",
        "wasteful",
    )

    def __init__(self, reserved: int = 0, downwards: bool = False) -> None:
        """`reserved`: bytes of a block that is there, free, from the beginning."""
        self.allocated = self.reserved = self.allocated_peak = self.reserved_peak = 0
        self.thrifty, self.downwards = False, downwards
        self.wasteful = False
        """Was a segment taken while another was wholly free? Without, a thrifty run goes the same way."""
        self._end = 0
        self._ready: list[int] = []
        """Free blocks, sorted; the same by where they begin and by where they end:"""
        self._starts: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._segments: dict[int, int] = {}
        """Bytes of segments that can go back, by address."""
        self._whole: set[int] = set()
        """Blocks that were all of a segment when they were freed."""
        if reserved > UNSPLIT:
            self._release(self._segment(reserved))

    def request(self, n: int) -> int:
        """A block for `n` bytes; `NOWHERE` for a small one."""
        if n <= UNSPLIT:
            return NOWHERE
        places = [NOWHERE]
        self.play(((0, rounded(n)),), places)
        return places[0]

    def give(self, block: int) -> None:
        """Free a block."""
        if block != NOWHERE:
            self.play(((0, 0),), [block])

    def keep(self, sizes: Iterable[int]) -> list[int]:
        """Blocks for requests of so many bytes in their order, small ones left out."""
        large = [rounded(n) for n in sizes if n > UNSPLIT]
        places = [NOWHERE] * len(large)
        self.play(enumerate(large), places)
        return places

    def give_all(self, blocks: list[int]) -> None:
        """Free blocks in their order."""
        self.play([(place, 0) for place in range(len(blocks))], blocks)

    def hole(self, n: int) -> None:
        """`n` bytes are free between blocks that stay."""
        if n > UNSPLIT:
            self.reserved += n
            self.reserved_peak = max(self.reserved_peak, self.reserved)
            self._release(n << _BITS | self._end)
            self._end += n + 1

    def holes(self) -> list[int]:
        """Bytes of free blocks in segments that are in use."""
        whole = set(self._whole_segments())
        return [size_of(block) for block in self._ready if block not in whole]

    @property
    def state(self) -> tuple[int, ...]:
        """The free blocks: what decides where requests go."""
        return tuple(self._ready)

    def play(self, events: Iterable[tuple[int, int]], places: list[int]) -> None:
        """Requests (place, bytes in whole pieces of 512) and frees (place, 0) in their order, and blocks that
        are freed at once (`AT_ONCE`, bytes). `places`: the blocks that are there by place, changed."""
        ready, starts, ends = self._ready, self._starts, self._ends
        segments, whole = self._segments, self._whole
        allocated, peak = self.allocated, self.allocated_peak
        for place, n in events:
            if n:
                at = bisect_left(ready, n << _BITS)
                if at == len(ready):
                    self._release(self._segment(n))
                    at = bisect_left(ready, n << _BITS)
                block = ready[at]
                there = block >> _BITS
                rest = there - n
                used = n if rest > UNSPLIT else there
                if allocated + used > peak:
                    peak = allocated + used
                if place == AT_ONCE:
                    continue
                allocated += used
                start = block & _ADDRESS
                del starts[start]
                if rest > UNSPLIT:
                    # the upper part stays free, mostly in its place; it ends where the whole did
                    places[place] = n << _BITS | start
                    start += n
                    left = rest << _BITS | start
                    starts[start] = ends[start + rest] = left
                    if at == 0 or ready[at - 1] < left:
                        ready[at] = left
                    else:
                        del ready[at]
                        insort(ready, left)
                else:
                    places[place] = block
                    del ends[start + there], ready[at]
            elif (block := places[place]) >= 0:
                places[place] = NOWHERE
                n, start = block >> _BITS, block & _ADDRESS
                allocated -= n
                end, at = start + n, -1
                # neighbours that are free become one with it, mostly in their place
                if end in starts:
                    other = starts.pop(end)
                    at = bisect_left(ready, other)
                    end += other >> _BITS
                if start in ends:
                    other = ends.pop(start)
                    if at >= 0:
                        del ready[at]
                    at = bisect_left(ready, other)
                    start = other & _ADDRESS
                n = end - start
                block = n << _BITS | start
                starts[start] = ends[end] = block
                if at < 0:
                    insort(ready, block)
                elif at + 1 == len(ready) or block < ready[at + 1]:
                    ready[at] = block
                else:
                    del ready[at]
                    insort(ready, block)
                if start in segments and segments[start] == n:
                    whole.add(block)
        self.allocated, self.allocated_peak = allocated, peak

    def empty_cache(self) -> None:
        """Give segments that are wholly free back to the driver."""
        for block in self._whole_segments():
            n, start = block >> _BITS, block & _ADDRESS
            del self._ready[bisect_left(self._ready, block)], self._starts[start], self._ends[start + n]
            del self._segments[start]
            self.reserved -= n
        self._whole.clear()

    def mark(self) -> None:
        """Forget the peaks so far."""
        self.allocated_peak, self.reserved_peak = self.allocated, self.reserved

    def _whole_segments(self) -> list[int]:
        """Free blocks that are all of a segment."""
        return [block for block in self._whole if self._starts.get(block & _ADDRESS) == block]

    def _segment(self, n: int) -> int:
        """A new segment for a request of `n` bytes."""
        if self.thrifty and self._whole:
            self.empty_cache()
        elif not self.wasteful and self._whole:
            self.wasteful = bool(self._whole_segments())
            if not self.wasteful:
                self._whole.clear()  # all of them are in use by now
        size = SHARED if n < LARGE else -(-n // SEGMENT) * SEGMENT
        self.reserved += size
        if self.reserved > self.reserved_peak:
            self.reserved_peak = self.reserved
        start, self._end = self._end, self._end + size + 1
        if self.downwards:
            start = _TOP - self._end
        self._segments[start] = size
        return size << _BITS | start

    def _release(self, block: int) -> None:
        """Free a block that has no free neighbours."""
        start = block & _ADDRESS
        self._starts[start] = self._ends[start + (block >> _BITS)] = block
        insort(self._ready, block)
        if start in self._segments:
            self._whole.add(block)
