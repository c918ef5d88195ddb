"""Follow the life of every storage torch makes on the card, and cut the run into segments.

A dispatch mode sees each tensor an operator returns; a finalizer on its storage sees it go. Sizes are those
of the CUDA caching allocator (multiples of 512 bytes), so what is counted is what
`torch.cuda.max_memory_allocated` would say of the same statements. The card is played by the meta device
(`planner.exact.card`): tensors there have shapes and storages, no contents.

Kernels hide what they allocate for themselves and free before they return: `planner.exact.kernels` says how
much that is.

One trap of watching: torch's engine adds gradients in place only where no dispatch mode is active. The sum it
makes here instead is booked as the buffer it would have gone into (torch/csrc/autograd/input_buffer.cpp).
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from planner.exact.kernels import STAND_INS, passing_bytes
from planner.memory.tape import booked, rounded

Bytes = Counter[str]
"""Live bytes by origin."""


@dataclass
class Segment:
    """A stretch of the run between two borders: the start of a layer, of its backward pass, of the loss."""

    phase: str
    """prefill, decode, forward, loss or backward."""
    layer: int | None
    """Index of the decoder layer at work; None before, between and after them."""
    start: Bytes
    """Live at its beginning."""
    peak: Bytes
    """Live at its fullest; `fresh` is what the segment itself made."""
    fresh: int
    end: Bytes
    origin: str
    """Of what the segment makes."""
    block: int = 0
    """Largest single request."""

    @property
    def bytes(self) -> int:
        """Live bytes at the fullest moment."""
        return sum(self.peak.values())


class _Booking:
    """One storage on the books."""

    __slots__ = ("bytes", "node", "origin", "segment")

    def __init__(self, n: int, origin: str, segment: int, node: int) -> None:
        self.bytes = n
        self.origin = origin
        self.segment = segment
        self.node = node
        """Number of the autograd node that made it; -1 outside backward."""


class Storages(TorchDispatchMode):
    """Live storages by origin, and segment by segment the fullest moment."""

    def __init__(self, major: int) -> None:
        super().__init__()
        self.major = major
        """Major version of the card's compute capability."""
        self.live: Bytes = Counter()
        self.total = 0
        self.segments: list[Segment] = []
        self.unknown: set[str] = set()
        """Operators of other libraries whose own workspace nobody described."""
        self._made: weakref.WeakKeyDictionary[Any, _Booking] = weakref.WeakKeyDictionary()
        self._fresh = 0
        self._peak = 0
        self._origin = "inputs"
        self._backward = False

    # ------------------------------------------------------------------ segments

    def begin(self, phase: str, layer: int | None = None, origin: str = "activations") -> None:
        """End the segment so far and begin one; storages made from now on are of `origin`."""
        self.end()
        live = self.live.copy()
        self.segments.append(Segment(phase, layer, live, live, 0, live, origin))
        self._fresh, self._peak, self._origin = 0, self.total, origin
        self._backward = phase == "backward"

    def end(self) -> None:
        """The segment so far is over."""
        if not self.segments:
            return
        if self._backward:
            self._settle_gradients()
        self.segments[-1].end = self.live.copy()

    def _settle_gradients(self) -> None:
        """Gradients that outlive their layer sit in segments of their own (`booked`)."""
        here = len(self.segments)
        for booking in list(self._made.values()):
            if booking.segment == here and booking.origin == "gradients":
                more = booked(booking.bytes) - booking.bytes
                booking.bytes += more
                self._change(booking, more)

    # ------------------------------------------------------------------ storages

    def adopt(self, tensors: Any, origin: str) -> int:
        """Book tensors that exist already, each storage once; their bytes."""
        before = self.total
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if storage not in self._made:
                self._book(storage, rounded(storage.nbytes()), origin)
        return self.total - before

    def reassign(self, tensor: torch.Tensor, origin: str) -> None:
        """Count a storage under another origin from now on."""
        booking = self._made.get(tensor.untyped_storage())
        if booking is not None and booking.origin != origin:
            self.live[booking.origin] -= booking.bytes
            self.live[origin] += booking.bytes
            booking.origin = origin

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        stand_in = STAND_INS.get(func.name())
        out = func(*args, **(kwargs or {})) if stand_in is None else stand_in(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self._see(out, func, args)
        elif isinstance(out, (tuple, list)):
            for item in out:
                if isinstance(item, torch.Tensor):
                    self._see(item, func, args)
        passing = passing_bytes(func, args, kwargs or {}, out, self)
        if passing:
            self._touch(passing)
        return out

    def _see(self, tensor: torch.Tensor, func: Any, args: Any) -> None:
        if tensor.device.type != "meta":
            return
        storage = tensor.untyped_storage()
        if storage in self._made:
            return
        n = storage.nbytes()
        # recomputation runs inside backward too, but with gradients enabled
        if self._backward and func is _ADD and not torch.is_grad_enabled() and self._in_place(args):
            self._take_over(storage, args[0].untyped_storage())
            return
        self._book(storage, rounded(n), self._origin)

    def _in_place(self, args: Any) -> bool:
        """Is this the engine adding a gradient to a dense buffer that only it holds?

        Its additions take what the node at work has just made to what an earlier one left; an addition inside
        a node's own formula takes two tensors of that node.
        """
        held, new = args[0], args[1]
        if not isinstance(held, torch.Tensor) or not isinstance(new, torch.Tensor):
            return False
        storage = held.untyped_storage()
        booking = self._made.get(storage)
        if booking is None or booking.node == _node() or held.shape != new.shape or 0 in held.stride():
            return False
        # the tensor itself, and the wrapper Python made to look at it
        return torch._C._storage_Use_Count(storage._cdata) <= 2

    def _take_over(self, storage: Any, old: Any) -> None:
        booking = self._made.get(old)
        if booking is None:
            return
        mine = _Booking(booking.bytes, booking.origin, booking.segment, _node())
        booking.bytes = 0
        self._made[storage] = mine
        weakref.finalize(storage, self._drop, mine)

    def _book(self, storage: Any, n: int, origin: str) -> None:
        booking = _Booking(n, origin, len(self.segments), _node() if self._backward else -1)
        self._made[storage] = booking
        self._change(booking, n)
        if self.segments and n > self.segments[-1].block:
            self.segments[-1].block = n
        weakref.finalize(storage, self._drop, booking)

    def _drop(self, booking: _Booking) -> None:
        self._change(booking, -booking.bytes)
        booking.bytes = 0

    def _change(self, booking: _Booking, n: int) -> None:
        self.live[booking.origin] += n
        self.total += n
        if booking.segment == len(self.segments):
            self._fresh += n
        if self.total > self._peak:
            self._record(0)

    def _touch(self, n: int) -> None:
        """`n` bytes that a kernel takes and gives back."""
        if self.total + n > self._peak:
            self._record(n)

    def _record(self, passing: int) -> None:
        self._peak = self.total + passing
        if self.segments:
            segment = self.segments[-1]
            segment.peak = self.live.copy()
            segment.fresh = self._fresh + passing
            if passing:
                segment.peak[self._origin] += passing


_ADD = torch.ops.aten.add.Tensor


def _node() -> int:
    node = torch._C._current_autograd_node()
    return -1 if node is None else int(node._sequence_nr())
