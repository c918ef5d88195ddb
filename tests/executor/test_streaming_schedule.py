"""The schedule of copies, held against a model of what happens on a device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from executor.streaming.schedule import Copy, Schedule
from planner.placement import spread_evenly

SIZES = st.tuples(st.integers(2, 9), st.integers(2, 5))


class Device:
    """Slots with contents, and the layer that is being read; refuses what would spoil a read."""

    def __init__(self, layers: int, slots: int) -> None:
        self.schedule = Schedule(layers, slots)
        self.contents: list[int | None] = [None] * slots
        self.reading: int | None = None
        self.copies = 0
        self.take(self.schedule.begin())

    def take(self, copies: Sequence[Copy]) -> None:
        for copy in copies:
            assert self.reading is None or self.contents[copy.slot] != self.reading, "overwritten while read"
            assert copy.layer not in self.contents, "copied though it is there"
            self.contents[copy.slot] = copy.layer
        self.copies += len(copies)

    def visit(self, layer: int, turns: bool) -> None:
        """Reads of the layer before have been given to the device by now."""
        copies = self.schedule.visit(layer, turns)
        own = [copy for copy in copies if copy.layer == layer]
        assert copies[: len(own)] == own, "what is needed first comes first"
        self.reading = None
        self.take(own)
        assert self.contents[self.schedule.slot_of(layer)] == layer
        self.reading = layer
        self.take(copies[len(own) :])
        assert self.contents[self.schedule.slot_of(layer)] == layer
        assert [self.schedule.held_by(slot) for slot in range(len(self.contents))] == self.contents

    def release(self) -> None:
        self.reading = None
        self.take(self.schedule.release())


def fewest_copies(visits: Sequence[int], slots: int) -> int:
    """Copies of Belady's optimal replacement, which knows the whole sequence and fetches nothing ahead."""
    held: set[int] = set()
    copies = 0
    for at, layer in enumerate(visits):
        if layer in held:
            continue
        copies += 1
        if len(held) == slots:
            ahead = {other: _next(visits, at, other) for other in held}
            held.remove(max(ahead, key=ahead.__getitem__))
        held.add(layer)
    return copies


def _next(visits: Sequence[int], at: int, layer: int) -> int:
    return next((i for i in range(at, len(visits)) if visits[i] == layer), len(visits))


@settings(max_examples=60, deadline=None)
@given(SIZES, st.lists(st.tuples(st.integers(0, 8), st.booleans(), st.booleans()), max_size=60))
def test_any_order_finds_its_layers(sizes: tuple[int, int], visits: list[tuple[int, bool, bool]]) -> None:
    """Whatever is visited, in passes of whatever kind, released or not."""
    layers, slots = sizes
    device = Device(layers, slots)
    for layer, turns, releases in visits:
        device.visit(layer % layers, turns)
        if releases:
            device.release()


@settings(max_examples=60, deadline=None)
@given(SIZES, st.booleans())
def test_decoding_copies_each_layer_once_a_round(sizes: tuple[int, int], releases: bool) -> None:
    layers, slots = sizes
    device = Device(layers, slots)
    for number in range(4):
        before = device.copies
        for layer in range(layers):
            held = layer in device.contents
            device.visit(layer, turns=False)
            if releases:
                device.release()
            assert held, "the copy was under way before the layer was asked for"
            if layers > slots:
                assert (layer + 1) % layers in device.contents, "and the next one, round the end too"
        if number:  # the first round found the slots filled
            assert device.copies - before == (layers if layers > slots else 0)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 4), st.booleans())
def test_training_makes_the_fewest_copies(sizes: tuple[int, int], steps: int, again: bool) -> None:
    """Backward may visit a layer twice: once to compute it again, once for its gradients."""
    layers, slots = sizes
    device = Device(layers, slots)
    there, back = list(range(layers)), list(reversed(range(layers)))
    visits = (there + [layer for layer in back for _ in range(1 + again)]) * steps
    missed = 0
    for layer in visits:
        missed += layer not in device.contents
        device.visit(layer, turns=True)
    assert missed == 0, "no layer was waited for"
    assert device.copies == fewest_copies(visits, slots)


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_last_layers_stay_at_the_turn(sizes: tuple[int, int]) -> None:
    layers, slots = sizes
    device = Device(layers, slots)
    for layer in range(layers):
        device.visit(layer, turns=True)
    assert sorted(held for held in device.contents if held is not None) == list(
        range(max(0, layers - slots), layers)
    )


@settings(max_examples=60, deadline=None)
@given(SIZES)
def test_first_layers_come_during_head_and_sampling(sizes: tuple[int, int]) -> None:
    layers, slots = sizes
    device = Device(layers, slots)
    for layer in range(layers):
        device.visit(layer, turns=False)
        device.release()
    assert sorted(held for held in device.contents if held is not None) == list(range(min(layers, slots)))


@pytest.mark.parametrize("sizes", [(0, 2), (3, 1), (1, 0)])
def test_refuses_what_cannot_run(sizes: tuple[int, int]) -> None:
    with pytest.raises(ValueError):
        Schedule(*sizes)


def test_one_layer_needs_one_slot() -> None:
    device = Device(1, 1)
    for _ in range(3):
        device.visit(0, turns=False)
        device.release()
    assert device.copies == 1


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 90), st.integers(1, 80))
def test_residents_are_spread_evenly(count: int, total: int) -> None:
    chosen = sorted(spread_evenly(count, total))
    assert len(chosen) == min(count, total) and all(0 <= layer < total for layer in chosen)
    gaps = [b - a for a, b in itertools.pairwise(chosen)]
    if gaps:
        assert max(gaps) - min(gaps) <= 1


def test_an_overwritten_reader_is_seen() -> None:
    """The model of the device notices what it is there to notice."""
    device = Device(4, 2)
    device.visit(0, turns=False)
    with pytest.raises(AssertionError, match="while read"):
        device.take([Copy(3, device.schedule.slot_of(0))])
