"""Attention kernels and masks, worked out by hand. T = 256, H = 4, K = 2, E = 16, bf16."""

from __future__ import annotations

import pytest
from memory_cases import known, llama_layer, tiny
from msgspec.structs import replace

from planner.memory.attention import attention, mask_bytes, output_projection, rope, uses_mask
from planner.memory.layer import layer_cost
from planner.memory.shapes import Pass
from planner.memory.tape import Tape, Tensor
from profiles.schema import Attention, Linear

SPEC = llama_layer().attention
U = 256 * 64 * 2
PASS = Pass(batch=1, seq=256, train=True, autocast=True, full=True)


def saved(p: Pass, spec: Attention = SPEC) -> int:
    """Bytes autograd keeps of one mixer beside its input and its output."""
    tape = Tape()
    out = attention(tape, p, Tensor(U, needs_grad=True), spec)
    assert out is not None
    return tape.live - out.bytes


def test_flash_keeps_queries_keys_values_output_and_statistics() -> None:
    assert saved(PASS) == U + U // 2 + U // 2 + U + 256 * 4 * 4


SCORES = 4 * 256 * 256


def test_eager_keeps_the_scores() -> None:
    # q U, repeated k and v U each, softmax in float32 and in 16 bits, the output after it is made contiguous
    assert saved(replace(PASS, attention="eager")) == 3 * U + SCORES * (4 + 2) + U


def test_soft_capped_scores_are_kept_a_second_time() -> None:
    capped = replace(SPEC, softcap=True)
    assert (
        saved(replace(PASS, attention="eager"), capped) - saved(replace(PASS, attention="eager"))
        == 2 * SCORES
    )


def test_masks_bring_repeated_keys_and_a_bias() -> None:
    masked = replace(PASS, masked=True)
    # keys and values of every query head (U each), and the mask as numbers: 256 x 256 x 2 B
    assert saved(masked) == U + U + U + U + 256 * 4 * 4 + 256 * 256 * 2


def test_eager_grows_with_the_square_of_the_length() -> None:
    eager = replace(PASS, attention="eager")
    one, two = (layer_cost(llama_layer(), replace(eager, seq=seq), 64).saved for seq in (2048, 4096))
    assert two > 3.5 * one
    flash = [layer_cost(llama_layer(), replace(PASS, seq=seq), 64).saved for seq in (2048, 4096)]
    assert flash[1] < 2.01 * flash[0]


@pytest.mark.parametrize(
    ("kernel", "window", "seq", "past", "masked", "expected"),
    [
        ("eager", None, 256, 0, False, True),
        ("flash_attention_2", 16, 256, 0, True, False),
        ("sdpa", None, 256, 0, False, False),
        ("sdpa", None, 256, 0, True, True),
        ("sdpa", 512, 256, 0, False, False),  # the window is longer than what there is
        ("sdpa", 256, 256, 0, False, True),
        ("sdpa", 128, 256, 0, False, True),
        ("sdpa", 128, 1, 500, False, False),  # one new token looks at a cache that is cut already
    ],
)
def test_when_a_mask_is_really_there(
    kernel: str, window: int | None, seq: int, past: int, masked: bool, expected: bool
) -> None:
    p = Pass(batch=1, seq=seq, past=past, attention=kernel, masked=masked)
    assert uses_mask(p, replace(SPEC, window=window)) is expected


def test_mask_bytes() -> None:
    p = Pass(batch=2, seq=256, past=0)
    assert mask_bytes(tiny(), p) == 0
    assert mask_bytes(tiny(), replace(p, attention="eager")) == 2 * 256 * 256 * 2
    assert mask_bytes(tiny(), replace(p, attention="eager", width=4)) == 2 * 256 * 256 * 4
    assert mask_bytes(tiny(), replace(p, masked=True)) == 2 * 256 * 256
    assert mask_bytes(tiny(), replace(p, masked=True, past=256)) == 2 * 256 * 512


def test_one_mask_for_each_kind_of_layer() -> None:
    gemma = known("gemma-2-2b")  # full and sliding layers
    p = Pass(batch=1, seq=1024, attention="eager")
    assert mask_bytes(gemma, p) == 2 * 1024 * 1024 * 2
    # under sdpa only the window of 4096 needs one, and only from 4096 tokens on
    assert mask_bytes(gemma, replace(p, attention="sdpa", seq=4095)) == 0
    assert mask_bytes(gemma, replace(p, attention="sdpa", seq=4096)) == 4096 * 4096


def test_rotary_embedding_keeps_nothing_and_needs_three_copies() -> None:
    tape = Tape()
    q, k = tape.new(U, needs_grad=True), tape.new(U // 2, needs_grad=True)
    q, k = rope(tape, PASS, q, k, 16)
    assert (q.bytes, k.bytes, tape.live) == (U, U // 2, U + U // 2)
    # for q: q, k, q cos, rotated q, its product with sin; then their sum
    assert tape.peak == U + U // 2 + U + U + U + 0


def test_liger_rotates_in_place() -> None:
    tape = Tape()
    q, k = tape.new(U), tape.new(U // 2)
    assert rope(tape, replace(PASS, liger=True), q, k, 16) == (q, k)
    assert tape.peak == U + U // 2


def test_a_fused_projection_stays_whole_until_its_last_part_goes() -> None:
    fused = replace(
        SPEC, rope=False,
        linears=(Linear("self_attn.qkv_proj", 64, 128), Linear("self_attn.o_proj", 64, 64)),
    )  # fmt: skip
    # without rotation the kernel keeps the projection itself (2 U), its output and statistics
    assert saved(PASS, fused) == 2 * U + U + 256 * 4 * 4


def test_output_projection_by_name() -> None:
    names = ("q_proj", "o_proj", "gate")
    spec = Attention(kind="full", linears=tuple(Linear(f"self_attn.{name}", 8, 8) for name in names))
    assert output_projection(spec).name == "self_attn.o_proj"


def test_attention_without_mixer() -> None:
    assert attention(Tape(), PASS, Tensor(U), Attention(kind="none")) is None


class TestGatedDelta:
    """Qwen3.5's mixer: 16 heads of 128 for keys and values, chunks of 64 tokens in float32."""

    LAYER = next(layer for layer in known("qwen3.5-0.8b").kinds if layer.attention.kind == "recurrent")

    def cost(self, **changes):
        return layer_cost(self.LAYER, replace(PASS, full=False, **changes), 1024)

    def test_it_works_in_whole_chunks(self) -> None:
        # from 64 to 65 tokens a sequence pays for 64 more; the rest of the chunk then costs little
        sizes = [self.cost(seq=seq).saved for seq in (64, 65, 128)]
        assert sizes[1] > 1.5 * sizes[0] and sizes[2] < 1.25 * sizes[1]

    def test_it_keeps_far_more_than_its_convolved_channels(self) -> None:
        heads, tokens = 16, 256
        one = 4 * tokens * heads * 128  # queries, keys or values of every head in float32
        chunks = 4 * tokens * heads * 64  # pairwise decays, and two systems of the same size
        assert self.cost().saved > 10 * one + 3 * chunks

    def test_one_new_token_needs_little(self) -> None:
        decode = layer_cost(self.LAYER, Pass(batch=1, seq=1, past=500), 1024)
        # the state of 16 heads of 128 x 128, three times
        state = 4 * 16 * 128 * 128
        assert 3 * state < decode.forward_peak < 4 * state
