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
_BITS = 64
_ADDRESS = (1 << _BITS) - 1


class Allocator:
    """Requests over 1 MiB of one run: what they book and reserve, now and at most.

    A block is its address; of free blocks of one size the lowest is taken, and segments lie one above the
    other in the order in which they were taken. `thrifty`: segments that are wholly free go back before a new
    one is taken, as under the tightest cap that works.
    """

    def __init__(self, reserved: int = 0) -> None:
        """`reserved`: bytes of a block that is there, free, from the beginning."""
        self.allocated = self.reserved = self.allocated_peak = self.reserved_peak = 0
        self.thrifty = False
        self._end = 0
        self._size: dict[int, int] = {}
        self._before: dict[int, int] = {}
        """The block below in the same segment, by block; the one above begins where a block ends."""
        self._last: set[int] = set()
        """Blocks at the end of a segment."""
        self._free: set[int] = set()
        self._whole: set[int] = set()
        """Free blocks that are all of a segment."""
        self._ready: list[int] = []
        """Free blocks in the order in which they are taken: by size, then by address."""
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

    def hole(self, n: int) -> None:
        """`n` bytes are free between blocks that stay."""
        if n > UNSPLIT:
            self._size[self._end], self._before[self._end] = n, NOWHERE
            self.reserved += n
            self.reserved_peak = max(self.reserved_peak, self.reserved)
            self._free.add(self._end)
            insort(self._ready, n << _BITS | self._end)
            self._end += n + 1

    def holes(self) -> list[int]:
        """Bytes of free blocks in segments that are in use."""
        return [item >> _BITS for item in self._ready if item & _ADDRESS not in self._whole]

    @property
    def state(self) -> tuple[int, ...]:
        """The free blocks: what decides where requests go."""
        return tuple(self._ready)

    def size(self, block: int) -> int:
        """Bytes of a block, what was not asked for counted in."""
        return self._size[block]

    def play(self, events: Iterable[tuple[int, int]], places: list[int]) -> None:
        """Requests (place, bytes in whole pieces of 512) and frees (place, 0) in their order. `places`: the
        blocks that are there by place, changed."""
        size, free, ready = self._size, self._free, self._ready
        allocated, peak = self.allocated, self.allocated_peak
        for place, n in events:
            if not n:
                block = places[place]
                if block >= 0:
                    places[place] = NOWHERE
                    allocated -= size[block]
                    self._release(block)
                continue
            at = bisect_left(ready, n << _BITS)
            if at < len(ready):
                block = ready.pop(at) & _ADDRESS
                free.discard(block)
                self._whole.discard(block)
            else:
                block = self._segment(n)
            if size[block] - n > UNSPLIT:
                self._split(block, n)
            allocated += size[block]
            if allocated > peak:
                peak = allocated
            places[place] = block
        self.allocated, self.allocated_peak = allocated, peak

    def empty_cache(self) -> None:
        """Give segments that are wholly free back to the driver."""
        for block in self._whole:
            n = self._size[block]
            del self._ready[bisect_left(self._ready, n << _BITS | block)]
            self.reserved -= n
        self._whole.clear()

    def mark(self) -> None:
        """Forget the peaks so far."""
        self.allocated_peak, self.reserved_peak = self.allocated, self.reserved

    def _segment(self, n: int) -> int:
        if self.thrifty:
            self.empty_cache()
        size = SHARED if n < LARGE else -(-n // SEGMENT) * SEGMENT
        self.reserved += size
        if self.reserved > self.reserved_peak:
            self.reserved_peak = self.reserved
        block, self._end = self._end, self._end + size
        self._size[block] = size
        self._last.add(block)
        return block

    def _split(self, block: int, n: int) -> None:
        rest, other = self._size[block] - n, block + n
        if block in self._last:
            self._last.discard(block)
            self._last.add(other)
        else:
            self._before[block + self._size[block]] = other
        self._before[other] = block
        self._size[block], self._size[other] = n, rest
        self._free.add(other)
        insort(self._ready, rest << _BITS | other)

    def _release(self, block: int) -> None:
        """Free a block; neighbours that are free become one with it."""
        size, free, ready, last = self._size, self._free, self._ready, self._last
        n = size[block]
        if block in last:
            end = True
        else:
            above = block + n
            end = above in last
            if above in free:
                more = size[above]
                del ready[bisect_left(ready, more << _BITS | above)]
                free.discard(above)
                last.discard(above)
                n += more
            else:
                end = False
        below = self._before.get(block, NOWHERE)
        if below in free:
            more = size[below]
            del ready[bisect_left(ready, more << _BITS | below)]
            last.discard(block)
            block, n = below, n + more
        if end:
            last.add(block)
            if block not in self._before:
                self._whole.add(block)
        else:
            self._before[block + n] = block
        size[block] = n
        free.add(block)
        insort(ready, n << _BITS | block)
