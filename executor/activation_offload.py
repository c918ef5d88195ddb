"""Checkpoints in host memory: the inputs of layers that gradient checkpointing keeps go to a page-locked pool
while later layers run, and come back while later layers' backward does.

Copies have streams of their own, one for each direction of the link, and only bytes are moved: gradients are
those of a run without it. The host waits for nothing. The card's allocator hands memory out in the order of
the host's calls, far ahead of the card; so the computing stream waits for the copy of the input before last
ahead of letting go of it, and no more than `IN_FLIGHT` inputs are on the card at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from executor.errors import CannotHonour
from executor.streaming.arena import Arena
from executor.streaming.layers import find_stack, put_checkpointing_back
from executor.streaming.link import open_link
from planner.memory.tape import rounded
from planner.memory.train import IN_FLIGHT
from planner.units import format_bytes


@dataclass(frozen=True)
class _Checkpoint:
    """The input of layer `number` in forward pass `turn`; without a tensor it is in the pool."""

    number: int
    turn: int
    shape: torch.Size
    dtype: torch.dtype
    tensor: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class CheckpointPool:
    """Host memory for the inputs of `layers` layers of up to `tokens` tokens, and the copies there and back.

    The last `IN_FLIGHT` stay on the card: backward begins with them.
    """

    def __init__(self, layers: int, tokens: int, device: torch.device) -> None:
        self._layers, self._tokens, self._device = layers, tokens, device
        self._arena = Arena(device)
        self._out, self._back = open_link(device, layers), open_link(device, layers)
        self._places: list[torch.Tensor] = []
        self._leaving: dict[int, torch.Tensor] = {}
        self._arriving: dict[int, torch.Tensor] = {}
        self._stored: dict[int, _Checkpoint] = {}
        self._turn = 0

    @property
    def pinned_bytes(self) -> int:
        """Bytes of page-locked memory."""
        return self._arena.pinned_bytes

    @property
    def bytes_moved(self) -> int:
        """To host memory so far."""
        return self._out.bytes

    def begin(self) -> None:
        """A forward pass begins. Whatever an earlier one has left, if it was broken off, is let go."""
        self._let_go(self._layers)
        for number in self._arriving:
            self._back.wait_for(number)
        self._arriving.clear()
        self._stored.clear()
        self._turn += 1

    def put(self, number: int, tensor: torch.Tensor) -> _Checkpoint:
        """Layer `number` is about to run on `tensor`."""
        self._let_go(number - IN_FLIGHT + 1)
        checkpoint = _Checkpoint(number, self._turn, tensor.shape, tensor.dtype, tensor)
        if number >= self._layers - IN_FLIGHT or not tensor.is_contiguous():
            return checkpoint
        self._out.after_reads()
        self._out.send(_bytes(tensor), self._place(checkpoint), number)
        self._leaving[number] = tensor
        stored = self._stored[number] = _Checkpoint(number, self._turn, tensor.shape, tensor.dtype)
        return stored

    def take(self, checkpoint: _Checkpoint) -> torch.Tensor:
        """The input of a layer, on the card; the one of the layer before sets out.

        Errors: `RuntimeError` after another forward pass, whose inputs have taken the places of this one's.
        """
        number, tensor = checkpoint.number, checkpoint.tensor
        if checkpoint.turn != self._turn:
            raise RuntimeError("backward of a pass whose checkpoints a later pass has overwritten")
        if tensor is None:
            if number not in self._arriving:
                self._fetch(checkpoint)
            tensor = self._arriving.pop(number)
            self._back.wait_for(number)
        before = self._stored.get(number - 1)
        if before is not None and before.number not in self._arriving:
            self._fetch(before)
        return tensor

    def _fetch(self, checkpoint: _Checkpoint) -> None:
        if checkpoint.number in self._leaving:
            self._let_go(checkpoint.number + 1)
        tensor = torch.empty(checkpoint.shape, dtype=checkpoint.dtype, device=self._device)
        # its memory may have been another tensor's, of which work that was given to the card still reads
        self._back.after_reads()
        self._back.send(self._place(checkpoint), _bytes(tensor), checkpoint.number)
        self._arriving[checkpoint.number] = tensor

    def _let_go(self, end: int) -> None:
        """Of inputs before that of layer `end`, once they are copied."""
        for number in [each for each in self._leaving if each < end]:
            self._out.wait_for(number)
            del self._leaving[number]

    def _place(self, checkpoint: _Checkpoint) -> torch.Tensor:
        """Where a checkpoint is in host memory, its bytes. The pool is made at the first, for the largest
        batch of the plan; a larger one would get a place of its own."""
        if not self._places:
            self._places = self._make_places(checkpoint)
        if self._places[checkpoint.number].numel() < checkpoint.nbytes:
            self._places[checkpoint.number] = self._arena.take(checkpoint.nbytes)
        return self._places[checkpoint.number][: checkpoint.nbytes]

    def _make_places(self, checkpoint: _Checkpoint) -> list[torch.Tensor]:
        planned = self._tokens * checkpoint.shape[-1] * checkpoint.dtype.itemsize
        size, count = rounded(max(planned, checkpoint.nbytes)), self._layers - IN_FLIGHT
        _require_room(count * size)
        pool = self._arena.take(count * size)
        return list(pool.split(size))

    def close(self) -> None:
        """Wait for all copies, and unlock the memory."""
        self._out.settle()
        self._back.settle()
        self._leaving.clear()
        self._arriving.clear()
        self._arena.close()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(-1).view(torch.uint8)


def _identity(tensor: torch.Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr(), tensor.shape


def _require_room(needed: int) -> None:
    from executor.engines.accelerate import available_ram

    available = available_ram()
    if available is not None and needed > available:
        raise CannotHonour(
            f"the checkpoints take {format_bytes(needed)} of RAM and {format_bytes(available)} are available",
            "close other programs, or plan without `--activation-offload`",
        )


class _Offloaded:
    """Layer `number`'s checkpointing, with its input in the pool."""

    def __init__(self, stock: Callable[..., Any], number: int, pool: CheckpointPool) -> None:
        self.stock, self._number, self._pool = stock, number, pool

    def __call__(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        # both flavours of checkpointing keep the layer's arguments while these hooks are on, and nothing else
        given = _identity(args[0]) if args and isinstance(args[0], torch.Tensor) else None

        # the hooks live until backward: one that referred to the input itself would keep it on the card
        def pack(tensor: torch.Tensor) -> Any:
            same = given == _identity(tensor) and tensor.numel() > 0
            return self._pool.put(self._number, tensor) if same else tensor

        def unpack(saved: Any) -> torch.Tensor:
            return self._pool.take(saved) if isinstance(saved, _Checkpoint) else saved

        with saved_tensors_hooks(pack, unpack):
            return self.stock(function, *args, **kwargs)


@contextmanager
def offloading(model: Any, tokens: int, device: torch.device) -> Iterator[CheckpointPool]:
    """Within, checkpoints of the layers of `model` go to host memory; `tokens`: of the largest micro-batch.

    Checkpointing may be turned on before or afterwards, in either flavour. Errors: `CannotHonour` for a model
    without layers, or later on too little RAM.
    """
    stack = find_stack(model)
    pool = CheckpointPool(len(stack.layers), tokens, device)

    def begin(*_: Any) -> None:
        if torch.is_grad_enabled():
            pool.begin()
            _wrap(stack.layers, pool)

    hook = stack.owner.register_forward_pre_hook(begin)
    try:
        yield pool
    finally:
        hook.remove()
        put_checkpointing_back(stack.layers, _Offloaded)
        pool.close()


def _wrap(layers: Sequence[nn.Module], pool: CheckpointPool) -> None:
    for number, layer in enumerate(layers):
        stock = getattr(layer, "_gradient_checkpointing_func", None)
        if stock is not None and not isinstance(stock, _Offloaded):
            layer._gradient_checkpointing_func = _Offloaded(stock, number, pool)  # type: ignore[assignment]
