"""The passes of a model as requests to the allocator: what a layer or the model's end asks for, in order.

The tape of `planner.memory.tape`, written down. A part is worked out once and played as often as a model has
such layers (`planner.memory.replay`). Only requests over 1 MiB are kept: smaller ones have segments of their
own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from planner.memory.allocator import AT_ONCE
from planner.memory.head import Ending, loss_of
from planner.memory.layer import layer_cost, run_layer
from planner.memory.shapes import Pass
from planner.memory.tape import UNSPLIT, Tape, Tensor, booked, rounded
from profiles.schema import Layer

Event = tuple[object, int]
"""What is allocated and its bytes, or 0 where it is freed."""
WORKSPACE = "workspace"
"""Stands for cuBLAS's workspace where a part's first product asks for it."""


class EventTape(Tape):
    """A tape that also writes down what it allocates and frees, temporaries included."""

    def __init__(self, recording: bool = True, stop_after: int | None = None) -> None:
        super().__init__(recording, stop_after)
        self.events: list[Event] = []
        self._inside = False
        self.settled_share = 0.0
        """Bytes that a static cache takes for each byte of keys and values it is handed."""

    def settle(self, *tensors: Tensor) -> None:
        """As `Tape.settle`: a layer's static cache is made when it is first written."""
        for tensor in tensors:
            n = int(tensor.bytes * self.settled_share)
            if n > UNSPLIT:
                self.events.append((object(), n))

    @property
    def autocast_copies(self) -> list[Tensor]:
        """Copies of weights that autocast holds."""
        return list(self._cache.values())

    def touch(self, n: int) -> None:
        """As `Tape.touch`: a block that is there for one kernel."""
        super().touch(n)
        if n > UNSPLIT and not self._inside and not self.stopped:
            name = object()
            self.events += ((name, n), (name, 0))

    def new(self, n: int, needs_grad: bool = False, width: int = 2) -> Tensor:
        """As `Tape.new`."""
        tensor = super().new(n, needs_grad, width)
        if tensor.booked > UNSPLIT:
            self.events.append((tensor, tensor.bytes))
        return tensor

    def free(self, *tensors: Tensor | None) -> None:
        """As `Tape.free`."""
        for tensor in tensors:
            if tensor is None:
                continue
            last = tensor.refs == 1 and tensor.base is None and tensor.booked > UNSPLIT
            super().free(tensor)
            if last:
                self.events.append((tensor, 0))

    def op(self, inputs: Sequence[Tensor], out_bytes: int, *args: Any, **kwargs: Any) -> Tensor:
        """As `Tape.op`; a temporary is there until the output is."""
        temp = kwargs.get("temp", 0)
        if temp <= UNSPLIT or self.stopped:
            return super().op(inputs, out_bytes, *args, **kwargs)
        name = object()
        self.events.append((name, temp))
        self._inside = True
        out = super().op(inputs, out_bytes, *args, **kwargs)
        self._inside = False
        self.events.append((name, 0))
        return out


Placed = tuple[tuple[int, int], ...]
"""Requests (place, bytes) and frees (place, 0) on numbered places; (`AT_ONCE`, bytes) stands for both."""


class Part(Struct, frozen=True):
    """A pass through a layer or the model's end."""

    events: Placed
    brief: Placed
    """Only what outlives the pass."""
    places: int
    given: int
    """Place of what comes in: -1 where it is too small to be followed."""
    result: int
    """Place of what goes out."""
    left: tuple[int, ...] = ()
    """Places of what stays for good: gradients of parameters."""
    until: tuple[int, ...] = ()
    """Places of what stays until the layer's backward is done."""
    cached: tuple[int, ...] = ()
    """Places of what stays until the forward pass is left."""
    keeps_input: bool = True
    """Backward needs what came in."""


