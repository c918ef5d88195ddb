"""Copies of slabs into slots: on a stream of their own on a card, at once on the CPU."""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol

import torch

from executor.streaming.arena import Arena
from executor.streaming.ring import Mark


class Link(Protocol):
    """What carries slabs to slots, and how much it carried."""

    bytes: int
    seconds: float

    def after_reads(self) -> None:
        """The copies that follow must not begin before all work given to the device so far has ended."""

    def send(self, slab: torch.Tensor, buffer: torch.Tensor, slot: int) -> None:
        """Begin to copy `slab` into `buffer`, the memory of `slot`."""

    def wait_for(self, slot: int) -> None:
        """Work given to the device from now on finds the last copy into `slot` complete."""

    def mark(self) -> Mark:
        """The end of the copies asked for so far."""

    def settle(self) -> None:
        """All copies have ended when this returns, and are counted."""


class PlainLink:
    """Copies within host memory, complete when the call returns."""

    def __init__(self) -> None:
        self.bytes, self.seconds = 0, 0.0

    def after_reads(self) -> None:
        """Work on the CPU has ended when the call that asks for it returns."""

    def send(self, slab: torch.Tensor, buffer: torch.Tensor, slot: int) -> None:
        """Copy now."""
        began = time.perf_counter()
        buffer.copy_(slab)
        self.seconds += time.perf_counter() - began
        self.bytes += slab.numel()

    def wait_for(self, slot: int) -> None:
        """Nothing to wait for."""

    def mark(self) -> Mark:
        """It is past."""
        return _Past()

    def settle(self) -> None:
        """Nothing is under way."""


class _Past:
    def synchronize(self) -> None:
        """Nothing to wait for."""


class CudaLink:
    """One asynchronous copy a slab on a stream of its own; the host waits for nothing.

    Two kinds of event order it: `ready`, per slot, which the computing stream waits for, and one recorded on
    the computing stream that the copying stream waits for before it overwrites a slot.

    Slabs in memory that the system did not lock are copied through two locked buffers (`arena`): the host
    fills one while the card reads the other.
    """

    def __init__(self, device: torch.device, slots: int, arena: Arena | None = None) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._read = torch.cuda.Event()
        self._ready = [torch.cuda.Event() for _ in range(slots)]
        self._timed: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._spare: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._arena = arena
        self._bounce = [(buffer, torch.cuda.Event()) for buffer in arena.bounce_buffers()] if arena else []
        self.bytes, self.seconds = 0, 0.0

    def after_reads(self) -> None:
        """See `Link`."""
        self._read.record(torch.cuda.current_stream(self._device))
        self._stream.wait_event(self._read)

    def send(self, slab: torch.Tensor, buffer: torch.Tensor, slot: int) -> None:
        """See `Link`. From memory that is not page-locked the host waits until the slab is read."""
        began, ended = self._spare.pop() if self._spare else (_timer(), _timer())
        with torch.cuda.stream(self._stream):
            began.record(self._stream)
            if self._bounce and self._arena is not None and not self._arena.is_locked(slab):
                self._copy_in_parts(slab, buffer)
            else:
                buffer.copy_(slab, non_blocking=True)
            ended.record(self._stream)
            self._ready[slot].record(self._stream)
        self._timed.append((began, ended))
        self.bytes += slab.numel()
        self._count()

    def _copy_in_parts(self, slab: torch.Tensor, buffer: torch.Tensor) -> None:
        size = self._bounce[0][0].numel()
        for at in range(0, slab.numel(), size):
            part = slab[at : at + size]
            staging, read = self._bounce[0]
            self._bounce.reverse()
            read.synchronize()
            staging[: part.numel()].copy_(part)
            buffer[at : at + size].copy_(staging[: part.numel()], non_blocking=True)
            read.record(self._stream)

    def wait_for(self, slot: int) -> None:
        """See `Link`."""
        torch.cuda.current_stream(self._device).wait_event(self._ready[slot])

    def mark(self) -> Mark:
        """See `Link`. A thread that waits for it sleeps."""
        event = torch.cuda.Event(blocking=True)
        event.record(self._stream)
        return event

    def settle(self) -> None:
        """See `Link`."""
        self._stream.synchronize()
        self._count()

    def _count(self) -> None:
        """Add up the copies that have ended, without waiting for any."""
        while self._timed and self._timed[0][1].query():
            began, ended = self._timed.popleft()
            self.seconds += began.elapsed_time(ended) / 1000
            self._spare.append((began, ended))


def _timer() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def open_link(device: torch.device, slots: int, arena: Arena | None = None) -> Link:
    """The link from memory of `arena` to `device`."""
    return CudaLink(device, slots, arena) if device.type == "cuda" else PlainLink()
