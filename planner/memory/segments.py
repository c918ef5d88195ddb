"""Bytes of large blocks that torch's caching allocator hands out with a tensor and does not split off.

A request over 1 MiB takes the smallest free block that is large enough, and the rest is cut off only where it
is more than 1 MiB (c10/cuda/CUDACachingAllocator.cpp: get_free_block, should_split). Loading without
quantization leaves nothing over: transformers reserves one block of the whole size first
(`caching_allocator_warmup`). Quantizing on the fly frees each matrix in the compute dtype and what it makes
goes into those holes. Blocks up to 1 MiB have segments of their own and are always split.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from itertools import count

from planner.memory.tape import ALIGNMENT, LARGE, SEGMENT, UNSPLIT, rounded
from planner.units import MIB

SHARED = 20 * MIB
"""A segment for requests under 10 MiB."""


class Block:
    """A stretch of a segment, in use or free."""

    __slots__ = ("after", "before", "key", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self.before: Block | None = None
        self.after: Block | None = None
        self.key: tuple[int, int] | None = None
        """Where it stands among the free ones; None while in use."""


class Segments:
    """Requests over 1 MiB of one run, and the bytes that were handed out with them unasked.

    `reserved`: bytes of a block that is there, free, from the beginning.
    """

    def __init__(self, reserved: int = 0) -> None:
        self.unasked = 0
        self._free: list[tuple[int, int]] = []
        self._blocks: dict[int, Block] = {}
        self._number = count()
        if reserved > UNSPLIT:
            self._put(Block(_segment(reserved)))

    def request(self, n: int) -> Block | None:
        """A block for `n` bytes; None for a small one, which is exact."""
        n = rounded(n)
        if n <= UNSPLIT:
            return None
        at = bisect_left(self._free, (n, -1))
        block = self._take(at) if at < len(self._free) else Block(_segment(n))
        rest = block.size - n
        if rest > UNSPLIT:
            other = Block(rest)
            other.before, other.after, block.after = block, block.after, other
            if other.after is not None:
                other.after.before = other
            block.size = n
            self._put(other)
        else:
            self.unasked += rest
        return block

    def give(self, block: Block | None, n: int) -> None:
        """Free the block of a request of `n` bytes."""
        if block is None:
            return
        self.unasked -= block.size - rounded(n)
        before, after = block.before, block.after
        if before is not None and before.key is not None:
            self._remove(before)
            block.size += before.size
            block.before = before.before
            if block.before is not None:
                block.before.after = block
        if after is not None and after.key is not None:
            self._remove(after)
            block.size += after.size
            block.after = after.after
            if block.after is not None:
                block.after.before = block
        self._put(block)

    def holes(self) -> list[int]:
        """Bytes of free blocks in segments that are in use."""
        return [
            size
            for size, number in self._free
            if self._blocks[number].before is not None or self._blocks[number].after is not None
        ]

    def _put(self, block: Block) -> None:
        block.key = (block.size, next(self._number))
        self._blocks[block.key[1]] = block
        insort(self._free, block.key)

    def _take(self, at: int) -> Block:
        block = self._blocks.pop(self._free.pop(at)[1])
        block.key = None
        return block

    def _remove(self, block: Block) -> None:
        assert block.key is not None
        self._take(bisect_left(self._free, block.key))


def _segment(n: int) -> int:
    return SHARED if n < LARGE else -(-n // SEGMENT) * SEGMENT


WATCHED = 128
"""Requests that are followed; what the later half of them got unasked goes for the rest."""


def lasting_unasked(sizes: Sequence[int]) -> int:
    """Bytes handed out unasked with tensors of `sizes` bytes that are made one after the other and stay.

    >>> lasting_unasked([19 * MIB // 2] * 4) / MIB  # two fill a segment of 20 MiB but for 1 MiB
    2.0
    """
    segments, large = Segments(), [n for n in sizes if n > UNSPLIT]
    halfway = 0
    for seen, n in enumerate(large[:WATCHED], 1):
        segments.request(n)
        if seen == WATCHED // 2:
            halfway = segments.unasked
    rest = max(0, len(large) - WATCHED)
    more = (segments.unasked - halfway) * rest // (WATCHED - WATCHED // 2)
    return segments.unasked + more // ALIGNMENT * ALIGNMENT
