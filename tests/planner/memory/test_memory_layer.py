"""One decoder layer on the tape against the same layer on paper.

T = 256 tokens, D = 64, F = 128, H = 4, K = 2, E = 16, bf16. U stands for one hidden state: T x D x 2 B.
Then q is U, k and v are U/2, gate, up and their product 2 U, a hidden state in float32 2 U.
"""

from __future__ import annotations

import pytest
from memory_cases import known, llama_layer, tiny
from msgspec.structs import replace

from planner.memory.forward import linear, norm, outlier_share, packed_rows
from planner.memory.kvcache import filled_bytes
from planner.memory.layer import layer_cost, layer_tensors
from planner.memory.shapes import Pass
from planner.memory.tape import Tape, Tensor
from profiles.schema import Linear, Norm

U = 256 * 64 * 2
ROW = 256 * 4
"""One float32 a token: the inverse root mean square of a norm."""
STATISTICS = 256 * 4 * 4
"""One float32 a token and head: what flash attention keeps of its softmax."""

FROZEN = Pass(batch=1, seq=256, train=True, autocast=True, dropout=0.0)
FULL = replace(FROZEN, full=True)


def test_forward_without_recording() -> None:
    cost = layer_cost(llama_layer(), FULL, 64)
    # in the feed-forward: residual U, its input U, silu(gate) 2 U, up 2 U and their product 2 U
    assert cost.forward_peak == 8 * U
    assert (cost.output, cost.leaked) == (U, 0)


