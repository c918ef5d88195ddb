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


LIGER = replace(FROZEN, liger=True)
"""Its norm keeps its input alone."""


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


CHUNKED = replace(FROZEN, seq=1025)
"""Two chunks of 512 tokens."""


def test_a_chunk_of_logits_is_held_as_the_full_loss_holds_all() -> None:
    chunk, hidden = 512 * 1000 * 2, 1025 * 64 * 2
    cost = head_cost(END, CHUNKED, True)
    norm = 2 * hidden + 1025 * 4
    # upcast logits and log-softmax; normed hidden states beside them
    assert cost.forward_peak == pytest.approx(norm + hidden + 4 * chunk, abs=4096)
    # three float32 copies of a chunk; the last chunk's gradient waits in one of the whole
    assert cost.backward_peak == pytest.approx(norm + 2 * hidden + 6 * chunk, abs=8192)
    assert cost.saved == pytest.approx(norm + hidden, abs=4096)
    assert cost.gradients == 0


def test_an_upcast_head_is_cast_for_every_chunk() -> None:
    end, weight = replace(END, vocab=8000), 8000 * 64 * 2
    plain, upcast = (
        head_cost(end, replace(CHUNKED, seq=513, stream=4, upcast=on), True) for on in (False, True)
    )
    assert upcast.backward_peak - plain.backward_peak == weight


def test_one_chunk_is_no_saving() -> None:
    short = [head_cost(END, FROZEN, on).backward_peak for on in (False, True)]
    assert short[1] == pytest.approx(short[0], rel=0.05)
    long = [head_cost(END, replace(FROZEN, seq=8193), on).backward_peak for on in (False, True)]
    assert long[1] < 0.2 * long[0]


def test_more_tokens_or_words_never_cost_less() -> None:
    for fused in (False, True):
        costs = [head_cost(END, replace(FROZEN, seq=seq), fused).backward_peak for seq in (64, 256, 1024)]
        assert costs == sorted(costs)
        wide = [head_cost(replace(END, vocab=v), FROZEN, fused).forward_peak for v in (1000, 32000)]
        assert wide == sorted(wide)
