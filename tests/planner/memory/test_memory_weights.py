"""Loaded weights, worked out by hand."""

from __future__ import annotations

import pytest
from memory_cases import known, llama_layer, tiny
from msgspec.structs import replace

from planner.memory.weights import (
    expert_bytes,
    layer_bytes,
    linear_bytes,
    load_transient_bytes,
    norm_bytes,
    parameter_bytes,
    quantized_linear,
    tower_bytes,
    weight_bytes,
)
from profiles.schema import Experts, Linear, Norm, Parameter, Tower

GIB = 2**30


def test_nf4_is_half_a_byte_and_two_levels_of_scales() -> None:
    n = 4096 * 4096
    packed = 8_388_608  # n / 2
    absmax = 262_144  # one byte per 64 elements
    nested = 4_096  # a float32 per 256 of those: 1024 x 4
    code, nested_code, offset = 512, 1_024, 512  # 16 and 256 float32, one float32, rounded up
    assert quantized_linear(n, 4096, "nf4", 2) == packed + absmax + nested + code + nested_code + offset
    assert 8 * quantized_linear(n, 4096, "nf4", 2) / n == pytest.approx(4.127, abs=0.003)


def test_nf4_of_a_small_matrix_is_mostly_overhead() -> None:
    # 100 elements: 50 -> 512; 2 blocks -> 512; 4 B -> 512; then 512, 1024, 512
    assert quantized_linear(100, 10, "nf4", 2) == 512 + 512 + 512 + 512 + 1024 + 512


def test_int8_is_a_byte_and_a_float32_a_row() -> None:
    assert quantized_linear(1024 * 300, 300, "int8", 2) == 307_200 + 1_536  # 300 x 4 = 1200 -> 1536


@pytest.mark.parametrize(("width", "n"), [(2, 614_400), (4, 1_228_800)])
def test_unquantized_weights_are_elements_times_width(width: int, n: int) -> None:
    assert quantized_linear(1024 * 300, 300, "none", width) == n


def test_biases_are_never_quantized() -> None:
    plain, biased = Linear("q", 1024, 300), Linear("q", 1024, 300, bias=True)
    for quant in ("none", "nf4", "int8"):
        assert linear_bytes(biased, quant, 2) - linear_bytes(plain, quant, 2) == 1024  # 600 -> 1024


def test_norms_and_other_parameters() -> None:
    assert norm_bytes(Norm("n", 300), 2) == 1024  # 600 -> 1024
    assert norm_bytes(Norm("n", 300, "layer", bias=True), 2) == 2048
    assert norm_bytes(Norm("n", 300, weight=False), 2) == 0
    assert parameter_bytes(Parameter("p", (10, 100)), 2) == 2048
    assert parameter_bytes(Parameter("p", (10, 100), float32=True), 2) == 4096


def test_a_llama_layer() -> None:
    # q, o: 64 x 64; k, v: 64 x 32; gate, up, down: 64 x 128; two norms of 64
    linears = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128
    assert layer_bytes(llama_layer(), "none", "none", 2) == 2 * linears + 2 * 512
    assert tiny().kinds[0].norms == llama_layer().norms


class TestQwen25:
    """Qwen2.5-7B: 28 layers of 3584, 512 for k and v, 18944 between; 152064 words; biases on q, k, v."""

    EMBEDDING = 152_064 * 3_584 * 2
    BIASES = 7_168 + 1_024 + 1_024
    NORMS = 2 * 7_168

    def test_bf16(self) -> None:
        linears = 2 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
        w = weight_bytes(known("qwen2.5-7b"), "none", "none", "bf16")
        assert w.layers == (linears + self.BIASES + self.NORMS,)
        assert (w.embeddings, w.head, w.other) == (self.EMBEDDING, self.EMBEDDING, 7_168)
        # every one of the model's 7,615,616,512 parameters in two bytes
        assert w.total((0,) * 28) == 2 * 7_615_616_512

    def test_nf4_leaves_embeddings_head_norms_and_biases(self) -> None:
        small = 2_048  # code books and offset
        # q, o: 12,845,056 elements in 200,704 blocks, 784 nested scales (3,136 B -> 3,584)
        square = 6_422_528 + 200_704 + 3_584 + small
        # k, v: 1,835,008 elements in 28,672 blocks, 112 nested scales (448 B -> 512)
        narrow = 917_504 + 28_672 + 512 + small
        # gate, up, down: 67,895,296 elements in 1,060,864 blocks, 4,144 nested scales (16,576 B -> 16,896)
        wide = 33_947_648 + 1_060_864 + 16_896 + small
        linears = 2 * square + 2 * narrow + 3 * wide
        w = weight_bytes(known("qwen2.5-7b"), "nf4", "none", "bf16")
        assert w.layers == (linears + self.BIASES + self.NORMS,)
        assert (w.embeddings, w.head) == (self.EMBEDDING, self.EMBEDDING)

    def test_more_bits_cost_more(self) -> None:
        sizes = [
            weight_bytes(known("qwen2.5-7b"), quant, "none", dtype).total((0,) * 28)
            for quant, dtype in (("nf4", "bf16"), ("int8", "bf16"), ("none", "bf16"), ("none", "fp32"))
        ]
        assert sizes == sorted(sizes) and sizes[3] == 2 * sizes[2]

    def test_loading_holds_the_largest_matrix_unquantized(self) -> None:
        n = 3584 * 18944 * 2
        bf16 = weight_bytes(known("qwen2.5-7b"), "none", "none", "bf16")
        nf4 = weight_bytes(known("qwen2.5-7b"), "nf4", "none", "bf16")
        assert nf4.largest_unquantized == n
        assert load_transient_bytes(bf16, "none") == 0
        # two float32 copies of one absmax per 64 elements: n / 16 of the two-byte size
        assert load_transient_bytes(nf4, "nf4") == n + n // 16
        assert load_transient_bytes(nf4, "int8") == 2 * n


