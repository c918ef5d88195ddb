"""The end of a model, worked out by hand. T = 256, D = 64, V = 1000, bf16.

U stands for one hidden state, L for the logits in bf16 (512,000 B, a multiple of 512).
"""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from planner.memory.head import Ending, fused_chunk_rows, head_cost
from planner.memory.shapes import Pass
from profiles.schema import Norm

U = 256 * 64 * 2
L = 256 * 1000 * 2
NORM = 2 * U + 256 * 4
"""What the final norm keeps: its float32 input and one float32 a row."""
LOSS = 512

END = Ending(hidden=64, vocab=1000, norm=Norm("norm", 64), softcap=False, scale=False)
FROZEN = Pass(batch=1, seq=256, train=True, autocast=True)
LIGER = replace(FROZEN, liger=True)
"""Its norm keeps its input alone."""


def test_forward_holds_logits_upcast_softmax_and_the_returned_copy() -> None:
    cost = head_cost(END, FROZEN, False)
    # logits L, log-softmax 2 L, float32 logits handed back 2 L, the normed hidden state
    assert cost.forward_peak == NORM + U + LOSS + 5 * L
    assert cost.saved == NORM + LOSS + 2 * L


def test_backward_holds_three_float32_copies() -> None:
    # log-softmax, its gradient, and the gradient of the logits
    assert head_cost(END, FROZEN, False).backward_peak == NORM + LOSS + 3 * 2 * L


def test_soft_capping_makes_it_three_and_a_half() -> None:
    # tanh keeps its bf16 output
    assert head_cost(replace(END, softcap=True), FROZEN, False).backward_peak == NORM + LOSS + 7 * L


def test_without_autocast_nothing_is_handed_back_in_float32() -> None:
    cost = head_cost(END, replace(FROZEN, autocast=False), False)
    assert cost.forward_peak == NORM + U + max(5 * L, 3 * L + LOSS)  # logits, upcast, log-softmax


def test_scaled_logits_are_a_copy() -> None:
    plain, scaled = (head_cost(replace(END, scale=on), FROZEN, False) for on in (False, True))
    assert scaled.forward_peak == plain.forward_peak  # the unscaled ones are gone before the peak
    assert scaled.saved == plain.saved


def test_training_the_head_keeps_its_input_and_leaves_a_gradient() -> None:
    cost = head_cost(END, replace(FROZEN, full=True), False)
    # the norm also keeps its scaled input in bf16; the head keeps the normed hidden state
    assert cost.saved == NORM + U + U + LOSS + 2 * L
    assert cost.gradients == 1000 * 64 * 2 + 512  # the head's, and the norm's 64 x 2 B
    assert head_cost(END, FROZEN, False).gradients == 0


def test_an_upcast_head_is_cast_back_for_its_product() -> None:
    cost = head_cost(END, replace(FROZEN, stream=4, upcast=True), False)
    weight = 1000 * 64 * 2
    # hidden states are float32 here (2 U): no copy in the norm, whose input stays
    assert cost.saved == 2 * U + 256 * 4 + weight + LOSS + 2 * L


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "hidden", "rows"),
    [
        (2048, 152_064, 3_584, 64),  # 152064 / 3584 -> 43; 2048 / 43 -> 48 -> 64
        (2048, 32_000, 4_096, 256),  # 8; 256
        (100, 1_000, 4_096, 100),  # one chunk, never more rows than there are
        (1, 152_064, 3_584, 1),
    ],
)
def test_rows_of_a_fused_chunk(tokens: int, vocabulary: int, hidden: int, rows: int) -> None:
    assert fused_chunk_rows(tokens, vocabulary, hidden) == rows


def test_liger_holds_one_chunk_of_logits_in_the_compute_dtype() -> None:
    # 4000 / 64 -> 63 chunks; 256 / 63 -> 5 -> 8 rows of 4000 x 2 B
    cost = head_cost(replace(END, vocab=4000), LIGER, True)
    assert cost.forward_peak == 2 * U + U + 64_000  # normed input, gradient of the input
    assert cost.saved == U + U + LOSS


def test_liger_hands_on_the_gradient_of_a_trained_head_as_it_is() -> None:
    end, weight = replace(END, vocab=4000), 4000 * 64 * 2
    frozen, full = (head_cost(end, replace(LIGER, full=on), True) for on in (False, True))
    assert full.saved - frozen.saved == weight
    assert full.gradients - frozen.gradients == weight + 512  # and the norm's
    assert full.backward_peak - frozen.backward_peak < 1.01 * weight


def test_fused_loss_holds_one_block_for_a_chunk_of_tokens() -> None:
    # blocks of 64 MiB / 8 KiB = 8192 words, for 2 ** 23 / 8192 = 1024 of the 2048 tokens: 2 ** 23 logits
    end, tokens, part = replace(END, hidden=4096, vocab=128_256, norm=None), 2048, 2**23
    cost = head_cost(end, replace(FROZEN, seq=tokens), True)
    states = tokens * 4096 * 2
    # in float32 twice: as they are, and what logsumexp makes of them
    assert cost.forward_peak == states + 4 * tokens + 8 * part
    assert cost.saved == states + 4 * tokens + LOSS
    # beside the states and their gradient in float32: logits in float32 and bf16, a chunk's share in bf16
    assert cost.backward_peak == 3 * states + 4 * tokens + 2 * LOSS + 6 * part + 1024 * 4096 * 2


def test_a_trained_head_has_its_gradient_once_and_a_block_in_float32() -> None:
    frozen, full = (head_cost(END, replace(FROZEN, full=on), True) for on in (False, True))
    assert 0 <= full.gradients - frozen.gradients - 1000 * 64 * 2 <= LOSS
    assert full.backward_peak > frozen.backward_peak + 1000 * 64 * 2


def test_fused_loss_needs_far_less_than_full_logits() -> None:
    full, fused = (head_cost(END, p, on) for p, on in ((FROZEN, False), (LIGER, True)))
    assert fused.forward_peak < 0.2 * full.forward_peak
    assert fused.backward_peak < 0.2 * full.backward_peak


def test_more_tokens_or_words_never_cost_less() -> None:
    for fused in (False, True):
        costs = [head_cost(END, replace(FROZEN, seq=seq), fused).backward_peak for seq in (64, 256, 1024)]
        assert costs == sorted(costs)
        wide = [head_cost(replace(END, vocab=v), FROZEN, fused).forward_peak for v in (1000, 32000)]
        assert wide == sorted(wide)
