"""Host memory for slabs: page-locked where there is a card, so that its copy engine reads it directly.

torch's own pinned allocator rounds every block to a power of two, which wastes up to half of it; here a
block is mapped at its own size and then registered (`cudaHostRegister`).

How much the system locks is known only by trying: the driver of a Linux card pins pages past
`RLIMIT_MEMLOCK`, WSL2 and some containers stop early. From the first refusal on blocks are ordinary memory,
and copies out of it go through a small locked buffer (`bounce_buffers`).
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch

from executor.errors import CannotHonour
from planner.units import MIB, format_bytes

_REGISTERED_ALREADY = 712
"""cudaErrorHostMemoryAlreadyRegistered."""
BOUNCE_BYTES = 32 * MIB
"""Of one of the two buffers that copies from unlocked memory go through."""


class Arena:
    """Blocks of host memory that are given back together."""

    def __init__(self, device: torch.device) -> None:
        self._card = device if device.type == "cuda" else None
        self._registered: list[torch.Tensor] = []
        self._blocks: list[torch.Tensor] = []
        self._bounce: list[torch.Tensor] | None = None
        self.refused: str | None = None
        """Why page-locking stopped."""

    @property
    def pinned_bytes(self) -> int:
        """Bytes of page-locked memory."""
        return sum(block.numel() for block in self._registered)

    def take(self, nbytes: int) -> torch.Tensor:
        """A new block, 1-D uint8, at a page boundary."""
        block = _mapped(nbytes)
        if self._card is not None and self.refused is None:
            code = self._register(block)
            if code:
                self.refused = f"error {code} after {format_bytes(self.pinned_bytes)}{_locked_limit()}"
        self._blocks.append(block)
        return block

    def is_locked(self, part: torch.Tensor) -> bool:
        """May the copy engine read `part`, any part of a block?"""
        return self.refused is None or any(
            0 <= part.data_ptr() - block.data_ptr() < block.numel() for block in self._registered
        )

    def bounce_buffers(self) -> list[torch.Tensor]:
        """Two locked buffers for copies out of unlocked blocks; none where nothing was refused, or where the
        system locks not even these."""
        if self.refused is None:
            return []
        if self._bounce is None:
            self._bounce = self._lock_bounce_buffers()
        return self._bounce

    def _lock_bounce_buffers(self) -> list[torch.Tensor]:
        both = _mapped(2 * BOUNCE_BYTES)
        refused = self._register(both)
        if refused and self._registered:
            # the limit is reached: one block less is worth the full rate of the others
            self._unregister(self._registered.pop())
            refused = self._register(both)
        return [] if refused else [both[:BOUNCE_BYTES], both[BOUNCE_BYTES:]]

    def _register(self, block: torch.Tensor) -> int:
        """Lock the pages of `block`; 0 or the error's number."""
        with torch.cuda.device(self._card):
            cudart = torch.cuda.cudart()
            code = int(cudart.cudaHostRegister(block.data_ptr(), block.numel(), 0))
            if code == _REGISTERED_ALREADY:
                # left by memory that stood at this address before: the card would read those old pages
                self._forget_error()
                cudart.cudaHostUnregister(block.data_ptr())
                code = int(cudart.cudaHostRegister(block.data_ptr(), block.numel(), 0))
        if code:
            self._forget_error()
        else:
            self._registered.append(block)
        return code

    def _forget_error(self) -> None:
        """The next launch reports the last error, and forgets it."""
        with suppress(RuntimeError):
            torch.zeros(1, device=self._card)

    @staticmethod
    def _unregister(block: torch.Tensor) -> None:
        torch.cuda.cudart().cudaHostUnregister(block.data_ptr())

    def close(self) -> None:
        """Unlock the memory; the blocks must not be copied from any more."""
        for block in self._registered:
            self._unregister(block)
        self._registered, self._blocks, self._bounce = [], [], None


def _mapped(nbytes: int) -> torch.Tensor:
    pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):  # fewer pages to lock, none to copy for a child
        with suppress(AttributeError, OSError):
            pages.madvise(getattr(mmap, advice))
    return torch.frombuffer(pages, dtype=torch.uint8)


def _locked_limit() -> str:
    """What `ulimit -l` says, where it says a number."""
    try:
        import resource
    except ImportError:
        return ""
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return "" if limit == resource.RLIM_INFINITY else f"; `ulimit -l` allows {format_bytes(limit)}"


def require_room(needed: int) -> None:
    """Errors: `CannotHonour` when RAM, inside the container's limit, cannot hold `needed` bytes of slabs and
    buffers; the system would end the process instead."""
    from executor.engines.accelerate import available_ram

    available = available_ram()
    if available is not None and needed > available:
        raise CannotHonour(
            f"the streamed layers take {format_bytes(needed)} of RAM and {format_bytes(available)} are "
            "available",
            "close other programs, keep more layers on the card, plan with `--quant nf4`, or with "
            "`--placement disk_offload`",
        )