def test_a_tied_head_is_counted_once() -> None:
    apart, tied = tiny(), tiny(tie_word_embeddings=True)
    one = 1000 * 64 * 2
    assert weight_bytes(apart, "none", "none", "bf16").head == one
    assert weight_bytes(tied, "none", "none", "bf16").head == 0
    assert weight_bytes(tied, "none", "none", "bf16").embeddings == one


EXPERTS = Experts(
    count=8, per_token=2, intermediate=96, fused=True,
    parameters=(Parameter("experts.gate_up_proj", (8, 192, 64)), Parameter("experts.down_proj", (8, 64, 96))),
    router=(Parameter("gate.weight", (8, 64)),),
)  # fmt: skip


def test_fused_experts_stay_unquantized_unless_asked() -> None:
    stacks = 2 * 8 * (192 * 64 + 64 * 96)
    router = 1024
    assert expert_bytes(EXPERTS, "nf4", "none", 2) == stacks + router
    # packed expert by expert, kept side by side: 8 x 6144 bytes, 8 x 192 scales, 8 x 1 second-level scale and
    # 8 offsets, 512 each, and two code books of 512 and 1024; 8 x 3072 and 8 x 96 scales likewise
    up = 8 * 6_144 + 8 * 192 + 512 + 512 + 1_536
    down = 8 * 3_072 + 1_024 + 512 + 512 + 1_536
    assert expert_bytes(EXPERTS, "nf4", "nf4", 2) == up + down + router


def test_separate_experts_are_linears_like_any_other() -> None:
    apart = replace(
        EXPERTS, fused=False, parameters=(), linears=(Linear("w1", 64, 96), Linear("w2", 96, 64)),
        router=(Linear("gate", 64, 8),),
    )  # fmt: skip
    assert expert_bytes(apart, "none", "none", 2) == 8 * 2 * (2 * 64 * 96) + 1024
    one = 3_072 + 512 + 512 + 2_048
    # the router is a linear here: 512 elements, 256 -> 512, 8 blocks -> 512, 4 B -> 512
    assert expert_bytes(apart, "nf4", "none", 2) == 8 * 2 * one + 512 + 512 + 512 + 2_048


def test_loading_assembles_fused_stacks_from_single_experts() -> None:
    arch = tiny(
        model_type="olmoe", hidden_size=2048, intermediate_size=1024, num_experts=64, num_experts_per_tok=8
    )
    w = weight_bytes(arch, "none", "none", "bf16")
    # 64 experts of two 1024 x 2048 matrices, gate and up together
    assert w.largest_fused == 64 * 2 * 1024 * 2048 * 2
    assert load_transient_bytes(w, "none") == 512 * 2**20
    # packed ones are read, assembled and quantized one by one
    assert weight_bytes(arch, "nf4", "nf4", "bf16").largest_fused == 2 * (2 * 1024 * 2048 * 2)


def test_a_tower_is_resident_and_quantized_like_the_rest() -> None:
    tower = Tower(
        "vision", blocks=3, block_linears=(Linear("fc1", 64, 64),),
        block_parameters=(Parameter("norm", (64,)),), linears=(Linear("proj", 64, 128, bias=True),),
        parameters=(Parameter("patch", (64, 3, 4, 4)),),
    )  # fmt: skip
    assert tower_bytes(tower, "none", 2) == 3 * (8_192 + 512) + (16_384 + 512) + 6_144
    nf4 = 2_048 + 512 + 512 + 2_048
    # 64 x 128: 4096 packed, 128 blocks -> 512, one scale -> 512
    assert tower_bytes(tower, "nf4", 2) == 3 * (nf4 + 512) + (4_096 + 512 + 512 + 2_048 + 512) + 6_144


def test_parameters_kept_in_float32_do_not_follow_the_dtype() -> None:
    spec = Parameter("A_log", (1024,), float32=True)
    assert parameter_bytes(spec, 2) == parameter_bytes(spec, 4) == 4096
