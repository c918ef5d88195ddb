"""The allocator that runs are played on: hand-worked cases, and what must hold for any sequence."""

from __future__ import annotations

from itertools import count, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.memory.allocator import AT_ONCE, NOWHERE, Allocator, address_of, size_of
from planner.units import MIB

SIZES = st.integers(1, 300 * MIB)


@st.composite
def events(draw: st.DrawFn) -> list[tuple[int, int]]:
    """Requests, some of them freed again later, in a random order."""
    sequence, alive, number = [], [], count()
    for _ in range(draw(st.integers(1, 40))):
        if alive and draw(st.booleans()):
            sequence.append((alive.pop(draw(st.integers(0, len(alive) - 1))), 0))
        place = next(number)
        sequence.append((place, 512 * (1 + draw(SIZES) // 512)))
        alive.append(place)
    return sequence


def played(sequence: list[tuple[int, int]], thrifty: bool = False) -> tuple[Allocator, list[int]]:
    allocator, places = Allocator(), [NOWHERE] * (1 + max(place for place, _ in sequence))
    allocator.thrifty = thrifty
    allocator.play([(place, n) for place, n in sequence if not 0 < n <= MIB], places)
    return allocator, places


def test_segments_are_as_large_as_torch_makes_them() -> None:
    for asked, reserved in ((MIB + 512, 20), (9 * MIB, 20), (10 * MIB, 10), (11 * MIB, 12)):
        allocator = Allocator()
        allocator.request(asked)
        assert allocator.reserved == reserved * MIB, asked


def test_small_requests_are_not_followed() -> None:
    allocator = Allocator()
    assert allocator.request(MIB) == NOWHERE
    allocator.give(NOWHERE)
    assert allocator.reserved == allocator.allocated == 0


def test_a_small_lasting_block_in_a_large_hole_costs_the_hole() -> None:
    """How a workspace that is made during backward makes logits need a second place."""
    allocator = Allocator()
    logits = allocator.request(600 * MIB)
    allocator.give(logits)
    allocator.request(32 * MIB)
    allocator.empty_cache()
    assert allocator.reserved == 600 * MIB and allocator.holes() == [568 * MIB]
    allocator.request(600 * MIB)
    assert (allocator.reserved_peak, allocator.allocated_peak) == (1200 * MIB, 632 * MIB)


def test_rests_are_split_off_from_a_megabyte_on() -> None:
    allocator = Allocator()
    block = allocator.request(40 * MIB)
    allocator.give(block)
    again = allocator.request(39 * MIB)
    assert size_of(again) == 40 * MIB, "1 MiB is not split off"
    allocator.give(again)
    assert size_of(allocator.request(38 * MIB)) == 38 * MIB


def test_of_free_blocks_of_one_size_the_lowest_is_taken() -> None:
    allocator = Allocator()
    low, high = allocator.request(32 * MIB), allocator.request(32 * MIB)
    for block in (high, low):
        allocator.give(block)
    assert allocator.request(32 * MIB) == low < high


def test_a_hole_is_used_and_never_goes_back() -> None:
    allocator = Allocator()
    allocator.hole(64 * MIB)
    allocator.give(allocator.request(64 * MIB))
    allocator.empty_cache()
    assert allocator.reserved == allocator.reserved_peak == 64 * MIB


def test_what_is_wholly_free_goes_back_before_a_thrifty_one_takes_more() -> None:
    for thrifty, peak in ((False, 96), (True, 64)):
        allocator = Allocator()
        allocator.thrifty = thrifty
        allocator.give(allocator.request(32 * MIB))
        allocator.request(64 * MIB)
        assert allocator.reserved_peak == peak * MIB


@given(events(), st.booleans())
def test_bytes_add_up(sequence: list[tuple[int, int]], thrifty: bool) -> None:
    found, places = played(sequence, thrifty)
    assert found.allocated <= found.allocated_peak <= found.reserved_peak
    assert found.allocated + sum(found.holes()) <= found.reserved
    for block in places:
        found.give(block)
    found.empty_cache()
    assert found.allocated == found.reserved == 0 and found.state == ()


@given(events())
def test_neighbours_never_overlap(sequence: list[tuple[int, int]]) -> None:
    _, places = played(sequence)
    blocks = [block for block in places if block != NOWHERE]
    stretches = sorted((address_of(block), address_of(block) + size_of(block)) for block in blocks)
    assert all(before[1] <= after[0] for before, after in pairwise(stretches))


@pytest.mark.parametrize("n", [0, 1, 512, MIB])
def test_nothing_small_becomes_a_hole(n: int) -> None:
    allocator = Allocator()
    allocator.hole(n)
    assert allocator.reserved == 0


def test_of_blocks_of_one_size_the_lowest_is_taken_wherever_the_segments_lie():
    for downwards, first in ((False, 0), (True, 1)):
        allocator = Allocator(downwards=downwards)
        blocks = [allocator.request(64 * MIB) for _ in range(2)]
        for block in blocks:
            allocator.give(block)
        assert allocator.request(64 * MIB) == blocks[first]


@given(events())
def test_a_thrifty_run_goes_another_way_only_where_segments_were_wasted(
    sequence: list[tuple[int, int]],
) -> None:
    free, tight = played(sequence)[0], played(sequence, thrifty=True)[0]
    if not free.wasteful:
        assert free.state == tight.state and free.reserved_peak == tight.reserved_peak


@given(events(), SIZES, st.booleans())
def test_a_block_freed_at_once_is_a_request_and_a_free(
    sequence: list[tuple[int, int]], size: int, thrifty: bool
) -> None:
    n = 512 * (1 + (MIB + size) // 512)
    (one, places), (two, _) = played(sequence, thrifty), played(sequence, thrifty)
    one.give(one.request(n))
    two.play([(AT_ONCE, n)], places)
    for name in ("state", "allocated", "reserved", "allocated_peak", "reserved_peak"):
        assert getattr(one, name) == getattr(two, name), name
