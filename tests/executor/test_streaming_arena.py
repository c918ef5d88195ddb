"""Page-locked memory up to where the system refuses it, and copies from what lies beyond, on a card that is
not there: `cudart` counts what is registered, and copies happen at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

from executor.errors import CannotHonour
from executor.streaming import arena as arena_module
from executor.streaming.arena import Arena, require_room
from executor.streaming.link import CudaLink

pytestmark = pytest.mark.executor
PAGE = 4096
OUT_OF_MEMORY = 2


class Cudart:
    """Registers `limit` bytes in all."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held: dict[int, int] = {}
        self.stale: set[int] = set()
        """Addresses that something registered and never gave back."""

    def cudaHostRegister(self, address: int, nbytes: int, _flags: int) -> int:
        if address in self.held or address in self.stale:
            return 712
        if sum(self.held.values()) + nbytes > self.limit:
            return OUT_OF_MEMORY
        self.held[address] = nbytes
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        self.stale.discard(address)
        self.held.pop(address, None)
        return 0


@pytest.fixture
def cudart(monkeypatch: pytest.MonkeyPatch) -> Cudart:
    """A card whose system locks ten pages; bounce buffers of one page each."""
    fake = Cudart(10 * PAGE)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(Arena, "_forget_error", lambda _: None)
    monkeypatch.setattr(arena_module, "BOUNCE_BYTES", PAGE)
    return fake


@pytest.fixture
def arena(cudart: Cudart) -> Iterator[Arena]:
    made = Arena(torch.device("cuda"))
    yield made
    made.close()
    assert not cudart.held, "everything is unlocked in the end"


def test_blocks_are_locked_at_their_own_size(arena: Arena, cudart: Cudart) -> None:
    blocks = [arena.take(3 * PAGE) for _ in range(3)]
    assert sum(cudart.held.values()) == arena.pinned_bytes == 9 * PAGE, "nothing is rounded up"
    assert all(block.data_ptr() % PAGE == 0 and arena.is_locked(block) for block in blocks)
    assert arena.refused is None and arena.bounce_buffers() == []


def test_what_the_system_refuses_is_ordinary_memory(
    arena: Arena, cudart: Cudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (64 * 1024, 64 * 1024))
    blocks = [arena.take(4 * PAGE) for _ in range(4)]
    assert [arena.is_locked(block) for block in blocks] == [True, True, False, False]
    assert arena.is_locked(blocks[1][PAGE:]) and not arena.is_locked(blocks[2][PAGE:])
    assert arena.pinned_bytes == 8 * PAGE
    assert arena.refused == "error 2 after 32 KiB; `ulimit -l` allows 64 KiB"
    assert [buffer.numel() for buffer in arena.bounce_buffers()] == [PAGE, PAGE]
    assert arena.pinned_bytes == 10 * PAGE


def test_one_block_makes_way_for_the_bounce_buffers(arena: Arena, cudart: Cudart) -> None:
    blocks = [arena.take(5 * PAGE) for _ in range(3)]
    assert len(arena.bounce_buffers()) == 2
    assert [arena.is_locked(block) for block in blocks] == [True, False, False]
    assert arena.pinned_bytes == 7 * PAGE


def test_where_nothing_can_be_locked_there_are_none(arena: Arena, cudart: Cudart) -> None:
    cudart.limit = PAGE
    arena.take(4 * PAGE)
    assert arena.bounce_buffers() == [] and arena.pinned_bytes == 0


def test_an_address_that_was_never_given_back_is_locked_anew(
    arena: Arena, cudart: Cudart, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The card would read the pages that were there before."""
    block = torch.empty(2 * PAGE, dtype=torch.uint8)
    cudart.stale.add(block.data_ptr())
    monkeypatch.setattr(arena_module, "_mapped", lambda _: block)
    arena.take(2 * PAGE)
    assert cudart.held == {block.data_ptr(): 2 * PAGE} and arena.refused is None


def test_nothing_is_locked_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: pytest.fail("there is no card"))
    arena = Arena(torch.device("cpu"))
    block = arena.take(PAGE + 1)
    assert (block.numel(), block.data_ptr() % PAGE, arena.pinned_bytes) == (PAGE + 1, 0, 0)
    assert arena.refused is None and arena.bounce_buffers() == []


class Immediate:
    """A stream or event of a device on which everything has happened already."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.waited = 0

    def __getattr__(self, _name: str) -> Any:
        return lambda *_: True

    def elapsed_time(self, _other: Any) -> float:
        return 1.0

    def synchronize(self) -> None:
        self.waited += 1


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def on(_stream: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "Stream", Immediate)
    monkeypatch.setattr(torch.cuda, "Event", Immediate)
    monkeypatch.setattr(torch.cuda, "stream", on)


@pytest.mark.usefixtures("device")
def test_copies_from_unlocked_memory_go_through_locked_buffers(arena: Arena, cudart: Cudart) -> None:
    blocks = [arena.take(5 * PAGE + 100) for _ in range(2)]
    link = CudaLink(torch.device("cuda"), 2, arena)
    for number, block in enumerate(blocks):
        block.random_(generator=torch.Generator().manual_seed(number))
        slot = torch.zeros_like(block)
        link.send(block, slot, number)
        assert torch.equal(slot, block)
    waits = [event.waited for _, event in link._bounce]
    assert sorted(waits) == [3, 3], "before each use of a buffer, the copy that last read it has ended"
    assert link.bytes == 2 * (5 * PAGE + 100)


def test_ram_inside_the_container_is_what_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executor.engines.accelerate.available_ram", lambda: 5 * PAGE)
    require_room(5 * PAGE)
    with pytest.raises(CannotHonour, match="20 KiB are available"):
        require_room(5 * PAGE + 1)
    monkeypatch.setattr("executor.engines.accelerate.available_ram", lambda: None)
    require_room(10**15)
