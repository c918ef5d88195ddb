"""Streamed layers at run time: each is brought into a slot before it is read.

A hook before every module of a layer that holds streamed weights acquires the layer, not only one before the
layer itself: gradient checkpointing computes a layer again without calling it, and in backward nothing is
called at all but what `backward` puts there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from executor.streaming.arena import Arena
from executor.streaming.link import open_link
from executor.streaming.ring import DiskBlock, Ring
from executor.streaming.schedule import Copy, Schedule
from executor.streaming.slab import Layout
from planner.memory.stream import RING_BUFFERS


@dataclass(eq=False)
class StreamedLayer:
    """One layer whose weights wait in host memory or on disk. `index` counts the streamed layers."""

    index: int
    module: nn.Module
    readers: tuple[nn.Module, ...]
    """The modules that hold the weights."""
    layout: Layout
    places: tuple[tuple[tuple[Any, str], ...], ...]
    """For each piece of the layout, the attributes that must name it."""
    slab: torch.Tensor | DiskBlock
    """Its bytes in host memory, or where they are on disk."""
    slot: int | None = field(default=None, init=False)
    """The slot its attributes point into."""

    def point_to(self, slot: int, views: Sequence[torch.Tensor]) -> None:
        """Let the weights be those in `slot`."""
        for places, view in zip(self.places, views, strict=True):
            for owner, attribute in places:
                setattr(owner, attribute, view)
        self.slot = slot


class Streamer:
    """Carries the slabs of `layers` through `slots` slots on `device`.

    Those on disk come by way of a ring of buffers in `arena`. A copy from there that is not read yet waits
    until the layer is asked for, so that the layers before it are under way by then.
    """

    def __init__(
        self, layers: Sequence[StreamedLayer], slots: int, device: torch.device, arena: Arena | None = None
    ) -> None:
        self.layers = tuple(layers)
        self.slots = slots
        size = max(layer.layout.nbytes for layer in layers)
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(slots)]
        self._slot_at = {buffer.data_ptr(): slot for slot, buffer in enumerate(self._buffers)}
        layouts = {layer.layout for layer in layers}
        self._views = [{layout: layout.views(buffer) for layout in layouts} for buffer in self._buffers]
        self._schedule = Schedule(len(layers), slots)
        self._waiting: dict[int, StreamedLayer] = {}
        """By slot: layers that the schedule has put there and that were not sent yet."""
        self._on_disk = {layer.index: layer.slab for layer in layers if isinstance(layer.slab, DiskBlock)}
        self._ring = _open_ring(self._on_disk, arena or Arena(device)) if self._on_disk else None
        self._present: StreamedLayer | None = None
        try:
            self._link = open_link(device, slots, arena)
            self._hooks = [hook for layer in layers for hook in self._attach(layer)]
            self._copy(self._schedule.begin())
        except BaseException:  # its threads read into memory that is given back next
            if self._ring is not None:
                self._ring.close()
            raise
        for layer in layers:  # somewhere real, for whoever asks for shape or device before the first pass
            slot = layer.index % slots
            layer.point_to(slot, self._views[slot][layer.layout])

    def _attach(self, layer: StreamedLayer) -> list[Any]:
        def acquire(*_: Any) -> None:
            self.acquire(layer)

        def release(*_: Any) -> None:
            # with gradients, backward of this layer may follow at once
            if not torch.is_grad_enabled():
                self._release(layer)

        hooks: list[Any] = [module.register_forward_pre_hook(acquire) for module in layer.readers]
        return [*hooks, layer.module.register_forward_hook(release)]

    def acquire(self, layer: StreamedLayer) -> None:
        """The weights of `layer` may be read by the work given to the device from now on, until another
        layer is acquired.

        Errors: `BadWeights` where a layer cannot be read from disk.
        """
        if self._waiting:
            self._send_what_is_read()
        if self._present is layer:
            return
        self._present = None  # what fails below leaves nobody there
        self._copy(self._schedule.visit(layer.index, turns=layer.module.training))
        slot = self._schedule.slot_of(layer.index)
        if slot in self._waiting:
            self._send(slot)
        self._present = layer
        self._link.wait_for(slot)
        if layer.slot != slot:
            layer.point_to(slot, self._views[slot][layer.layout])

    def _release(self, layer: StreamedLayer) -> None:
        if self._present is layer:
            self._present = None
            self._copy(self._schedule.release())

    def _copy(self, copies: Sequence[Copy]) -> None:
        if not copies:
            return
        self._link.after_reads()
        for copy in copies:
            self._waiting[copy.slot] = self.layers[copy.layer]
        if self._ring is not None:
            self._ring.expect(self._next_from_disk())
        self._send_what_is_read()

    def _next_from_disk(self) -> list[int]:
        """Layers on disk in the order they will be copied, first those that slots wait for."""
        waiting = [layer.index for layer in self._waiting.values() if layer.index in self._on_disk]
        others = self._schedule.next_copies(self._on_disk.keys() - waiting)
        return waiting + others

    def _send_what_is_read(self) -> None:
        for slot, layer in list(self._waiting.items()):
            if self._ring is None or isinstance(layer.slab, torch.Tensor) or self._ring.is_full(layer.index):
                self._send(slot)

    def _send(self, slot: int) -> None:
        layer = self._waiting[slot]
        buffer = self._buffers[slot][: layer.slab.numel()]
        if isinstance(layer.slab, torch.Tensor):
            self._link.send(layer.slab, buffer, slot)
        else:
            self._send_from_disk(layer.index, buffer, slot)
        del self._waiting[slot]  # what failed stays: nobody must find the slot filled

    def _send_from_disk(self, index: int, buffer: torch.Tensor, slot: int) -> None:
        assert self._ring is not None
        if not self._ring.is_full(index):
            self._ring.expect([index, *self._next_from_disk()])
        self._link.send(self._ring.lend(index), buffer, slot)
        self._ring.give_back(index, self._link.mark())

    def locate(self, tensor: torch.Tensor) -> tuple[StreamedLayer, int] | None:
        """The layer in whose slot `tensor` is, and at which byte; None for memory of its own."""
        slot = self._slot_at.get(tensor.untyped_storage().data_ptr())
        if slot is None:
            return None
        index = self._schedule.held_by(slot)
        assert index is not None
        return self.layers[index], tensor.storage_offset() * tensor.element_size()

    def part(
        self,
        layer: StreamedLayer,
        offset: int,
        dtype: torch.dtype,
        shape: Sequence[int],
        stride: Sequence[int],
    ) -> torch.Tensor:
        """The tensor that begins at byte `offset` of the slab of `layer`, which is acquired for it."""
        self.acquire(layer)
        buffer = self._buffers[self._schedule.slot_of(layer.index)]
        return buffer.view(dtype).as_strided(shape, stride, offset // dtype.itemsize)

    @property
    def layers_on_disk(self) -> int:
        """How many of the layers are read from disk in every pass."""
        return len(self._on_disk)

    def traffic(self) -> dict[str, Any]:
        """`bytes_streamed` and `link_bytes_per_s` so far, and what came from disk, as the report names it."""
        link = self._link
        link.settle()
        read, seconds = self._ring.figures() if self._ring is not None else (0, 0.0)
        return {
            "bytes_streamed": link.bytes,
            "link_bytes_per_s": link.bytes / link.seconds if link.seconds > 0 else None,
            "disk_bytes_read": read,
            "disk_bytes_per_s": read / seconds if seconds > 0 else None,
        }

    def close(self) -> None:
        """Take the hooks away; the weights are gone after that."""
        for hook in self._hooks:
            hook.remove()
        self._waiting.clear()
        if self._ring is not None:
            self._ring.close()
        self._link.settle()
        self._buffers, self._views = [], []


def _open_ring(blocks: Mapping[int, DiskBlock], arena: Arena) -> Ring:
    size = max(block.nbytes for block in blocks.values())
    return Ring(blocks, [arena.take(size) for _ in range(min(RING_BUFFERS, len(blocks)))])
