"""The ring of the disk tier: a few buffers of page-locked RAM that threads keep full of the layers to come.

Threads read stretches of the blocks side by side, one block after another without a pause between them, and
wait only when all buffers hold what is expected sooner than anything else. What is read when is decided by
`ring_schedule`; here are the threads, the files and the errors.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from executor.errors import BadWeights, FitwrightError
from executor.streaming.direct_io import STRETCH_BYTES, THREADS
from executor.streaming.ring_schedule import Fill, RingSchedule


class Source(Protocol):
    """A file that several threads may read at once (`direct_io.DirectFile`)."""

    path: Path

    def read(self, target: torch.Tensor, offset: int) -> int:
        """Fill `target` with what stands at `offset`; fewer bytes only at the end of the file."""


class Mark(Protocol):
    """A point in the work given to a device."""

    def synchronize(self) -> None:
        """Wait until the device has come there."""


@dataclass(frozen=True)
class DiskBlock:
    """One slab in a file: `nbytes` bytes from `offset`, both multiples of 4096."""

    file: Source
    offset: int
    nbytes: int
    check: Callable[[Any, int], None] | None = None
    """Called once for every stretch of `STRETCH_BYTES`, with its bytes and where in the slab they begin.
    Errors: `BadWeights` where they are not what was written."""

    def numel(self) -> int:
        """Its bytes, by the name that a tensor of bytes has for them."""
        return self.nbytes


class Ring:
    """Brings `blocks`, by the numbers of their layers, through `buffers`, each as large as the largest."""

    def __init__(
        self, blocks: Mapping[int, DiskBlock], buffers: Sequence[torch.Tensor], threads: int = THREADS
    ) -> None:
        self._blocks, self._buffers = dict(blocks), list(buffers)
        self._schedule = RingSchedule(len(buffers))
        self._changed = threading.Condition()
        self._stretches: deque[tuple[int, torch.Tensor, int]] = deque()
        self._left: dict[int, int] = {}
        self._lent: dict[int, Mark] = {}
        self._unchecked = {layer for layer, block in self._blocks.items() if block.check is not None}
        self._closed, self._failed = False, None  # type: bool, BaseException | None
        self._reading, self._since = 0, 0.0
        self._bytes, self._seconds = 0, 0.0
        self._threads = [
            threading.Thread(target=self._work, name=f"disk-ring-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    # ----------------------------------------------------------------- for the streamer, one thread at a time

    def expect(self, order: Sequence[int]) -> None:
        """Layers will be asked for in this order: see `RingSchedule.expect`."""
        with self._changed:
            self._schedule.expect(order)
            self._changed.notify_all()

    def is_full(self, layer: int) -> bool:
        """Would `lend` return at once?"""
        with self._changed:
            return self._failed is not None or self._schedule.is_full(layer)

    def lend(self, layer: int) -> torch.Tensor:
        """The bytes of `layer`, which must be among those expected; waits until they are read.

        They stay until `give_back`. Errors: `BadWeights` for a layer that cannot be read.
        """
        with self._changed:
            while not self._schedule.is_full(layer):
                self._raise_failure()
                self._changed.wait()
            self._raise_failure()
            return self._buffers[self._schedule.lend(layer)][: self._blocks[layer].nbytes]

    def give_back(self, layer: int, mark: Mark) -> None:
        """The bytes of `layer` are read by nobody after `mark`."""
        with self._changed:
            self._lent[layer] = mark
            self._changed.notify_all()

    def figures(self) -> tuple[int, float]:
        """Bytes read so far, and the seconds in which at least one thread was reading."""
        with self._changed:
            under_way = time.perf_counter() - self._since if self._reading else 0.0
            return self._bytes, self._seconds + under_way

    def close(self) -> None:
        """End the threads; reads under way are waited for."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _raise_failure(self) -> None:
        if self._closed:
            raise RuntimeError("the ring is closed")
        if self._failed is not None:
            raise self._failed

    # ----------------------------------------------------------------- in the threads

    def _work(self) -> None:
        try:
            while (stretch := self._next_stretch()) is not None:
                layer, target, at = stretch
                self._read(self._blocks[layer], layer, target, at)
                self._finished(layer, len(target))
        except BaseException as error:
            with self._changed:
                self._failed = self._failed or error
                self._changed.notify_all()

    def _next_stretch(self) -> tuple[int, torch.Tensor, int] | None:
        """Layer, memory and place in the slab of what to read next; None when there is no more to do."""
        with self._changed:
            while not self._closed and self._failed is None:
                if not self._stretches and (fill := self._schedule.next_fill()) is not None:
                    self._cut(fill)
                if self._stretches:
                    if self._reading == 0:
                        self._since = time.perf_counter()
                    self._reading += 1
                    return self._stretches.popleft()
                if self._lent:
                    self._await_a_copy()
                else:
                    self._changed.wait()
            return None

    def _cut(self, fill: Fill) -> None:
        target = self._buffers[fill.buffer][: self._blocks[fill.layer].nbytes]
        parts = range(0, len(target), STRETCH_BYTES)
        self._left[fill.layer] = len(parts)
        self._stretches.extend((fill.layer, target[at : at + STRETCH_BYTES], at) for at in parts)

    def _await_a_copy(self) -> None:
        """Wait for the end of the oldest copy, with the lock open for others, and free its buffer."""
        layer = next(iter(self._lent))
        mark = self._lent.pop(layer)
        self._changed.release()
        try:
            mark.synchronize()
        finally:
            self._changed.acquire()
        self._schedule.give_back(layer)
        self._changed.notify_all()

    def _read(self, block: DiskBlock, layer: int, target: torch.Tensor, at: int) -> None:
        try:
            count = block.file.read(target, block.offset + at)
        except OSError as error:
            raise _unreadable(block, error.strerror or str(error)) from error
        if count < len(target):
            raise _unreadable(block, f"it ends at byte {block.offset + at + count}")
        if layer in self._unchecked and block.check is not None:
            block.check(target.numpy(), at)

    def _finished(self, layer: int, nbytes: int) -> None:
        with self._changed:
            self._bytes += nbytes
            self._reading -= 1
            if self._reading == 0:
                self._seconds += time.perf_counter() - self._since
            self._left[layer] -= 1
            if self._left[layer] == 0:
                self._unchecked.discard(layer)
                self._schedule.filled(layer)
                self._changed.notify_all()


def _unreadable(block: DiskBlock, why: str) -> FitwrightError:
    return BadWeights(
        f"cannot read streamed layers from {block.file.path}: {why}",
        "nothing was computed from what is missing; check the disk, then run the same command again",
    )