SAVED_BY_NORM = 2 * U + ROW + U + U
"""float32 input, inverse, normed input, and the output, which the linears after it keep."""
SAVED = (
    SAVED_BY_NORM
    + (U + U // 2 + U // 2 + STATISTICS + U)  # rotated q and k, v, statistics, output of attention
    + SAVED_BY_NORM
    + 4 * 2 * U  # gate, silu(gate), up, product
)


def test_what_full_fine_tuning_saves() -> None:
    assert SAVED == 19 * U + 2 * ROW + STATISTICS
    assert layer_cost(llama_layer(), FULL, 64).saved == SAVED


def test_recording_peaks_when_the_residual_is_added() -> None:
    # everything saved, and three hidden states: the residual, the mixer's output and their sum
    assert layer_cost(llama_layer(), FULL, 64).record_peak == SAVED + 3 * U


BACKWARD = SAVED + U + U // 2 - 2 * U + 2 * U + 4 * U
"""Backward peaks at gate x up: the output's gradient U; that of down_proj's weight (128 x 64 x 2 B = U/2);
its input is freed (2 U); the product's gradient (2 U) becomes those of both factors (4 U)."""


def test_backward_peak() -> None:
    assert layer_cost(llama_layer(), FULL, 64).backward_peak == BACKWARD


def test_checkpointing_pays_the_same_peak_from_input_and_output_gradient_alone() -> None:
    cost = layer_cost(llama_layer(), FULL, 64)
    # while recomputing: the output's gradient U, all that is saved, residual U, up to down_proj's input
    assert cost.recompute_peak == max(BACKWARD, U + SAVED + U)


def test_gradients_left_behind() -> None:
    linears = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert layer_cost(llama_layer(), FULL, 64).gradients == linears + 2 * 512
    sizes = sorted([4096, 4096, 2048, 2048, 8192, 8192, 8192, 64, 64])
    assert sorted(layer_tensors(llama_layer())) == sizes


def test_a_frozen_layer_saves_less() -> None:
    # no weight wants a gradient: neither the normed inputs nor the linears' inputs are kept, save those of
    # silu, product and attention
    saved = 2 * (2 * U + ROW) + (3 * U + STATISTICS) + 3 * 2 * U
    cost = layer_cost(llama_layer(), FROZEN, 64)
    assert (cost.saved, cost.gradients) == (saved, 0)


def test_nothing_is_kept_before_the_first_trained_tensor() -> None:
    cost = layer_cost(llama_layer(), FROZEN, 64, True)
    assert cost.saved == 0


def test_inference_leaves_the_cache_to_its_own_line() -> None:
    p = Pass(batch=1, seq=256, cache="dynamic")
    cost = layer_cost(llama_layer(), p, 64)
    # copies of k and v go to the cache and stay: U more in the feed-forward than while training
    assert cost.forward_peak == 9 * U
    assert (cost.saved, cost.backward_peak, cost.recompute_peak, cost.gradients) == (0, 0, 0, 0)
    elsewhere = layer_cost(llama_layer(), Pass(batch=1, seq=256, cache="static"), 64)
    assert elsewhere.forward_peak == 8 * U  # written in place


def test_packing_needs_three_float32_copies_of_the_keys() -> None:
    layer = llama_layer()
    kept = filled_bytes(layer.attention, 1, 65536, 2, "quantized")
    cost, whole = (
        layer_cost(layer, Pass(batch=1, seq=65536, cache=kind), 64) for kind in ("quantized", "dynamic")
    )
    keys = 65536 * layer.attention.kv_heads * layer.attention.head_dim * 2
    assert kept < keys
    assert whole.forward_peak - 2 * keys < cost.forward_peak


class TestLora:
    """A linear of 64 x 32, r = 8, float32 adapters under bf16 autocast."""

    SPEC = Linear("mlp.up_proj", 64, 32)
    X, OUT = 256 * 64 * 2, 256 * 32 * 2
    LOW = 256 * 8 * 2
    COPIES = 64 * 8 * 2 + 32 * 8 * 2
    MASK = 256 * 64

    def run(self, p: Pass) -> tuple[Tape, Tensor]:
        tape = Tape()
        out = linear(tape, p, Tensor(self.X, needs_grad=True), self.SPEC)
        return tape, out

    def test_saved(self) -> None:
        tape, _ = self.run(replace(FROZEN, adapters=True))
        # beside the output: the input cast to 16 bits again, x A, and 16-bit copies of A and B
        assert tape.live == self.OUT + self.X + self.LOW + self.COPIES

    def test_dropout_keeps_a_byte_an_element(self) -> None:
        tape, _ = self.run(replace(FROZEN, adapters=True, dropout=0.05))
        assert tape.live == self.OUT + self.X + self.LOW + self.COPIES + self.MASK

    def test_peak_holds_a_float32_copy_of_the_input(self) -> None:
        tape, _ = self.run(replace(FROZEN, adapters=True))
        # base output, float32 input, its 16-bit copy, x A, then B's product, scaled
        assert tape.peak == self.OUT + 2 * self.X + self.X + self.LOW + self.COPIES + 2 * self.OUT

    def test_adapters_in_the_compute_dtype_need_no_copies(self) -> None:
        tape, _ = self.run(replace(FROZEN, adapters=True, adapter_width=2))
        assert tape.live == self.OUT + self.LOW  # the input itself is kept, which its maker counts

    def test_attention_only_leaves_the_feed_forward_alone(self) -> None:
        tape, _ = self.run(replace(FROZEN, adapters=True, attention_only=True))
        assert tape.live == self.OUT

    def test_gradients_are_those_of_a_and_b(self) -> None:
        tape, out = self.run(replace(FROZEN, adapters=True))
        out.grad = tape.new(self.OUT)
        tape.free(out)
        tape.leave_autocast()
        x_gradient = self.X
        tape.backward(out)
        assert tape.live == x_gradient + 4 * (64 * 8 + 32 * 8)

    def test_dora_needs_more(self) -> None:
        plain, _ = self.run(replace(FROZEN, adapters=True))
        dora, _ = self.run(replace(FROZEN, adapters=True, dora=True))
        assert dora.peak > plain.peak and dora.live > plain.live


class TestQuantizedLinear:
    SPEC = Linear("mlp.up_proj", 64, 32)
    WEIGHT = 64 * 32 * 2

    @pytest.mark.parametrize(("tokens", "workspace"), [(1, 0), (32, 0), (33, WEIGHT)])
    def test_nf4_is_dequantized_for_many_tokens(self, tokens: int, workspace: int) -> None:
        tape = Tape()
        out = linear(tape, Pass(batch=1, seq=tokens, quant="nf4"), Tensor(0), self.SPEC)
        assert tape.peak == out.bytes + workspace

    @pytest.mark.parametrize(
        ("inputs", "outputs", "rows"),
        [(8192, 28672, 64), (28672, 8192, 16), (4096, 4096, 7), (256, 8192, 320)],
    )
    def test_rows_of_the_packed_kernel_follow_the_shape(self, inputs: int, outputs: int, rows: int) -> None:
        """Cases of bitsandbytes' own rule for the H100, by hand."""
        assert packed_rows(inputs, outputs) == rows
        assert packed_rows(inputs, outputs, width=4) == 7

    def test_nf4_backward_dequantizes_the_weight(self) -> None:
        tape = Tape()
        x = Tensor(U, needs_grad=True)
        out = linear(tape, replace(FROZEN, quant="nf4"), x, self.SPEC)
        out.grad = tape.new(out.bytes)
        tape.free(out)
        tape.mark()
        tape.backward(out)
        assert tape.peak == out.bytes + U + self.WEIGHT

    def test_int8_without_outliers(self) -> None:
        tape = Tape()
        x = Tensor(U)
        out = linear(tape, Pass(batch=1, seq=256, quant="int8"), x, self.SPEC)
        rows = 256 * 64
        # fp16 copy (2 B), its int8 rows (1 B), |x| and the mask of outliers (3 B) an element
        assert tape.peak == 6 * rows
        assert tape.live == out.bytes == 256 * 32 * 2

    def test_int8_keeps_its_input_through_checkpointing(self) -> None:
        tape = Tape(recording=False)
        x = Tensor(U, needs_grad=True)
        out = linear(tape, replace(FROZEN, quant="int8"), x, self.SPEC)
        assert tape.live == out.bytes and x in tape.pinned
        # q, k, v, gate and up read two inputs, o and down one each: U + U + U + 2 U
        assert layer_cost(llama_layer(), replace(FROZEN, quant="int8"), 64).leaked == 5 * U

    def test_share_of_outlier_columns(self) -> None:
        # in a wide model nearly every column of the product reaches 6.0 somewhere in 2048 rows
        assert outlier_share(3584, 2048) == pytest.approx(0.98, abs=0.01)
        assert outlier_share(64, 2048) < 1e-6
        shares = [outlier_share(2048, tokens) for tokens in (1, 64, 512, 4096)]
        assert shares == sorted(shares) and 0 <= shares[0] < shares[-1] <= 1

    def test_outliers_take_memory(self) -> None:
        p = Pass(batch=1, seq=256, quant="int8")
        peaks = []
        for share in (0.0, 0.5, 1.0):
            tape = Tape()
            linear(tape, p, Tensor(U), Linear("mlp.down_proj", 64, 4096), share)
            peaks.append(tape.peak)
        assert peaks[0] < peaks[1] < peaks[2]


class TestNorms:
    N = 256 * 64

    def peak(self, p: Pass, spec: Norm) -> tuple[int, int]:
        tape = Tape()
        x = Tensor(2 * self.N, needs_grad=True)
        out = norm(tape, p, x, spec, 256)
        return tape.peak, tape.live - out.bytes

    def test_rms_norm_works_in_float32(self) -> None:
        peak, saved = self.peak(FROZEN, Norm("n", 64))
        # float32 input and inverse, kept; the scaled input in float32 and in 16 bits; the output
        assert (peak, saved) == (4 * self.N + ROW + 4 * self.N + 2 * self.N + 2 * self.N, 4 * self.N + ROW)

    def test_liger_keeps_the_input_alone(self) -> None:
        peak, saved = self.peak(replace(FROZEN, liger=True), Norm("n", 64))
        assert (peak, saved) == (2 * self.N, 0)

    def test_layer_norm_runs_in_float32_under_autocast(self) -> None:
        peak, saved = self.peak(FROZEN, Norm("n", 64, "layer", bias=True))
        # its input as float32, which is kept, and the answer, which stays float32
        assert (peak, saved) == (4 * self.N + 4 * self.N, 4 * self.N)

    def test_upcast_streams_need_no_copy(self) -> None:
        tape = Tape()
        x = Tensor(4 * self.N, needs_grad=True, width=4)
        norm(tape, replace(FROZEN, stream=4), x, Norm("n", 64), 256)
        # square and mean; then the scaled input, and the weighted one
        assert tape.peak == max(4 * self.N + ROW, ROW + 4 * self.N + 4 * self.N)

    def test_norms_that_multiply_in_float32_need_more(self) -> None:
        plain, _ = self.peak(FULL, Norm("n", 64))
        wide, kept = self.peak(replace(FULL, float32_norm=True), Norm("n", 64))
        assert wide > plain
        assert kept == 4 * self.N + ROW + 4 * self.N  # the scaled input, in float32


def test_upcast_frozen_norms_double_the_residual_stream() -> None:
    narrow = layer_cost(llama_layer(), replace(FROZEN, quant="nf4"), 64)
    wide = layer_cost(llama_layer(), replace(FROZEN, quant="nf4", stream=4), 64)
    assert wide.output == 2 * narrow.output
    assert wide.saved > narrow.saved and wide.recompute_peak > narrow.recompute_peak


def test_parallel_layers_share_one_normed_input() -> None:
    serial = llama_layer()
    parallel = replace(serial, residual="parallel", norms=serial.norms[:1])
    cost = layer_cost(parallel, FULL, 64)
    # one norm and one copy of its output instead of two
    assert cost.saved == SAVED - SAVED_BY_NORM


def test_liger_saves_less() -> None:
    plain, liger = (layer_cost(llama_layer(), replace(FULL, liger=on), 64) for on in (False, True))
    assert liger.saved < plain.saved and liger.backward_peak < plain.backward_peak


@pytest.mark.parametrize("name", ["qwen2.5-7b", "gemma-2-2b", "deepseek-v2-lite"])
def test_a_longer_pass_never_costs_less(name: str) -> None:
    arch = known(name)
    for layer in arch.kinds:
        short, long = (layer_cost(layer, replace(FULL, seq=seq), arch.hidden_size) for seq in (128, 256))
        assert long.saved > short.saved and long.backward_peak > short.backward_peak
        assert long.gradients == short.gradients


def test_tiny_llama_is_the_layer_written_out_here() -> None:
    assert layer_cost(tiny().kinds[0], FULL, 64) == layer_cost(llama_layer(), FULL, 64)
