"""Which slab is copied into which slot, and when. Pure: layers and slots are numbers; no device is needed.

A model visits its layers in one of two courses. Decoding goes round: 0, 1, ..., L-1, 0, 1, ... Training goes
to and fro: 0, ..., L-1, L-1, ..., 0, 0, ..., whether backward reads the layers itself or a checkpoint
computes them again first. Which one it is shows at each visit; where it goes is only used to look ahead, so
an unforeseen order costs copies and nothing else.

Whenever a slot may be overwritten, the layer that is needed soonest and not there replaces the one that is
needed latest (Belady's rule), if it is needed sooner. From this follow: one copy per layer and round in
decoding, the next copy under way before a layer computes, the first layers on their way during the head and
sampling; and at the turns of training the last layers stay in their slots.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Copy:
    """One slab to one slot."""

    layer: int
    slot: int


class Schedule:
    """What the slots hold, for `layers` streamed layers in the order of the model and `slots` slots.

    A layer may be read from its visit until the next visit of another one, or until `release`. The copies
    that a call returns are to be made in their order, after all reads of earlier visits.
    """

    def __init__(self, layers: int, slots: int) -> None:
        if layers < 1 or slots < 1 or (layers > 1 and slots < 2):
            raise ValueError("more than one layer needs two slots: one to read while the other is filled")
        self._layers = layers
        self._held: list[int | None] = [None] * slots
        self._slot: dict[int, int] = {}
        self._reading: int | None = None
        self._last, self._step, self._turns = -1, 1, False

    def begin(self) -> list[Copy]:
        """Fill the slots before the first visit."""
        return self._fetch_ahead()

    def visit(self, layer: int, turns: bool) -> list[Copy]:
        """`layer` is about to be read; copies of it, if any, come first.

        `turns`: this pass is followed by one in the other direction.
        """
        if layer != self._last:
            self._step = 1 if layer > self._last or not turns else -1
        self._last, self._turns, self._reading = layer, turns, layer
        copies = [] if layer in self._slot else [self._put(layer, self._latest_needed())]
        return copies + self._fetch_ahead()

    def release(self) -> list[Copy]:
        """The layer visited last will not be read again before its next visit."""
        self._reading = None
        return self._fetch_ahead()

    def slot_of(self, layer: int) -> int:
        """The slot that holds `layer`, or will once the copies are made. Errors: `KeyError`."""
        return self._slot[layer]

    def held_by(self, slot: int) -> int | None:
        """The layer in `slot`."""
        return self._held[slot]

    def next_copies(self, among: Iterable[int]) -> list[int]:
        """The layers `among` in the order in which they will likely be copied next: first what no slot holds.

        For whoever has to bring them close before; nothing but time is lost where it comes otherwise.
        """
        return sorted(among, key=lambda layer: (layer in self._slot, self._distance(layer)))

    def _fetch_ahead(self) -> list[Copy]:
        copies = []
        absent = [layer for layer in range(self._layers) if layer not in self._slot]
        for layer in sorted(absent, key=self._distance):
            slot = self._latest_needed()
            if slot is None or self._distance_in(slot) <= self._distance(layer):
                break
            copies.append(self._put(layer, slot))
        return copies

    def _put(self, layer: int, slot: int | None) -> Copy:
        assert slot is not None
        before = self._held[slot]
        if before is not None:
            del self._slot[before]
        self._held[slot], self._slot[layer] = layer, slot
        return Copy(layer, slot)

    def _latest_needed(self) -> int | None:
        """The slot whose layer is needed last, of those that nobody reads."""
        reading = self._slot.get(self._reading) if self._reading is not None else None
        free = [slot for slot in range(len(self._held)) if slot != reading]
        return max(free, key=self._distance_in, default=None)

    def _distance_in(self, slot: int) -> int:
        held = self._held[slot]
        return 3 * self._layers if held is None else self._distance(held)

    def _distance(self, layer: int) -> int:
        """Visits until `layer` is next visited."""
        ahead = (layer - self._last) * self._step
        if ahead > 0:
            return ahead
        if not self._turns:
            return ahead + self._layers
        to_the_end = self._layers - 1 - self._last if self._step > 0 else self._last
        back = self._layers - 1 - layer if self._step > 0 else layer
        return to_the_end + back + 1
