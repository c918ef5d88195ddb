"""A layer's tensors in one block of bytes.

Every tensor begins at a multiple of 256 bytes, which is what kernels that read whole cache lines expect, and
a block ends at a multiple of 4 KiB, a page of memory and the unit of direct reads. Layers of the same shapes
have equal layouts, so one set of views per slot serves them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

TENSOR_ALIGNMENT = 256
SLAB_ALIGNMENT = 4096


@dataclass(frozen=True)
class Piece:
    """One tensor of a slab: `shape` and `stride` in elements, `offset` and `nbytes` in bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    nbytes: int

    def view(self, block: torch.Tensor) -> torch.Tensor:
        """The tensor in `block`, a 1-D tensor of bytes on any device."""
        return self.cut(block, self.offset, self.shape, self.stride, self.nbytes)

    def cut(
        self,
        block: torch.Tensor,
        offset: int,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        nbytes: int,
    ) -> torch.Tensor:
        """Any part of the tensor's bytes as a tensor of its dtype."""
        return block[offset : offset + nbytes].view(self.dtype).as_strided(shape, stride)


@dataclass(frozen=True)
class Layout:
    """Where each tensor of a layer is in its slab of `nbytes` bytes. Equal for layers of equal shapes."""

    pieces: tuple[Piece, ...]
    nbytes: int

    def views(self, block: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """All tensors in `block`, in order."""
        return tuple(piece.view(block) for piece in self.pieces)


def lay_out(tensors: Sequence[torch.Tensor]) -> Layout:
    """A layout for `tensors`. Strides are kept where they are dense: kernels may sum in another order
    otherwise."""
    pieces = []
    end = 0
    for tensor in tensors:
        offset = _rounded(end, TENSOR_ALIGNMENT)
        nbytes = tensor.numel() * tensor.element_size()
        stride = tensor.stride() if _dense(tensor) else _contiguous(tensor.shape)
        pieces.append(Piece(tensor.dtype, tuple(tensor.shape), tuple(stride), offset, nbytes))
        end = offset + nbytes
    return Layout(tuple(pieces), _rounded(end, SLAB_ALIGNMENT))


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _dense(tensor: torch.Tensor) -> bool:
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() > 0 and reach + 1 == tensor.numel()


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    strides = []
    step = 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(1, length)
    return tuple(reversed(strides))
