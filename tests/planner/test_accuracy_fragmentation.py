"""The replay of torch's allocator: hand-worked cases, and what must hold for any sequence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.accuracy.caching_allocator import CachingAllocator, OutOfMemory, replay, smallest_cap
from planner.units import MIB

SIZES = st.integers(1, 300 * MIB)


@st.composite
def events(draw):
    """Requests, some of them freed again later, in a random order."""
    sequence, alive = [], []
    for number in range(draw(st.integers(1, 40))):
        if alive and draw(st.booleans()):
            sequence.append((alive.pop(draw(st.integers(0, len(alive) - 1))), 0))
        sequence.append((number, draw(SIZES)))
        alive.append(number)
    return sequence


def test_segments_are_as_large_as_torch_makes_them():
    for asked, reserved in ((1, 2), (MIB, 2), (MIB + 1, 20), (9 * MIB, 20), (10 * MIB, 10), (11 * MIB, 12)):
        allocator = CachingAllocator()
        allocator.request(asked)
        assert allocator.reserved == reserved * MIB, asked


def test_a_small_lasting_block_in_a_large_hole_costs_the_hole():
    """How a workspace that is made during backward makes logits need a second place."""
    step = [("logits", 600 * MIB), ("gradient", 600 * MIB), ("logits", 0), ("workspace", 32 * MIB)]
    again = [("gradient", 0), ("more logits", 600 * MIB), ("more gradient", 600 * MIB)]
    found = replay(step + again)
    assert found.allocated_peak == 1232 * MIB
    assert found.reserved_peak == 1800 * MIB == smallest_cap(step + again)


def test_rests_are_split_off_from_a_megabyte_on():
    allocator = CachingAllocator()
    block = allocator.request(40 * MIB)
    allocator.give(block)
    assert allocator.request(39 * MIB).size == 40 * MIB, "1 MiB is not split off"
    allocator.give(block)
    assert allocator.request(38 * MIB).size == 38 * MIB


@given(events())
def test_bytes_add_up_and_a_cap_below_the_need_fails(sequence):
    found = replay(sequence)
    assert found.allocated <= found.allocated_peak <= found.reserved_peak
    cap = smallest_cap(sequence)
    assert found.allocated_peak <= cap <= found.reserved_peak
    assert replay(sequence, cap).reserved_peak <= cap
    with pytest.raises(OutOfMemory):
        replay(sequence, found.allocated_peak - 4 * MIB)


@given(events())
def test_everything_goes_back_when_nothing_is_left(sequence):
    alive = {name for name, _ in sequence} - {name for name, n in sequence if n == 0}
    found = replay([*sequence, *((name, 0) for name in alive)])
    found.empty_cache()
    assert found.allocated == found.reserved == 0


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_replayed_run_allocates_what_the_estimate_says(method, checkpointing):
    from benchmarks.accuracy.fragmentation import WORKSPACE, Run
    from planner.estimate import architecture_of
    from planner.memory.train import training_memory
    from planner.types import Strategy, Workload
    from profiles.catalogue import load_model

    arch = architecture_of(load_model("qwen2.5-0.5b"))
    work = Workload(task="train", method=method, seq_len=1024, lora_dropout=0.0)
    how = Strategy(gradient_checkpointing=checkpointing, optimizer="adamw_torch_fused")
    run, memory = Run(arch, work, how), training_memory(arch, work, how, WORKSPACE)
    base = memory.load_bytes + WORKSPACE
    found = replay(run.first + run.step, base=base)
    # a block of which 1 MiB or less is left is not split: the replay counts the rest, the estimate does not
    assert found.allocated_peak == pytest.approx(memory.peak.bytes, rel=0.05)
    lasting = replay(run.first, base=base).allocated
    assert found.allocated == pytest.approx(lasting, rel=0.001), "a step leaves nothing behind"
