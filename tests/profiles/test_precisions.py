"""Precisions: bytes computed by hand, and by the layout of a weight that bitsandbytes makes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiles.precisions import load_precisions, weight_bytes, weight_bytes_per_parameter

PRECISIONS = load_precisions()
SIDES = st.integers(1, 20_000)


# bits / 8, + one scale a block, + one second-level scale a group of scales
BITS = {
    "fp32": 32,
    "bf16": 16,
    "fp16": 16,
    "nf4": 4 + 8 / 64 + 32 / (64 * 256),  # 4.127
    "nf4-single": 4 + 32 / 64,  # 4.5
    "fp4": 4 + 8 / 64 + 32 / (64 * 256),
    "fp4-single": 4.5,
    "int8": 8 + 32 / 4096,  # one scale a row of 4096
    "fp8": 8 + 32 / (128 * 128),
    "mxfp4": 4 + 8 / 32,  # 4.25
    "gptq-int4": 4 + (16 + 4) / 128,
    "awq-int4": 4 + (16 + 4) / 128,
}


def test_every_precision_has_a_hand_computed_value():
    assert set(BITS) == set(PRECISIONS)


@pytest.mark.parametrize("name", BITS)
def test_bits_per_parameter(name: str):
    assert 8 * weight_bytes_per_parameter(PRECISIONS[name], 4096) == pytest.approx(BITS[name], rel=1e-12)
    assert weight_bytes(PRECISIONS[name], 4096, 4096) * 8 == pytest.approx(
        BITS[name] * 4096 * 4096, rel=1e-12
    )


def test_nf4_with_double_quantization_by_hand():
    # 11008 x 4096: 22 544 384 B packed, 704 512 one-byte scales, 2752 fp32 scales of scales.
    assert weight_bytes(PRECISIONS["nf4"], 11008, 4096) == 22_544_384 + 704_512 + 2752 * 4


def test_last_block_is_rounded_up():
    assert weight_bytes(PRECISIONS["nf4"], 1, 65) == 33 + 2 + 4
    assert weight_bytes(PRECISIONS["nf4-single"], 1, 1) == 1 + 4
    assert weight_bytes(PRECISIONS["int8"], 3, 5) == 15 + 3 * 4


def test_row_scales_without_a_row_length_count_nothing():
    assert weight_bytes_per_parameter(PRECISIONS["int8"]) == 1.0


@given(st.sampled_from(sorted(PRECISIONS)), SIDES, SIDES)
def test_exact_bytes_never_fall_below_the_share_per_parameter(name: str, rows: int, columns: int):
    exact = weight_bytes(PRECISIONS[name], rows, columns)
    share = weight_bytes_per_parameter(PRECISIONS[name], columns) * rows * columns
    assert share * (1 - 1e-12) <= exact <= share + 16


@given(SIDES, SIDES)
def test_more_bits_never_need_less(rows: int, columns: int):
    sizes = [weight_bytes(PRECISIONS[name], rows, columns) for name in ("nf4", "nf4-single", "bf16", "fp32")]
    # a single block of 64 has nothing to share a nested scale with
    assert rows * columns <= 64 or sizes == sorted(sizes)


def test_what_trains():
    trains = {name: precision.trains for name, precision in PRECISIONS.items()}
    assert trains["bf16"] == trains["fp32"] == ("full", "lora")
    assert trains["nf4"] == ("qlora",)
    assert trains["int8"] == ("lora",), "full training needs weights that gradients can be added to"
    assert trains["mxfp4"] == trains["fp8"] == ()


def test_quantized_weights_leave_head_and_embeddings_alone():
    for precision in PRECISIONS.values():
        assert (precision.bits >= 16) == (not precision.skips)
        if precision.skips:
            assert {"lm_head", "embeddings"} <= set(precision.skips)
    assert "fused_experts" in PRECISIONS["nf4"].skips


@pytest.mark.executor
def test_bitsandbytes_packs_nf4_as_counted():
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(96, 128)
    for name, double in (("nf4", True), ("nf4-single", False)):
        packed, state = functional.quantize_nf4(weight, compress_statistics=double)
        tensors = [packed, state.absmax] + ([state.state2.absmax] if double else [])
        held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        assert held == weight_bytes(PRECISIONS[name], 96, 128)
