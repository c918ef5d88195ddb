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

    def __init__(self, enable_timing: bool = False) -> None:
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
        for holds in (None, slab.layer):
            self._current().do(self._set, holds)

    def _set(self, holds: int | None) -> bool:
        self.holds = holds
        return True


class Slab:
    def __init__(self, layer: int) -> None:
        self.layer = layer

    def numel(self) -> int:
        return 100


class Device:
    """A computing stream, a link and slots."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, link: type[CudaLink] = CudaLink) -> None:
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
            ready = [s for s in STREAMS if s.steps]
            draws.shuffle(ready)
            for stream in ready:
                step, arguments = stream.steps[0]
                if step(*arguments):
                    stream.steps.popleft()
                    break
            else:
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
