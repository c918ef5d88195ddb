"""The events of the asynchronous link, on a device of queues that run in any order the events allow."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from executor.streaming.link import CudaLink
from executor.streaming.schedule import Copy, Schedule

pytestmark = pytest.mark.executor
LAYERS, SLOTS = 7, 2


class Event:
    """As `torch.cuda.Event`: a wait is for the record that was the last when it was asked for."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self.asked = self.done = 0

    def record(self, stream: Stream) -> None:
        self.asked += 1
        stream.do(self._ended, self.asked)

    def _ended(self, number: int) -> bool:
        self.done = number
        return True

    def query(self) -> bool:
        return self.done == self.asked

    def elapsed_time(self, _other: Event) -> float:
        return 2.0


class Stream:
    """A queue of steps; one that returns False is tried again later."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.steps: deque[tuple[Callable[..., bool], tuple[Any, ...]]] = deque()
        STREAMS.append(self)

    def do(self, step: Callable[..., bool], *arguments: Any) -> None:
        self.steps.append((step, arguments))

    def wait_event(self, event: Event) -> None:
        self.do(lambda number: event.done >= number, event.asked)

    def synchronize(self) -> None:
        assert not self.steps


STREAMS: list[Stream] = []


class Slot:
    """Memory that a copy fills in two steps and a layer reads in two."""

    def __init__(self, current: Callable[[], Stream]) -> None:
        self.holds: int | None = None
        self._current = current

    def copy_(self, slab: Slab, non_blocking: bool) -> None:
        assert non_blocking
        self._current().do(self._begin)
        self._current().do(self._end, slab)

    def _begin(self) -> bool:
        self.holds = None
        return True

    def _end(self, slab: Slab) -> bool:
        self.holds = slab.layer
        return True


class Slab:
    def __init__(self, layer: int) -> None:
        self.layer = layer

    def numel(self) -> int:
        return 100


class Device:
    """A computing stream, a link and slots."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, link: type[CudaLink] = CudaLink, copied: bool = True
    ) -> None:
        STREAMS.clear()
        self.compute = self.current = Stream()
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self._on)
        self.link = link(torch.device("cuda"), SLOTS)
        self.schedule = Schedule(LAYERS, SLOTS)
        self.slots = [Slot(lambda: self.current) for _ in range(SLOTS)]
        self.wrong: list[int] = []
        if copied:
            self.copy(self.schedule.begin())

    @contextmanager
    def _on(self, stream: Stream) -> Any:
        before, self.current = self.current, stream
        yield
        self.current = before

    def copy(self, copies: list[Copy]) -> None:
        if copies:
            self.link.after_reads()
        for copy in copies:
            self.link.send(Slab(copy.layer), self.slots[copy.slot], copy.slot)  # type: ignore[arg-type]

    def visit(self, layer: int, turns: bool) -> None:
        """As `Streamer.acquire`, and two steps of reading."""
        self.copy(self.schedule.visit(layer, turns))
        self.read(layer)

    def read(self, layer: int) -> None:
        slot = self.schedule.slot_of(layer)
        self.link.wait_for(slot)
        for _ in range(2):
            self.compute.do(self._read, layer, self.slots[slot])

    def _read(self, layer: int, slot: Slot) -> bool:
        if slot.holds != layer:
            self.wrong.append(layer)
        return True

    def run(self, draws: random.Random) -> None:
        """Everything that was asked for, in one of the orders that are possible."""
        while any(stream.steps for stream in STREAMS):
            self.step(draws)

    def step(self, draws: random.Random) -> None:
        """One step of some queue."""
        ready = [s for s in STREAMS if s.steps]
        draws.shuffle(ready)
        for stream in ready:
            step, arguments = stream.steps[0]
            if step(*arguments):
                stream.steps.popleft()
                return
        raise AssertionError("deadlock")


def visits(turns: bool) -> list[int]:
    there = list(range(LAYERS))
    return 3 * (there + there[::-1] if turns else there)


@pytest.mark.parametrize("turns", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_every_read_finds_its_layer(monkeypatch: pytest.MonkeyPatch, turns: bool, seed: int) -> None:
    """The host runs ahead of the device by six passes and waits for nothing."""
    device = Device(monkeypatch)
    for layer in visits(turns):
        device.visit(layer, turns)
        if not turns:
            device.copy(device.schedule.release())
    device.run(random.Random(seed))
    assert device.wrong == []
    device.link.settle()
    copies = device.link.bytes // 100
    assert copies == SLOTS + 3 * LAYERS if not turns else copies < len(visits(turns))
    assert device.link.seconds == pytest.approx(0.002 * copies)


def read_through_ring(monkeypatch: pytest.MonkeyPatch, seed: int, waits: bool) -> list[int]:
    """Decode from two buffers that are filled again for every layer; the layers that found other bytes."""
    device, draws = Device(monkeypatch, copied=False), random.Random(seed)
    ring = deque((Slab(-1), device.link.mark()) for _ in range(2))

    def bring(copies: list[Copy]) -> None:
        for copy in copies:
            buffer, mark = ring.popleft()
            while waits and not mark.query():
                device.step(draws)
            buffer.layer = copy.layer
            device.link.after_reads()
            device.link.send(buffer, device.slots[copy.slot], copy.slot)  # type: ignore[arg-type]
            ring.append((buffer, device.link.mark()))

    for layer in visits(False):
        bring(device.schedule.visit(layer, False))
        device.read(layer)
        bring(device.schedule.release())
    device.run(draws)
    return device.wrong


@pytest.mark.parametrize("seed", range(20))
def test_a_buffer_is_filled_again_after_the_mark_of_its_copy(
    monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    assert read_through_ring(monkeypatch, seed, waits=True) == []


def test_without_the_mark_it_is_filled_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    assert any(read_through_ring(monkeypatch, seed, waits=False) for seed in range(20))


class Careless(CudaLink):
    """Overwrites without waiting for reads."""

    def after_reads(self) -> None:
        pass


class Hasty(CudaLink):
    """Lets reads begin before the copy has ended."""

    def wait_for(self, slot: int) -> None:
        pass


@pytest.mark.parametrize("link", [Careless, Hasty])
def test_each_event_is_needed(monkeypatch: pytest.MonkeyPatch, link: type[CudaLink]) -> None:
    wrong = 0
    for seed in range(20):
        device = Device(monkeypatch, link)
        for layer in visits(False):
            device.visit(layer, False)
        device.run(random.Random(seed))
        wrong += bool(device.wrong)
    assert wrong > 0
