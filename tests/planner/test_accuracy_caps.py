"""The search for the smallest working cap, on allocators made up for it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.accuracy.caps import GRANULE, NoCapWorks, smallest_cap

ALLOCATED = 8 * 2**30


class FakeAllocator:
    """Needs `need` bytes; remembers what was tried."""

    def __init__(self, need: int) -> None:
        self.need, self.tried = need, []

    def __call__(self, cap: int) -> bool:
        self.tried.append(cap)
        return cap >= self.need


@given(st.floats(1.0, 1.35), st.integers(64 * 2**20, 80 * 2**30), st.floats(0.9, 1.5))
def test_bracket_holds_the_need_within_half_a_percent_wherever_it_begins(factor, allocated, guess):
    allocator = FakeAllocator(int(allocated * factor))
    found = smallest_cap(allocated, int(1.4 * allocated), allocator, int(guess * allocated))
    assert found.failed_bytes < max(allocator.need, allocated + 1) <= found.worked_bytes
    assert found.worked_bytes - found.failed_bytes <= max(2 * GRANULE, 0.005 * allocated + GRANULE)
    assert found.attempts == len(allocator.tried) <= 16
    assert len(set(allocator.tried)) == len(allocator.tried)


def test_a_job_without_fragmentation_takes_one_attempt():
    assert smallest_cap(ALLOCATED, int(1.3 * ALLOCATED), FakeAllocator(ALLOCATED)).attempts == 1


def test_what_a_free_run_reserved_is_no_limit():
    """A capped run may fragment more than a free one."""
    found = smallest_cap(ALLOCATED, ALLOCATED + GRANULE, FakeAllocator(int(1.08 * ALLOCATED)))
    assert found.failed_bytes < 1.08 * ALLOCATED <= found.worked_bytes


def test_a_job_that_never_works_is_an_error():
    allocator = FakeAllocator(100 * ALLOCATED)
    with pytest.raises(NoCapWorks, match="still out of memory"):
        smallest_cap(ALLOCATED, int(1.2 * ALLOCATED), allocator)
    assert len(allocator.tried) <= 16


def test_only_observed_pairs_are_reported():
    """An allocator that is not monotone: both ends of the bracket were really seen."""
    seen = {}

    def moody(cap: int) -> bool:
        seen[cap] = cap >= 1.1 * ALLOCATED or 1.03 * ALLOCATED <= cap <= 1.045 * ALLOCATED
        return seen[cap]

    found = smallest_cap(ALLOCATED, int(1.3 * ALLOCATED), moody)
    assert seen[found.worked_bytes] and seen.get(found.failed_bytes, found.failed_bytes == ALLOCATED) is False
