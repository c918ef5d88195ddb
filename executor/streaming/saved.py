"""What autograd saves of streamed weights: a handle instead of the slot's memory.

A slot holds another layer by the time backward comes. Hooks on saved tensors
(torch.autograd.graph.saved_tensors_hooks) put a handle in the place of every tensor in a slot - weights of
frozen linears and norms, slices of fused experts - and fetch its bytes again when backward asks for it.

Non-reentrant checkpointing has hooks of its own, which take the place of these within a layer. What it keeps
of a layer that it computes again is used before another layer is computed again: autograd runs nodes in the
reverse order of their making.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from executor.streaming.streamer import StreamedLayer, Streamer


@dataclass(frozen=True)
class Handle:
    """A tensor in the slab of `layer`; `offset` in bytes, the rest as torch counts."""

    layer: StreamedLayer
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class SavedWeights:
    """While the module `owner` runs with gradients, nothing saved for backward is in a slot."""

    def __init__(self, streamer: Streamer, owner: nn.Module) -> None:
        self._streamer = streamer
        self._open: list[saved_tensors_hooks] = []
        self._hooks = [
            owner.register_forward_pre_hook(self._enter),
            owner.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            hooks = saved_tensors_hooks(self._pack, self._unpack)
            hooks.__enter__()
            self._open.append(hooks)

    def _leave(self, *_: Any) -> None:
        if self._open:
            self._open.pop().__exit__()

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor | Handle:
        found = self._streamer.locate(tensor)
        if found is None:
            return tensor
        return Handle(*found, tensor.dtype, tuple(tensor.shape), tensor.stride())

    def _unpack(self, saved: torch.Tensor | Handle) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        return self._streamer.part(saved.layer, saved.offset, saved.dtype, saved.shape, saved.stride)

    def remove(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()
        while self._open:  # of a pass that ctrl-C broke off
            self._open.pop().__exit__()
