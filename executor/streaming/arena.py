"""Host memory for slabs: page-locked where there is a card, so that its copy engine reads it directly.

torch's own pinned allocator rounds every block to a power of two, which wastes up to half of it; here a
block is mapped at its own size and then registered (`cudaHostRegister`).
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch

from executor.errors import CannotHonour
from planner.units import format_bytes

_REGISTERED_ALREADY = 712
"""cudaErrorHostMemoryAlreadyRegistered."""


class Arena:
    """Blocks of host memory that are given back together."""

    def __init__(self, device: torch.device) -> None:
        self._card = device if device.type == "cuda" else None
        self._registered: list[torch.Tensor] = []
        self._blocks: list[torch.Tensor] = []
        self.refused: str | None = None
        """Why page-locking stopped."""

    @property
    def pinned_bytes(self) -> int:
        """Bytes of page-locked memory."""
        return sum(block.numel() for block in self._registered)

    def take(self, nbytes: int) -> torch.Tensor:
        """A new block, 1-D uint8, at a page boundary."""
        if self._card is None:
            block = torch.empty(nbytes, dtype=torch.uint8)
        else:
            block = _mapped(nbytes)
            if self.refused is None:
                self._register(block)
        self._blocks.append(block)
        return block

    def _register(self, block: torch.Tensor) -> None:
        with torch.cuda.device(self._card):
            code = int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), block.numel(), 0))
        if code in (0, _REGISTERED_ALREADY):
            self._registered.append(block)
            return
        with suppress(RuntimeError):  # the next launch reports this error, and forgets it
            torch.zeros(1, device=self._card)
        self.refused = f"error {code} after {format_bytes(self.pinned_bytes)}"

    def close(self) -> None:
        """Unlock the memory; the blocks must not be copied from any more."""
        for block in self._registered:
            torch.cuda.cudart().cudaHostUnregister(block.data_ptr())
        self._registered, self._blocks = [], []


def _mapped(nbytes: int) -> torch.Tensor:
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):  # fewer pages to lock, none to copy for a child
        with suppress(AttributeError, OSError):
            pages.madvise(getattr(mmap, advice))
    return torch.frombuffer(pages, dtype=torch.uint8)


def require_room(needed: int) -> None:
    """Errors: `CannotHonour` when RAM cannot hold the slabs; the system would end the process instead."""
    from executor.engines.accelerate import available_ram

    available = available_ram()
    if available is not None and needed > available:
        raise CannotHonour(
            f"the streamed layers take {format_bytes(needed)} of RAM and {format_bytes(available)} are "
            "available",
            "close other programs, keep more layers on the card, or plan with `--quant nf4`",
        )
