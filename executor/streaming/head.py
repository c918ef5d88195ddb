"""An output projection that comes to the card in blocks of the vocabulary, through the slots of the layers.

To the streamer a block is one more layer after the last: it is on its way while the last layers compute, the
first layers are while logits are, and in training the last blocks are still there when backward begins. Full
logits of a training batch exist only where the full loss asks for them (`planner/exact/chunked_loss.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from executor.streaming.slab import Layout, Piece
from executor.streaming.streamer import StreamedLayer, Streamer
from planner.exact.vocabulary import Blocks, compute_dtype, project
from planner.memory.stream import head_block_rows


def blocks_of_table(head: nn.Linear, table: torch.Tensor, first: int) -> list[StreamedLayer]:
    """`table`, V x D in host memory, as streamed layers numbered from `first`. Nothing is copied."""
    size, hidden = table.shape
    step = head_block_rows(size, hidden, table.element_size())
    blocks = []
    for number, start in enumerate(range(0, size, step)):
        rows = table[start : start + step]
        piece = Piece(rows.dtype, tuple(rows.shape), (hidden, 1), 0, rows.nbytes)
        slab = rows.reshape(-1).view(torch.uint8)
        layout = Layout((piece,), rows.nbytes)
        blocks.append(StreamedLayer(first + number, head, (), layout, ((),), slab))
    return blocks


class StreamedBlocks:
    """The blocks as a projection reads them (`planner.exact.vocabulary.Blocks`)."""

    def __init__(
        self, blocks: Sequence[StreamedLayer], bias: torch.Tensor | None, streamer: Streamer
    ) -> None:
        self._blocks, self._streamer, self.bias = tuple(blocks), streamer, bias
        step = self._piece(0).shape[0]
        self.starts = tuple(number * step for number in range(len(blocks)))

    def _piece(self, number: int) -> Piece:
        return self._blocks[number].layout.pieces[0]

    def rows(self, number: int) -> torch.Tensor:
        """See `Blocks`."""
        piece = self._piece(number)
        return self._streamer.part(self._blocks[number], 0, piece.dtype, piece.shape, piece.stride)


class BlockedLinear(nn.Linear):
    """A projection that reads its weight in blocks; frozen, gradients go through it."""

    vocabulary_blocks: Blocks

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `nn.Linear.forward`: logits, ... x V."""
        dtype = compute_dtype(input, self.weight)
        return project(input, self.vocabulary_blocks, self.out_features, dtype)


def read_in_blocks(head: Any, blocks: Sequence[StreamedLayer], streamer: Streamer) -> None:
    """Make the linear `head` compute from `blocks`, as `streamer` brings them."""
    bias = None if head.bias is None else head.bias.detach()
    head.vocabulary_blocks = StreamedBlocks(blocks, bias, streamer)
    head.__class__ = BlockedLinear
