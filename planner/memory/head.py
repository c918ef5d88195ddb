"""The end of a model on the tape: final norm, output projection, loss.

The loss is transformers' `ForCausalLMLoss` (loss/loss_utils.py): logits in the compute dtype, upcast to
float32, `log_softmax` kept for backward, then two more float32 copies of [T, V] when backward starts.
Accelerate's mixed precision also returns float32 logits. The fused loss never holds more than a chunk of
them: the executor's own, or liger's where its kernels run.
"""

from __future__ import annotations

from functools import lru_cache

from msgspec import Struct

from planner.memory.forward import Pass, norm
from planner.memory.tape import Tape, Tensor, rounded
from profiles.schema import Architecture, Norm

CHUNK = 512
"""Tokens whose logits exist at once in the executor's chunked loss."""


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
    y = norm(tape, p, x, end.norm, p.tokens) if end.norm else tape.hold(x)
    tape.free(x)
    run = _full_loss if not fused else _liger_loss if p.liger else _chunked_loss
    loss = run(tape, p, y, end)
    forward_peak, saved = tape.peak, tape.live
    tape.mark()
    loss.grad = tape.new(512)
    tape.backward(loss)
    gradients = tape.live - (x.grad.bytes if x.grad is not None else 0) - loss.bytes
    return HeadCost(forward_peak, tape.peak, max(0, gradients), saved)


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
    """The biggest block of a step: one float32 copy of the logits, or of a chunk's; none worth naming where
    liger keeps a few rows of them."""
    if fused and p.liger:
        return 0
    rows = min(CHUNK, p.batch * (p.seq - 1)) if fused else p.tokens
    return rounded(4 * rows * end.vocab)


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
    """The executor's own loss in chunks, each computed again in backward (planner/exact/chunked_loss.py)."""
    if end.scale:
        y = tape.op((y,), y.bytes)
    rest, d = p.batch * (p.seq - 1), end.hidden
    flat = tape.op((y,), rest * d * y.width) if p.batch > 1 else tape.view(y, rest * d * y.width)
    weight = tape.parameter(end.vocab * d * p.width, p.full)
    total = tape.new(512)
    while rest > 0:
        rows = min(CHUNK, rest)
        cost = _chunk_cost(end, rows, p, y.width)
        piece = tape.view(flat, rows * d * y.width)
        tape.touch(cost.forward)
        # the product's backward, then that of the loss, which comes first and has computed both again
        logits = tape.op((piece, weight), 512, back_temp=cost.product, save=(piece,))
        part = tape.op((logits,), 512, back_temp=cost.loss, save=(logits,))
        before, total = total, tape.add(total, part)
        tape.free(piece, logits, part, before)
        rest -= rows
    if p.autocast:  # accelerate takes the hidden states that the projection handed through for logits
        returned = tape.new(4 * p.tokens * d)
        tape.free(returned)
    tape.free(flat, y)
    return total


class _ChunkCost(Struct, frozen=True):
    forward: int
    """Most bytes of a chunk's pass without recording."""
    loss: int
    """Most bytes of computing it again and of backward down to the logits."""
    product: int
    """Bytes beside the gradients in backward of the projection."""


@lru_cache(maxsize=1024)
def _chunk_cost(end: Ending, rows: int, p: Pass, width: int) -> _ChunkCost:
    n = rows * end.vocab
    casts = end.vocab * end.hidden * p.width if p.upcast and p.autocast else 0
    narrow = rows * end.hidden * p.width if width != p.width and p.autocast else 0
    capped = 4 * n if end.softcap else 0
    # logits in 16 bits and upcast; upcast and log-softmax; capping divides, bounds and multiplies
    forward = max(casts + narrow + (p.width + 4) * n, 8 * n + capped)
    saved = casts + (narrow if p.full else 0) + capped
    recompute = saved + max((p.width + 4) * n, 8 * n)
    # log-softmax, its gradient, the gradient of the logits
    backward = saved + 12 * n
    return _ChunkCost(forward, max(recompute, backward), casts + p.width * n)
