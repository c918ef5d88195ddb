"""Optimizer state, worked out by hand."""

from __future__ import annotations

import pytest

from planner.memory.optimizer import OPTIMIZERS, state_bytes

SMALL, MEDIUM, LARGE = 4_095, 50_000, 1_000_000
"""Elements: too few for 8 bits, not enough to be paged, enough."""


def test_adamw_keeps_two_states_in_the_parameters_dtype() -> None:
    # bf16: 100,000 B -> 100,352 each; foreach steps through a list of square roots as large as one state
    found = state_bytes("adamw_torch", [(MEDIUM, 3)], 2)
    assert (found.device, found.managed, found.temporary) == (3 * 2 * 100_352, 0, 3 * 100_352)
    # float32 adapters: 200,000 -> 200,192
    assert state_bytes("adamw_torch", [(MEDIUM, 3)], 4).device == 3 * 2 * 200_192


def test_fused_adamw_needs_no_temporary_and_counts_steps_on_the_card() -> None:
    found = state_bytes("adamw_torch_fused", [(MEDIUM, 3)], 2)
    assert (found.device, found.temporary) == (3 * (2 * 100_352 + 512), 0)


def test_eight_bits_come_with_a_float32_per_256() -> None:
    found = state_bytes("adamw_8bit", [(MEDIUM, 1)], 2)
    # 50,000 -> 50,176; 196 blocks x 4 B = 784 -> 1024
    assert (found.device, found.managed) == (2 * (50_176 + 1_024), 0)


def test_small_tensors_stay_in_32_bits() -> None:
    assert state_bytes("adamw_8bit", [(SMALL, 1)], 2).device == 2 * 16_384  # 16,380 -> 16,384
    assert state_bytes("adamw_8bit", [(SMALL + 1, 1)], 2).device == 2 * (4_096 + 512)


def test_large_tensors_are_paged_their_scales_are_not() -> None:
    found = state_bytes("paged_adamw_8bit", [(LARGE, 2), (MEDIUM, 1)], 4)
    scales = 15_872  # 3,907 blocks x 4 B = 15,628 -> 15,872
    assert found.managed == 2 * 2 * LARGE
    assert found.device == 2 * 2 * scales + 2 * (50_176 + 1_024)


@pytest.mark.parametrize(("size", "paged"), [(99_999, False), (100_000, True)])
def test_paging_starts_at_100000_elements(size: int, paged: bool) -> None:
    assert (state_bytes("paged_adamw_32bit", [(size, 1)], 2).managed > 0) is paged


def test_paged_32_bit_leaves_nothing_of_a_large_tensor_on_the_card() -> None:
    found = state_bytes("paged_adamw_32bit", [(LARGE, 1)], 2)
    assert (found.device, found.managed) == (0, 2 * 4 * LARGE)


def test_embeddings_keep_32_bits_under_8_bit_optimizers() -> None:
    found = state_bytes("adamw_8bit", [], 2, embeddings=(LARGE,))
    assert found.device == 2 * 4_000_256  # 4,000,000 -> 4,000,256
    assert state_bytes("paged_adamw_8bit", [], 2, embeddings=(LARGE,)).managed == 2 * 4 * LARGE


@pytest.mark.parametrize(
    ("name", "states"),
    [("lion_32bit", 1), ("adamw_torch", 2), ("ademamix", 3), ("rmsprop", 1), ("adagrad", 1), ("sgd", 0)],
)
def test_states_by_optimizer(name: str, states: int) -> None:
    # float32 parameters, so that 32-bit and same-dtype states are equally large
    assert state_bytes(name, [(MEDIUM, 1)], 4).device == states * 200_192


def test_lion_has_half_of_adams_state() -> None:
    lion = state_bytes("paged_lion_8bit", [(LARGE, 1), (MEDIUM, 1)], 2)
    adam = state_bytes("paged_adamw_8bit", [(LARGE, 1), (MEDIUM, 1)], 2)
    assert (2 * lion.device, 2 * lion.managed) == (adam.device, adam.managed)


def test_sgd_keeps_nothing() -> None:
    found = state_bytes("sgd", [(LARGE, 5)], 4)
    assert (found.device, found.managed, found.temporary) == (0, 0, 0)


def test_adafactor_keeps_a_row_and_a_column() -> None:
    # a square of 1000 x 1000: two vectors of 1000 float32 (4,000 -> 4,096)
    assert state_bytes("adafactor", [(LARGE, 4)], 2).device == 4 * 2 * 4_096


def test_adafactor_works_on_float32_copies_of_one_parameter() -> None:
    # gradient, value, its square and that plus epsilon; of the one before, its update
    one, some = (state_bytes("adafactor", [(LARGE, count)], 2).temporary for count in (1, 4))
    assert (one, some) == (4 * 4_000_256, 5 * 4_000_256)
    # neither gradient nor value is copied where they are float32
    assert state_bytes("adafactor", [(LARGE, 1)], 4).temporary == 2 * 4_000_256


def test_adagrad_steps_through_two_lists() -> None:
    lists = [state_bytes(name, [(MEDIUM, 3)], 2).temporary for name in ("adamw_torch", "adagrad")]
    assert lists == [3 * 100_352, 2 * 3 * 100_352]


def test_every_name_is_one_of_transformers() -> None:
    from_transformers = pytest.importorskip("transformers.training_args").OptimizerNames
    known = {item.value for item in from_transformers}
    assert {OPTIMIZERS[name].runs_as or name for name in OPTIMIZERS} <= known


def test_states_get_what_the_allocator_does_not_split_off() -> None:
    def unasked(width: int) -> int:
        return 1000 * width

    plain, more = (state_bytes("adamw_torch", [(MEDIUM, 1)], 2, (), f) for f in (lambda _: 0, unasked))
    assert (more.device - plain.device, more.temporary - plain.temporary) == (2 * 2000, 2000)
    assert state_bytes("adamw_8bit", [], 2, (), unasked).device == 2 * 1000
    assert state_bytes("paged_adamw_8bit", [], 2, (), unasked).device == 0
    assert state_bytes("adafactor", [], 2, (), unasked).device == 0


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_grows_with_what_it_trains(name: str) -> None:
    few, many = (state_bytes(name, [(LARGE, count)], 2) for count in (1, 2))
    assert many.device + many.managed >= few.device + few.managed >= 0
    assert (many.managed > 0) is OPTIMIZERS[name].paged


def test_eight_bits_take_less_than_two_bytes_a_state() -> None:
    sizes = [state_bytes(name, [(LARGE, 1)], 4).device for name in ("adamw_8bit", "adamw_torch")]
    assert sizes[0] < 0.3 * sizes[1]
