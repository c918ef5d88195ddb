"""The disk's ring of buffers: overwrites nothing, reads what comes next, hides no error."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from executor.errors import BadWeights
from executor.streaming import ring
from executor.streaming.direct_io import DirectFile, aligned_memory
from executor.streaming.ring import DiskBlock, Ring
from executor.streaming.ring_schedule import RingSchedule
from executor.streaming.schedule import Schedule
from executor.streaming.slab_file import CHECKED_BYTES

pytestmark = pytest.mark.executor


# --------------------------------------------------------------------------- the pure part


class Shelf:
    """What the buffers of a ring really hold; refuses what would spoil a copy that reads them."""

    def __init__(self, buffers: int) -> None:
        self.plan = RingSchedule(buffers)
        self.contents: list[int | None] = [None] * buffers
        self.filling: dict[int, int] = {}
        self.copying: dict[int, int] = {}

    def fill(self) -> bool:
        fill = self.plan.next_fill()
        if fill is None:
            return False
        assert fill.buffer not in self.copying.values(), "overwritten while it is copied"
        assert fill.buffer not in self.filling.values(), "filled by two"
        assert fill.layer not in self.contents and fill.layer not in self.filling, "read twice"
        self.contents[fill.buffer] = None
        self.filling[fill.layer] = fill.buffer
        return True

    def end_fill(self, layer: int) -> None:
        self.contents[self.filling.pop(layer)] = layer
        self.plan.filled(layer)

    def copy(self, layer: int) -> None:
        buffer = self.plan.lend(layer)
        assert self.contents[buffer] == layer, "other bytes than those asked for"
        self.copying[layer] = buffer

    def end_copy(self, layer: int) -> None:
        assert self.contents[self.copying.pop(layer)] == layer, "overwritten while it was copied"
        self.plan.give_back(layer)

    def may_copy(self, layer: int) -> bool:
        return self.plan.is_full(layer)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 8), st.randoms(use_true_random=False))
def test_no_buffer_is_overwritten_before_its_copy_has_ended(
    buffers: int, layers: int, draws: random.Random
) -> None:
    """Whatever is expected, and in whatever order disk and device come to their ends."""
    shelf = Shelf(buffers)
    for _ in range(120):
        step = draws.randrange(5)
        if step == 0:
            shelf.plan.expect([draws.randrange(layers) for _ in range(draws.randrange(layers + 1))])
        elif step == 1:
            shelf.fill()
        elif step == 2 and shelf.filling:
            shelf.end_fill(draws.choice(sorted(shelf.filling)))
        elif step == 3 and shelf.copying:
            shelf.end_copy(draws.choice(sorted(shelf.copying)))
        elif step == 4:
            ready = [layer for layer in range(layers) if shelf.may_copy(layer)]
            if ready:
                shelf.copy(draws.choice(ready))


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 4), st.integers(1, 8), st.randoms(use_true_random=False))
def test_what_is_asked_for_first_always_comes(buffers: int, layers: int, draws: random.Random) -> None:
    """Even through one buffer that holds something else, once fills and copies under way have ended."""
    shelf = Shelf(buffers)
    for _ in range(20):
        order = draws.sample(range(layers), layers)
        shelf.plan.expect(order)
        while not shelf.may_copy(order[0]):
            if not shelf.fill():
                ends: list[tuple[Any, int]] = [(shelf.end_fill, layer) for layer in shelf.filling]
                ends += [(shelf.end_copy, layer) for layer in shelf.copying]
                assert ends, "nothing is under way, and nothing can begin"
                end, layer = draws.choice(ends)
                end(layer)
        shelf.copy(order[0])


@settings(max_examples=60, deadline=None)
@given(st.integers(7, 10), st.integers(2, 3), st.integers(2, 4), st.data())
def test_decoding_reads_each_layer_once_a_round_and_waits_for_none(
    layers: int, slots: int, buffers: int, data: st.DataObject
) -> None:
    """A disk that is always ahead by a ring is asked for every layer once a round, and each is there when its
    copy is due."""
    on_disk = data.draw(st.sets(st.integers(0, layers - 1), min_size=buffers + slots))
    schedule, shelf, reads = Schedule(layers, slots), Shelf(buffers), 0

    def keep_up(due: list[int]) -> None:
        nonlocal reads
        shelf.plan.expect([*due, *schedule.next_copies(on_disk - set(due))])
        while shelf.fill():
            reads += 1
            for layer in list(shelf.filling):
                shelf.end_fill(layer)

    copies = schedule.begin()
    for number in range(3):
        before = reads
        for layer in range(layers):
            copies += schedule.visit(layer, turns=False) + schedule.release()
            due = [copy.layer for copy in copies if copy.layer in on_disk]
            assert number == 0 or all(map(shelf.may_copy, due)), "it was read before its copy was due"
            while due:
                keep_up(due)
                shelf.copy(due[0])
                shelf.end_copy(due.pop(0))
            keep_up([])
            copies = []
        assert number == 0 or reads - before == len(on_disk)


# --------------------------------------------------------------------------- threads and files

SIZES = (3 * 4096, 5 * 4096, 4096, 4 * 4096, 2 * 4096)


class Late:
    """The end of a copy that looks at its bytes once more before it comes."""

    def __init__(self, block: torch.Tensor, value: int) -> None:
        self.block, self.value, self.spoiled = block, value, False

    def synchronize(self) -> None:
        time.sleep(0.002)
        self.spoiled = not bool((self.block == self.value).all())


@pytest.fixture
def small_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "STRETCH_BYTES", 4096)


@pytest.fixture
def blocks(tmp_path: Path) -> Iterator[dict[int, DiskBlock]]:
    """Five slabs, each of its own number in every byte."""
    path = tmp_path / "slabs"
    path.write_bytes(b"".join(bytes([number]) * size for number, size in enumerate(SIZES)))
    with DirectFile(path) as file:
        yield {n: DiskBlock(file, sum(SIZES[:n]), size) for n, size in enumerate(SIZES)}


@pytest.mark.parametrize("buffers", [1, 2, 3])
@pytest.mark.usefixtures("small_stretches")
def test_every_copy_finds_its_bytes(blocks: dict[int, DiskBlock], buffers: int) -> None:
    """Threads that read, copies that end late, and an order of which half is not foreseen."""
    draws, marks, ready = random.Random(3), [], 0
    opened = Ring(blocks, [aligned_memory(max(SIZES)) for _ in range(buffers)])
    for at in range(60):
        layer = at % 5 if at < 30 else draws.randrange(5)
        opened.expect([layer, *((layer + step) % 5 for step in range(1, 5))])
        ready += opened.is_full(layer)
        block = opened.lend(layer)
        assert block.numel() == SIZES[layer] and bool((block == layer).all())
        marks.append(Late(block, layer))
        opened.give_back(layer, marks[-1])
    read, seconds = opened.figures()
    opened.close()
    assert not any(mark.spoiled for mark in marks)
    assert read >= 30 / 5 * sum(SIZES) and seconds > 0
    assert ready > 0 or buffers == 1, "some were there before they were asked for"


@pytest.mark.parametrize("when", ["opening", "reading"])
def test_file_systems_without_direct_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """They are read through the page cache."""
    path, refused = tmp_path / "slabs", []
    path.write_bytes(bytes(range(5)) * 4096)
    stock_open, stock_read = os.open, os.preadv

    def refuse(flags: int) -> None:
        if flags & os.O_DIRECT:
            refused.append(when)
            raise OSError(errno.EINVAL, "Invalid argument")

    def opening(name: Any, flags: int, *mode: Any) -> int:
        if when == "opening":
            refuse(flags)
        return stock_open(name, flags, *mode)

    def reading(handle: int, *arguments: Any) -> int:
        if when == "reading":
            refuse(fcntl.fcntl(handle, fcntl.F_GETFL))
        return stock_read(handle, *arguments)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "preadv", reading)
    with DirectFile(path) as file:
        opened = Ring({0: DiskBlock(file, 4096, 4 * 4096)}, [aligned_memory(4 * 4096)])
        opened.expect([0])
        assert bytes(opened.lend(0).numpy()) == (bytes(range(5)) * 4096)[4096:]
        opened.close()
    assert refused


class Failing:
    """A file whose second block cannot be read."""

    path = Path("slabs")

    def __init__(self, file: Any, error: OSError | None) -> None:
        self._file, self._error = file, error

    def read(self, target: torch.Tensor, offset: int) -> int:
        if offset < SIZES[0]:
            return int(self._file.read(target, offset))
        if self._error is not None:
            raise self._error
        return 0


@pytest.mark.parametrize(
    ("error", "said"),
    [(OSError(errno.EIO, "Input/output error"), "Input/output error"), (None, "ends at byte 12288")],
)
def test_a_read_error_is_raised_where_the_layer_is_asked_for(
    blocks: dict[int, DiskBlock], error: OSError | None, said: str
) -> None:
    broken = {n: dataclasses.replace(b, file=Failing(b.file, error)) for n, b in blocks.items()}
    opened = Ring(broken, [aligned_memory(max(SIZES)) for _ in range(2)])
    opened.expect([1, 0])
    for _ in range(2):
        with pytest.raises(BadWeights, match=said):
            opened.lend(1)
    opened.close()


def test_bytes_are_checked_once(blocks: dict[int, DiskBlock]) -> None:
    assert ring.STRETCH_BYTES % CHECKED_BYTES == 0, "slab files check whole stretches"
    checked = []
    watched = {
        n: dataclasses.replace(b, check=lambda data, at, n=n: checked.append((n, len(data), at)))  # type: ignore[misc]
        for n, b in blocks.items()
    }
    opened = Ring(watched, [aligned_memory(max(SIZES))])
    for layer in (*range(5), *range(5)):
        opened.expect([layer])
        opened.lend(layer)
        opened.give_back(layer, Late(torch.zeros(1), 0))
    opened.close()
    assert sorted(checked) == [(n, size, 0) for n, size in enumerate(SIZES)]


def test_the_ring_waits_for_no_copy_while_it_has_another_buffer(blocks: dict[int, DiskBlock]) -> None:
    """And ends its threads when it is closed."""
    before = threading.active_count()
    opened = Ring(blocks, [aligned_memory(max(SIZES)) for _ in range(2)])
    opened.expect([0, 1, 2])
    opened.lend(0)  # and never given back
    opened.expect([1])
    opened.lend(1)
    opened.close()
    assert threading.active_count() == before
