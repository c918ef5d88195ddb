"""Streamed layers at run time: each is brought into a slot before it is read.

A hook before every module of a layer that holds streamed weights acquires the layer, not only one before the
layer itself: gradient checkpointing computes a layer again without calling it, and in backward nothing is
called at all but what `backward` puts there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from executor.streaming.link import open_link
from executor.streaming.schedule import Copy, Schedule
from executor.streaming.slab import Layout


@dataclass(eq=False)
class StreamedLayer:
    """One layer whose weights wait in host memory. `index` counts the streamed layers."""

    index: int
    module: nn.Module
    readers: tuple[nn.Module, ...]
    """The modules that hold the weights."""
    layout: Layout
    places: tuple[tuple[tuple[Any, str], ...], ...]
    """For each piece of the layout, the attributes that must name it."""
    slab: torch.Tensor
    slot: int | None = field(default=None, init=False)
    """The slot its attributes point into."""

    def point_to(self, slot: int, views: Sequence[torch.Tensor]) -> None:
        """Let the weights be those in `slot`."""
        for places, view in zip(self.places, views, strict=True):
            for owner, attribute in places:
                setattr(owner, attribute, view)
        self.slot = slot


class Streamer:
    """Carries the slabs of `layers` through `slots` slots on `device`."""

    def __init__(self, layers: Sequence[StreamedLayer], slots: int, device: torch.device) -> None:
        self.layers = tuple(layers)
        self.slots = slots
        size = max(layer.layout.nbytes for layer in layers)
        self._buffers = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(slots)]
        self._slot_at = {buffer.data_ptr(): slot for slot, buffer in enumerate(self._buffers)}
        layouts = {layer.layout for layer in layers}
        self._views = [{layout: layout.views(buffer) for layout in layouts} for buffer in self._buffers]
        self._schedule = Schedule(len(layers), slots)
        self._link = open_link(device, slots)
        self._present: StreamedLayer | None = None
        self._hooks = [hook for layer in layers for hook in self._attach(layer)]
        self._copy(self._schedule.begin())
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
        layer is acquired."""
        if self._present is layer:
            return
        self._present = layer
        self._copy(self._schedule.visit(layer.index, turns=layer.module.training))
        slot = self._schedule.slot_of(layer.index)
        self._link.wait_for(slot)
        if layer.slot != slot:
            layer.point_to(slot, self._views[slot][layer.layout])

    def _release(self, layer: StreamedLayer) -> None:
        if self._present is layer:
            self._present = None
            self._copy(self._schedule.release())

    def _copy(self, copies: Sequence[Copy]) -> None:
        if copies:
            self._link.after_reads()
        for copy in copies:
            slab = self.layers[copy.layer].slab
            self._link.send(slab, self._buffers[copy.slot][: slab.numel()], copy.slot)

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

    def traffic(self) -> dict[str, Any]:
        """`bytes_streamed` and `link_bytes_per_s` so far, as the report names them."""
        link = self._link
        link.settle()
        return {
            "bytes_streamed": link.bytes,
            "link_bytes_per_s": link.bytes / link.seconds if link.seconds > 0 else None,
        }

    def close(self) -> None:
        """Take the hooks away; the weights are gone after that."""
        for hook in self._hooks:
            hook.remove()
        self._link.settle()
        self._buffers, self._views = [], []
