"""The end of a model on the tape: final norm, output projection, loss.

The loss is transformers' `ForCausalLMLoss` (loss/loss_utils.py): logits in the compute dtype, upcast to
float32, `log_softmax` kept for backward, then two more float32 copies of [T, V] when backward starts.
Accelerate's mixed precision also returns float32 logits. The fused loss never holds more than a chunk of
them: liger's, a few tokens by the whole vocabulary (liger_kernel/ops/fused_linear_cross_entropy.py); torch's,
a block of the vocabulary by many tokens (`planner/exact/chunked_loss.py`).
"""

from __future__ import annotations

from functools import lru_cache

from msgspec import Struct

from planner.memory.forward import Pass, norm
from planner.memory.stream import head_block_rows
from planner.memory.tape import Tape, Tensor, rounded
from profiles.schema import Architecture, Norm

CHUNK_LOGITS = 8 * 2**20
"""Most logits that torch's fused loss has at once: 32 MiB in float32, one block by a chunk of tokens."""


class HeadCost(Struct, frozen=True):
    """Bytes of the model's end, the last hidden state counted in."""

    forward_peak: int
    backward_peak: int
    """Most bytes above the start in backward, saved tensors counted in."""
    gradients: int
    """Gradient of a trained output projection (or of the tied embedding)."""
    saved: int
    """Alive between forward and backward."""


class Ending(Struct, frozen=True):
    """What of an architecture decides the cost of its end."""

    hidden: int
    vocab: int
    norm: Norm | None
    softcap: bool
    scale: bool


def ending(arch: Architecture) -> Ending:
    """The facts `head_cost` needs; hashable and small."""
    return Ending(arch.hidden_size, arch.vocab_size, arch.final_norm, arch.logit_softcap, arch.logit_scale)


@lru_cache(maxsize=1024)
def head_cost(end: Ending, p: Pass, fused: bool) -> HeadCost:
    """Replay final norm, projection and loss, forward and backward."""
    tape = Tape()
    x = tape.new(p.tokens * end.hidden * p.stream, needs_grad=True, width=p.stream)
    loss = loss_of(tape, p, x, end, fused)
    forward_peak, saved = tape.peak, tape.live
    tape.mark()
    loss.grad = tape.new(512)
    tape.backward(loss)
    gradients = tape.live - (x.grad.bytes if x.grad is not None else 0) - loss.bytes
    return HeadCost(forward_peak, tape.peak, max(0, gradients), saved)


def loss_of(tape: Tape, p: Pass, x: Tensor, end: Ending, fused: bool) -> Tensor:
    """Final norm, projection and loss of the last hidden state, which is freed."""
    y = norm(tape, p, x, end.norm, p.tokens) if end.norm else tape.hold(x)
    tape.free(x)
    if not fused:
        return _full_loss(tape, p, y, end)
    return _liger_loss(tape, p, y, end) if p.liger else _chunked_loss(tape, p, y, end)


def _full_loss(tape: Tape, p: Pass, y: Tensor, end: Ending) -> Tensor:
    t, v = p.tokens, end.vocab
    logits = _project(tape, p, y, end)
    if end.scale:
        scaled = tape.op((logits,), logits.bytes)
        tape.free(logits)
        logits = scaled
    if end.softcap:
        divided = tape.op((logits,), logits.bytes)
        tape.free(logits)
        bounded = tape.op((divided,), divided.bytes, save_out=True)
        tape.free(divided)
        logits = tape.op((bounded,), bounded.bytes)
        tape.free(bounded)
    wide = tape.cast(logits, 4)
    # log_softmax keeps its result; both that and the upcast logits are alive at once
    log_probabilities = tape.op((wide,), 4 * t * v, save_out=True)
    tape.free(wide)
    loss = tape.op((log_probabilities,), 512, save=(log_probabilities,))
    tape.free(log_probabilities)
    if p.autocast:  # accelerate's ConvertOutputsToFp32
        returned = tape.new(4 * t * v)
        tape.free(logits)
        logits = returned
    tape.free(logits, y)
    return loss


def _project(tape: Tape, p: Pass, y: Tensor, end: Ending) -> Tensor:
    t, v, d = p.tokens, end.vocab, end.hidden
    out = t * v * p.width
    weight = tape.parameter(v * d * p.width, p.full)
    # autocast casts the input for this matmul, and the weight where it was upcast to float32
    narrow = tape.cast(y, p.width) if p.autocast else tape.hold(y)
    cast = tape.new(v * d * p.width) if p.upcast and p.autocast else None
    save = (narrow,) if p.full else () if cast is None else (cast,)
    logits = tape.op((narrow, weight), out, save=save)
    tape.free(narrow, cast)
    return logits


def fused_chunk_rows(t: int, v: int, d: int) -> int:
    """Rows of logits liger holds at a time: the power of two at or above T / ceil(V / D)."""
    rows = max(1, -(-t // max(1, -(-v // d))))
    return min(t, 1 << (rows - 1).bit_length())


def largest_block(end: Ending, p: Pass, fused: bool) -> int:
    """The biggest block of a step: one float32 copy of the logits, or of a block's; none worth naming where
    liger keeps a few rows of them."""
    if fused and p.liger:
        return 0
    return rounded(4 * (min(CHUNK_LOGITS, p.tokens * end.vocab) if fused else p.tokens * end.vocab))


def _liger_loss(tape: Tape, p: Pass, y: Tensor, end: Ending) -> Tensor:
    """liger works out the gradients in its forward pass, chunk by chunk in one buffer of logits, and hands
    them to backward as they are: the head's is added up in place (ops/fused_linear_cross_entropy.py)."""
    t, v, d = p.tokens, end.vocab, end.hidden
    chunk = fused_chunk_rows(t, v, d) * v * p.width
    y.grad = tape.new(t * d * y.width)
    if p.full:
        tape.new(v * d * p.width)
    # autocast casts what is not in its dtype already, and then the product has no buffer of its own
    casts = v * d * p.width if p.upcast and p.autocast else 0
    tape.touch(chunk + casts)
    tape.free(y)
    return tape.new(512)


def _chunked_loss(tape: Tape, p: Pass, y: Tensor, end: Ending) -> Tensor:
    t, v, d = p.tokens, end.vocab, end.hidden
    weight = tape.parameter(v * d * p.width, p.full)
    if end.scale:  # of what the output projection hands through
        scaled = tape.op((y,), y.bytes)
        tape.free(y)
        y = scaled
    narrow = tape.cast(y, p.width)
    sums = tape.new(4 * t)  # log of the sum of exponents, one a token
    rows = head_block_rows(v, d, p.width)
    part = min(t, max(1, CHUNK_LOGITS // rows)) * rows
    cast = rows * d * p.width if p.upcast and p.autocast else 0
    # logits as they come and in float32, then those beside what logsumexp makes of them
    tape.touch(cast + 8 * part)
    wide, answer = 4 * t * d, rounded(t * d * p.width)
    slopes = part * ((4 if p.width == 4 else 4 + p.width) + (4 if end.softcap else 0))
    products = rounded(part // rows * d * p.width) + (4 * rows * d if p.full else 0)
    loss = tape.op(
        (narrow, weight),
        512,
        save=(narrow, sums),
        # the gradient in float32 beside the parts, and at the end beside its copy in the compute dtype
        back_temp=wide + max(0, cast + slopes + products - answer),
    )
    if p.autocast:  # accelerate's ConvertOutputsToFp32 takes the hidden states for logits
        tape.touch(wide)
    tape.free(sums, narrow, y)
    return loss
