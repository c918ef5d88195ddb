"""An output projection in blocks of the vocabulary, so that its weights need not be on the card together.

Whether the blocks are slices of a resident weight or come to the card one after the other, the same products
are computed in the same order: results are equal bit by bit. Backward goes through the blocks in reverse, so
that the last ones are still there.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch.nn import functional

from planner.memory.stream import head_block_rows


class Blocks(Protocol):
    """The rows of an output projection, V x D, in blocks."""

    starts: tuple[int, ...]
    """First row of each block."""
    bias: torch.Tensor | None

    def rows(self, number: int) -> torch.Tensor:
        """Rows of block `number`, R x D on the device; they may be gone when another block is asked for."""


class ResidentBlocks:
    """Slices of a weight that is on the device."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        size, hidden = weight.shape
        self._weight, self.bias = weight, bias
        self._step = head_block_rows(size, hidden, weight.element_size())
        self.starts = tuple(range(0, size, self._step))

    def rows(self, number: int) -> torch.Tensor:
        """See `Blocks`."""
        start = self.starts[number]
        return self._weight[start : start + self._step]


def blocks_of(head: Any) -> Blocks | None:
    """The blocks of an output projection; None for one that is no plain linear (quantized, adapted)."""
    own: Blocks | None = getattr(head, "vocabulary_blocks", None)
    if own is not None:
        return own
    if type(head) is not torch.nn.Linear:
        return None
    return ResidentBlocks(head.weight.detach(), None if head.bias is None else head.bias.detach())


def product(states: torch.Tensor, rows: torch.Tensor, bias: torch.Tensor | None, start: int) -> torch.Tensor:
    """Logits of one block, ... x R, in the dtype of `states`."""
    part = None if bias is None else bias[start : start + rows.shape[0]].to(states.dtype)
    return functional.linear(states, rows.to(states.dtype), part)


def project(hidden: torch.Tensor, blocks: Blocks, vocabulary: int, dtype: torch.dtype) -> torch.Tensor:
    """All logits, ... x V in `dtype`; gradients reach `hidden` (... x D), and no weight."""
    logits: torch.Tensor = _Projection.apply(hidden.to(dtype), blocks, vocabulary)
    return logits


def compute_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """What a linear would compute in here: autocast's dtype where it is on."""
    # the tracer's tensors stand for those on a card
    device = "cuda" if hidden.device.type == "meta" else hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


class _Projection(torch.autograd.Function):
    """Keeps the blocks, not their weights: backward asks for them again."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, blocks: Blocks, vocabulary: int) -> torch.Tensor:
        logits = hidden.new_empty((*hidden.shape[:-1], vocabulary))
        for number, start in enumerate(blocks.starts):
            rows = blocks.rows(number)
            logits[..., start : start + rows.shape[0]] = product(hidden, rows, blocks.bias, start)
        ctx.blocks = blocks
        return logits

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        blocks: Blocks = ctx.blocks
        total: torch.Tensor | None = None
        for number in reversed(range(len(blocks.starts))):
            rows, start = blocks.rows(number), blocks.starts[number]
            part = gradient[..., start : start + rows.shape[0]] @ rows.to(gradient.dtype)
            total = part.float() if total is None else total.add_(part)
        assert total is not None
        return total.to(gradient.dtype), None, None
