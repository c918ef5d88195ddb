"""`--vram-cap`: run as if the whole card had SIZE.

The allocator gets a hard cap of SIZE minus the context measured in this process and minus the managed memory
that a paged optimizer will make, so that reserved + context + managed stays within SIZE. The context grows
while kernels are loaded for the first time; `tighten` follows it. With expandable segments the allocator
holds what is asked for against its cap, but takes whole pages: one page is kept back for that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from executor.card import expandable_segments
from executor.errors import CannotHonour
from planner.units import MIB, format_bytes

if TYPE_CHECKING:
    import torch

    from executor.card import Card

GRANULE = 2 * MIB
"""The driver hands out device memory in pieces of this size."""

PAGE = 20 * MIB
"""Of an expandable segment (c10/cuda/CUDACachingAllocator.cpp, `kLargeBuffer`). Without it a run of 24 GiB
reserved 10 MiB more than its cap (benchmarks/streaming/results.jsonl)."""


class VramCap:
    """A hard cap on everything this process takes of one card.

    `managed_bytes`: managed memory that is to come. It is kept free from the beginning, since the allocator
    fills its cap before the optimizer's first step.
    """

    def __init__(self, size_bytes: int, card: Card, device: torch.device, managed_bytes: int = 0) -> None:
        import torch

        self.size_bytes = size_bytes
        self._managed = managed_bytes
        self._card, self._device = card, device
        self._total = torch.cuda.get_device_properties(device).total_memory
        self._context = 0
        self._is_set = False
        if size_bytes > self._total:
            raise CannotHonour(
                f"--vram-cap {format_bytes(size_bytes)} is more than the card's {format_bytes(self._total)}"
            )
        self.tighten()

    @property
    def allocator_bytes(self) -> int:
        """What the allocator may reserve now."""
        return self.size_bytes - self._context - self._managed - (PAGE if expandable_segments() else 0)

    def tighten(self, managed_bytes: int = 0) -> None:
        """Measure the context again and lower the allocator's cap if it has grown, or if the `managed_bytes`
        that are there now are more than were to come.

        Errors: `CannotHonour` when what is kept back leaves nothing of the cap, or when the context cannot be
        measured.
        """
        import torch

        measured = self._card.context_bytes()
        if measured is None:
            raise CannotHonour(
                "--vram-cap needs NVML to measure the context", "install the driver's NVML library"
            )
        context = measured - managed_bytes
        if self._is_set and context <= self._context and managed_bytes <= self._managed:
            return
        self._context, self._managed = max(context, self._context), max(managed_bytes, self._managed)
        if self.allocator_bytes <= GRANULE:
            paged = f" and {format_bytes(self._managed)} of managed memory" if self._managed else ""
            raise CannotHonour(
                f"--vram-cap {format_bytes(self.size_bytes)} leaves nothing beside the context of "
                f"{format_bytes(self._context)}{paged}"
            )
        if torch.cuda.memory_reserved(self._device) > self.allocator_bytes:
            torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(self.allocator_bytes / self._total, self._device)
        self._is_set = True

    def note(self, reserved: int, context: int, managed: int) -> str:
        """Whether the run kept within the cap, for the report."""
        total = reserved + context + managed
        verdict = "kept within" if total <= self.size_bytes else "EXCEEDED"
        return (
            f"{verdict} --vram-cap {self.size_bytes} bytes: reserved {reserved} + context {context} + "
            f"managed {managed} = {total}"
        )
