"""Embeddings whose table stays in host memory: the rows of a pass's tokens are gathered there and copied.

Token ids come from the card, so the host waits once a pass, where it begins. Tables are frozen: no gradient
flows into one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from executor.errors import CannotHonour
from executor.streaming.arena import Arena
from planner.memory.stream import GATHER_BYTES


class Gather:
    """Page-locked memory that rows go through on their way to `device`, none on the CPU: half of it is filled
    while the other half is copied."""

    def __init__(self, device: torch.device, arena: Arena) -> None:
        self.halves: list[torch.Tensor] = []
        self.copied: list[torch.cuda.Event] = []
        if device.type == "cuda":
            self.halves = [arena.take(GATHER_BYTES // 2) for _ in range(2)]
            self.copied = [torch.cuda.Event() for _ in range(2)]


class HostRows:
    """Rows of `table`, V x D in host memory, as they are asked for on `device`.

    `gather`: what they go through, if it is shared; else it is made from `arena`.
    """

    def __init__(
        self, table: torch.Tensor, device: torch.device, arena: Arena, gather: Gather | None = None
    ) -> None:
        self._table, self._device = table, device
        self._gather = gather or Gather(device, arena)
        self.passes = 0
        """How often rows were asked for."""

    def of(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows of `ids`, of any shape: ... x D on the device. Errors: `IndexError` past the table."""
        self.passes += 1
        wanted = ids.reshape(-1).to("cpu")
        on_card = self._device.type == "cuda"
        rows = self._carried(wanted) if on_card else self._table.index_select(0, wanted)
        return rows.view(*ids.shape, self._table.shape[1])

    def _carried(self, wanted: torch.Tensor) -> torch.Tensor:
        halves, copied = self._gather.halves, self._gather.copied
        dtype, width = self._table.dtype, self._table.shape[1]
        rows = torch.empty((wanted.numel(), width), dtype=dtype, device=self._device)
        row = width * dtype.itemsize
        step = max(1, halves[0].numel() // row)
        for number, start in enumerate(range(0, wanted.numel(), step)):
            part, half = wanted[start : start + step], number % 2
            copied[half].synchronize()
            gathered = halves[half][: part.numel() * row].view(dtype).view(-1, width)
            torch.index_select(self._table, 0, part, out=gathered)
            rows[start : start + step].copy_(gathered, non_blocking=True)
            copied[half].record(torch.cuda.current_stream(self._device))
        return rows


class _FromHost(nn.Embedding):
    """An embedding that finds its rows in host memory."""

    host_rows: HostRows

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """As `nn.Embedding.forward`."""
        return self.host_rows.of(input)


def read_from_host(name: str, module: Any, rows: HostRows) -> None:
    """Make the embedding `module` look its rows up in host memory, and do with them what its class does
    (Gemma's scales them).

    Errors: `CannotHonour` for a class that looks them up itself.
    """
    stock = type(module)
    module.host_rows = rows
    # `super().forward` of a derived class is then the one above
    module.__class__ = (
        _FromHost
        if stock is nn.Embedding
        else type(stock.__name__, (stock, _FromHost), {"__doc__": stock.__doc__})
    )
    if stock.forward is nn.Embedding.forward:
        return
    before = rows.passes
    with torch.no_grad():
        module(torch.zeros((1, 1), dtype=torch.long, device=module.weight.device))
    if rows.passes == before:
        raise CannotHonour(
            f"{name} is a {stock.__name__}, which reads its weights itself; the plan places them in RAM",
            "keep it on the card",
        )