class Places:
    """Numbers for tensors, in the order in which they come. Parts that share tensors share them."""

    def __init__(self) -> None:
        self._number: dict[int, int] = {}
        self._things: list[object] = []

    def part(
        self,
        events: Sequence[Event],
        given: Tensor,
        result: object | None,
        until: Iterable[object] = (),
        cached: Iterable[object] = (),
        keeps_input: bool = True,
    ) -> Part:
        """`events` on places."""
        incoming = self._of(given)
        before = set(range(len(self._things)))
        placed = tuple((self._of(name), n) for name, n in events)
        alive: dict[int, int] = {}
        freed = []
        for place, n in placed:
            if n:
                alive[place] = n
            elif alive.pop(place, None) is None:
                freed.append(place)
        out = self._known(result)
        later, copies = self._among(until, alive), self._among(cached, alive)
        left = tuple(place for place in alive if place not in {incoming, out, *later, *copies})
        brief = (*alive.items(), *((place, 0) for place in freed if place in before))
        return Part(
            _at_once(placed), brief, len(self._things), incoming, out, left, later, copies, keeps_input
        )

    def _of(self, thing: object) -> int:
        found = self._number.get(id(thing))
        if found is None:
            found = self._number[id(thing)] = len(self._things)
            self._things.append(thing)
        return found

    def _known(self, thing: object | None) -> int:
        return -1 if thing is None else self._number.get(id(thing), -1)

    def _among(self, things: Iterable[object], alive: dict[int, int]) -> tuple[int, ...]:
        return tuple(place for place in dict.fromkeys(map(self._known, things)) if place in alive)


def _at_once(events: Placed) -> Placed:
    """`events`, with a request that is followed by its free as one."""
    found: list[tuple[int, int]] = []
    for place, n in events:
        if not n and found and found[-1][0] == place:
            found[-1] = AT_ONCE, found[-1][1]
        else:
            found.append((place, n))
    return tuple(found)


# --------------------------------------------------------------------------- layers and the model's end


@lru_cache(maxsize=1024)
def layer_parts(
    layer: Layer, p: Pass, hidden: int, checkpointing: bool, first: bool = False
) -> tuple[Part, Part, int]:
    """Forward and backward of one layer, and the width of what it hands on.

    `first`: the layer's input needs no gradient.
    """
    saving_ops = layer_cost(layer, p, hidden).saving_ops if checkpointing else 0
    p = replace(p, hidden=hidden)
    n, places = rounded(p.tokens * hidden * p.stream), Places()
    tape = EventTape(recording=not checkpointing)
    x = Tensor(n, needs_grad=not first, width=p.stream)
    out = run_layer(tape, p, x, layer)
    copies = tape.autocast_copies
    if not checkpointing:
        tape.leave_autocast()
    forward = places.part(tape.events, x, out, tape.pinned, copies, checkpointing or x.refs > 1)
    if checkpointing:
        tape, x, places = EventTape(stop_after=saving_ops), Tensor(n, True, width=p.stream), Places()
        out = run_layer(tape, p, x, layer)
        tape.leave_autocast()
    else:
        tape.events = []
    out.grad = Tensor(out.bytes, width=out.width)
    gradient = out.grad
    tape.free(out)
    tape.backward(out)
    tape.free(*tape.pinned)
    apart = () if checkpointing else (x, out)
    events = [event for event in tape.events if event[0] not in apart]
    return forward, places.part(events, gradient, x.grad), out.width


@lru_cache(maxsize=1024)
def head_parts(end: Ending, p: Pass, fused: bool, workspace: int) -> tuple[Part, Part]:
    """Final norm, projection and loss, forward and backward, with the `workspace` of autograd's thread."""
    tape, places = EventTape(), Places()
    x = tape.new(p.tokens * end.hidden * p.stream, needs_grad=True, width=p.stream)
    tape.events = []
    loss = loss_of(tape, p, x, end, fused)
    forward = places.part(tape.events, x, None)
    tape.events = []
    loss.grad = tape.new(512)
    tape.backward(loss)
    products = {rounded(p.tokens * end.hidden * width) for width in (2, 4)}
    products.add(booked(end.vocab * end.hidden * p.width))
    at = next((i for i, (_, n) in enumerate(tape.events) if n in products), 0)
    tape.events.insert(at, (WORKSPACE, workspace))
    return forward, places.part(tape.events, x, x.grad, until=(WORKSPACE,))
