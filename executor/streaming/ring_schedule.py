"""Which layer of the disk tier is read into which buffer of the ring. Pure: no file, thread or device.

A buffer is free, being filled, full, or lent to a copy that reads it. Whenever a reader of the disk is idle,
the layer that is expected soonest and in no buffer is read into a free buffer, or into one whose layer is
expected later than it. A buffer that is being filled or lent is never chosen, whatever is expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

State = Literal["free", "filling", "full", "lent"]


@dataclass(frozen=True)
class Fill:
    """The bytes of one layer are to be read into one buffer."""

    layer: int
    buffer: int


class RingSchedule:
    """What `buffers` buffers hold."""

    def __init__(self, buffers: int) -> None:
        if buffers < 1:
            raise ValueError("a ring has at least one buffer")
        self._state: list[State] = ["free"] * buffers
        self._layer: list[int | None] = [None] * buffers
        self._order: dict[int, int] = {}

    def expect(self, order: Sequence[int]) -> None:
        """Layers will be asked for in this order, the first time each is named; those not named, after
        them."""
        self._order = {layer: at for at, layer in enumerate(dict.fromkeys(order))}

    def next_fill(self) -> Fill | None:
        """What to read next, if anything; the buffer counts as being filled from now on."""
        wanted = next((layer for layer in self._order if layer not in self._layer), None)
        if wanted is None:
            return None
        buffer = self._replaceable(self._order[wanted])
        if buffer is None:
            return None
        self._state[buffer], self._layer[buffer] = "filling", wanted
        return Fill(wanted, buffer)

    def filled(self, layer: int) -> None:
        """All bytes of `layer` are in its buffer."""
        self._change(layer, "filling", "full")

    def is_full(self, layer: int) -> bool:
        """Can `layer` be lent?"""
        return layer in self._layer and self._state[self._layer.index(layer)] == "full"

    def lend(self, layer: int) -> int:
        """The buffer with `layer`, which stays as it is until `give_back`."""
        return self._change(layer, "full", "lent")

    def give_back(self, layer: int) -> None:
        """The copy that read `layer` has ended."""
        self._change(layer, "lent", "full")

    def _change(self, layer: int, before: State, after: State) -> int:
        buffer = self._layer.index(layer)
        assert self._state[buffer] == before, f"layer {layer} is {self._state[buffer]}, not {before}"
        self._state[buffer] = after
        return buffer

    def _replaceable(self, rank: int) -> int | None:
        """The buffer that can best be filled with the layer expected as number `rank`."""
        ranks = {
            buffer: self._rank(buffer)
            for buffer, state in enumerate(self._state)
            if state in ("free", "full")
        }
        latest = max(ranks, key=ranks.__getitem__, default=None)
        return latest if latest is not None and ranks[latest] > rank else None

    def _rank(self, buffer: int) -> int:
        """When the layer in `buffer` is expected: later than all others if it is not, or if there is none."""
        layer = self._layer[buffer]
        if layer is None:
            return len(self._order) + 1
        return self._order.get(layer, len(self._order))
