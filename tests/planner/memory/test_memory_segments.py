"""Blocks that the allocator does not split, by hand, and what quantizing leaves over in them."""

from __future__ import annotations

import pytest
from memory_cases import known, tiny

from planner.memory.loading import unasked_bytes
from planner.memory.segments import Segments, lasting_unasked
from planner.memory.weights import weight_bytes
from planner.units import MIB


def test_small_requests_are_exact() -> None:
    segments = Segments()
    assert segments.request(MIB) is None
    assert segments.unasked == 0


def test_a_rest_of_one_mib_goes_along_and_more_is_split_off() -> None:
    assert lasting_unasked([19 * MIB // 2] * 2) == MIB
    assert lasting_unasked([9 * MIB] * 2) == 0  # 2 MiB are left
    assert lasting_unasked([int(11.5 * MIB)]) == MIB // 2  # a segment of its own, in steps of 2 MiB
    assert lasting_unasked([int(12.5 * MIB)]) == 0


def test_a_freed_block_joins_its_neighbours_and_is_used_again() -> None:
    segments = Segments()
    first, second = segments.request(8 * MIB), segments.request(8 * MIB)
    segments.give(first, 8 * MIB)
    segments.give(second, 8 * MIB)
    # 20 MiB in one piece again
    assert segments.request(int(19.5 * MIB)) is not None
    assert segments.unasked == MIB // 2


def test_long_lists_go_on_as_they_began() -> None:
    one = lasting_unasked([19 * MIB // 2] * 200)
    assert one == 100 * MIB


def test_what_is_not_quantized_leaves_nothing_over() -> None:
    assert unasked_bytes(known("qwen2.5-7b"), "none", 2) == 0
    assert unasked_bytes(tiny(), "nf4", 2) == 0


@pytest.mark.parametrize(
    ("model", "quant", "measured"),
    [
        ("qwen2.5-1.5b", "nf4", 1_153_424_384),
        ("qwen3-4b", "nf4", 2_678_487_040),
        ("minicpm3-4b", "nf4", 2_402_990_592),
        ("ernie-4.5-0.3b-pt", "int8", 486_342_656),
    ],
)
def test_loads_of_an_h200(model: str, quant: str, measured: int) -> None:
    # benchmarks/accuracy/results.jsonl; without what is left over they are 0.9 to 3.9 % under
    arch = known(model)
    assert weight_bytes(arch, quant, "none", "bf16").total(arch.order) == pytest.approx(measured, rel=0.004)
