"""The modules of a decoder layer as transformers and peft run them, replayed on a tape.

Shape legend: B sequences, S tokens a sequence, T = B x S tokens, D hidden size, F features between the
feed-forward linears, H heads, K key/value heads, E head size, V vocabulary, r LoRA rank.

Each function mirrors the statement order of the real code, because Python names decide what is alive:
transformers `models/llama/modeling_llama.py` and its siblings, peft `tuners/lora/{layer,bnb}.py`,
bitsandbytes `autograd/_functions.py`, liger-kernel `ops/`.
"""

from __future__ import annotations

import math
from functools import lru_cache

from planner.memory.adapters import is_target
from planner.memory.lora import is_joined, joined_lora, lora
from planner.memory.shapes import Pass
from planner.memory.tape import Tape, Tensor
from profiles.schema import Linear, Norm


def adapted(p: Pass, linear: Linear) -> bool:
    """Does LoRA sit on this linear?"""
    targets = "attention" if p.attention_only else "all-linear"
    return p.adapters and is_target(linear, targets, p.fused_experts)


def linear(tape: Tape, p: Pass, x: Tensor, spec: Linear, outliers: float = 0.0) -> Tensor:
    """One `nn.Linear` with whatever quantization and adapter the job puts on it. x: [T, inputs].

    `outliers`: share of input columns that LLM.int8 multiplies in 16 bits.
    """
    t = p.tokens
    out = _base(tape, p, x, spec, t, outliers)
    if not adapted(p, spec):
        return out
    return (joined_lora if is_joined(p, x, out) else lora)(tape, p, x, out, spec, t)


def _base(tape: Tape, p: Pass, x: Tensor, spec: Linear, t: int, outliers: float) -> Tensor:
    quant = p.quant if spec.quantized else "none"
    if quant == "int8":
        return _int8(tape, p, x, spec, t, outliers)
    n = t * spec.outputs * p.width
    # Linear4bit casts its input to the compute dtype and its output back; autocast casts the input alone
    y = tape.cast(x, p.width)
    if quant == "nf4":
        weight = spec.inputs * spec.outputs * p.width
        # passes of more tokens dequantize the whole weight for one product, forward and backward
        workspace = weight if t > packed_rows(spec.inputs, spec.outputs, p.width) else 0
        out = tape.op((y,), n, temp=workspace, back_temp=weight)
        tape.free(y)
        back = tape.cast(out, x.width)
        tape.free(out)
        return back
    if p.full:
        w = tape.parameter(spec.parameters * p.width, True)
        out = tape.op((y, w), n, save=(y,))
    else:
        out = tape.op((y,), n, save_weight=True)
    tape.free(y)
    return out


MULTIPROCESSORS = 132
"""Of the H100 and H200."""


def packed_rows(inputs: int, outputs: int, width: int = 2) -> int:
    """Rows up to which bitsandbytes multiplies a packed 4-bit weight without a dequantized copy.

    Its rule for the H100 and H200 (bitsandbytes 0.50 backends/cuda/ops.py, `_gemm_4bit_use_custom_cuda`), by
    how many blocks of 64 outputs a multiprocessor gets; of all cards these leave the packed kernel soonest,
    so others may need one dequantized matrix less. Seen with 64 sequences of Llama-3-70B, whose decoding
    takes the 448 MiB of a down projection (benchmarks/streaming/results.jsonl).
    """
    blocks, wave = -(-outputs // 64), MULTIPROCESSORS
    if width == 4:
        return 7
    if inputs * outputs < 4 * 2**20:
        if 2 * inputs < outputs:
            return 512 if 3 * blocks < wave else 320
        return 32 if 4 * blocks <= wave else 16 if 2 * blocks <= wave else 4
    for waves, rows in ((3, 64), (2, 48), (1, 32)):
        if blocks >= waves * wave:
            return rows
    tall = inputs >= outputs and 4 * blocks < 3 * wave
    return 16 if 2 * blocks >= wave and not tall else 7


def _int8(tape: Tape, p: Pass, x: Tensor, spec: Linear, t: int, outliers: float) -> Tensor:
    """LLM.int8 (arXiv:2208.07339): fp16 copy of the input, its int8 rows, int32 product, 16-bit result.

    Columns with an entry of 6.0 or more are multiplied in 16 bits: their share of the input is copied,
    their share of the weight dequantized through two float32 temporaries (bitsandbytes
    backends/default/ops.py).
    """
    n = t * spec.outputs * x.width
    half = tape.new(t * spec.inputs * 2)
    rows = tape.new(t * spec.inputs)
    tape.touch(t * spec.inputs * 3)  # |A| and the mask of its outliers
    tape.free(half)
    outliers = max(outliers, x.outliers)
    picked = int(t * spec.inputs * x.width * outliers)
    tape.touch(picked + int(spec.inputs * spec.outputs * 9 * outliers))
    kept = tape.new(picked + int(spec.inputs * spec.outputs * p.width * outliers))
    product = tape.new(t * spec.outputs * 4)
    cast = t * spec.outputs * 2 if p.width == 2 else 0
    back = spec.inputs * spec.outputs * p.width
    out = tape.op((x,), n, temp=cast, back_temp=back)
    tape.free(product, rows)
    if outliers:
        tape.touch(n)  # addmm of the 16-bit part
    tape.free(kept)
    if x.needs_grad:  # kept on ctx, outside saved_tensors: checkpointing cannot drop it
        tape.pinned.append(tape.hold(x))
        tape.pinned.append(tape.new(picked))
    return out


@lru_cache(maxsize=256)
def outlier_share(hidden: int, tokens: int) -> float:
    """Share of a gated product's columns with an entry of at least 6.0 in `tokens` rows.

    For weights drawn as transformers initialises them (sigma 0.02) and normed inputs: entries are silu(s
    z1) s z2 with s = 0.02 sqrt(D), integrated numerically. Measured on an H200 for Qwen2.5-7B int8, 2048
    tokens: 0.98 here, 0.99 from the measured peak. Trained weights differ; the interval allows for none
    to all.
    """
    s, steps = 0.02 * math.sqrt(hidden), 200
    p = 0.0
    for i in range(steps):
        z = -8 + 16 * (i + 0.5) / steps
        scale = abs(s * z / (1 + math.exp(-s * z))) * s
        if scale > 0:
            p += (
                math.exp(-z * z / 2)
                / math.sqrt(2 * math.pi)
                * 16
                / steps
                * math.erfc(6 / scale / math.sqrt(2))
            )
    return -math.expm1(tokens * math.log1p(-min(p, 0.999999)))


def norm(tape: Tape, p: Pass, x: Tensor, spec: Norm, rows: int) -> Tensor:
    """RMSNorm or LayerNorm over rows of `spec.size` features."""
    n = rows * spec.size
    weight = tape.parameter(spec.size * p.width, p.full)
    if spec.kind == "layer" and p.layer_norm == "by_hand":
        return _layer_norm_by_hand(tape, p, x, weight, n, rows)
    if spec.kind == "layer":
        return _layer_norm(tape, p, x, weight, n)
    if p.liger:
        return tape.op((x, weight), n * x.width, save=(x,))
    wide = tape.cast(x, 4)
    inverse = _inverse_rms(tape, wide, n, rows)
    scaled = tape.op((wide, inverse), 4 * n, save=(wide, inverse), back_temp=4 * n)
    tape.free(inverse, wide)
    if p.float32_norm:
        product = _times_weight(tape, p, scaled, weight, 4 * n)
        tape.free(scaled)
        out = tape.cast(product, x.width)
        tape.free(product)
        return out
    narrow = tape.cast(scaled, x.width)
    out = _times_weight(tape, p, narrow, weight, n * max(x.width, 4 if p.upcast else 0))
    tape.free(narrow, scaled)
    return out


def _layer_norm(tape: Tape, p: Pass, x: Tensor, weight: Tensor, n: int) -> Tensor:
    """`nn.LayerNorm`: one kernel that keeps its input. Autocast runs it in float32 and leaves it there, so
    4-bit linears hand float32 on and the residual stream becomes float32 with them."""
    wide = 4 if p.layer_norm == "returned" or (p.autocast and p.layer_norm == "fused") else x.width
    if p.autocast and p.layer_norm == "lowered":
        wide = p.width
    source = tape.cast(x, wide)
    out = tape.op((source, weight), n * wide, save=(source,))
    tape.free(source)
    if p.layer_norm != "returned":
        return out
    back = tape.cast(out, x.width)
    tape.free(out)
    return back


def _layer_norm_by_hand(tape: Tape, p: Pass, x: Tensor, weight: Tensor, n: int, rows: int) -> Tensor:
    """models/cohere/modeling_cohere.py: mean, centred rows (twice), their square, all float32."""
    wide = tape.cast(x, 4)
    mean = tape.op((wide,), 4 * rows)
    centred = tape.op((wide, mean), 4 * n)
    inverse = _inverse_rms(tape, centred, n, rows)
    tape.free(centred)
    again = tape.op((wide, mean), 4 * n)
    scaled = tape.op((again, inverse), 4 * n, save=(again, inverse), back_temp=4 * n)
    tape.free(again, inverse, wide, mean)
    product = _times_weight(tape, p, scaled, weight, 4 * n)
    tape.free(scaled)
    out = tape.cast(product, x.width)
    tape.free(product)
    return out


def normed(tape: Tape, p: Pass, x: Tensor, spec: Norm | None) -> Tensor:
    """A norm whose input is not needed any more: `x` is freed; `x` itself where there is no norm."""
    if spec is None:
        return x
    out = norm(tape, p, x, spec, p.tokens)
    tape.free(x)
    return out


def _times_weight(tape: Tape, p: Pass, x: Tensor, weight: Tensor, n: int) -> Tensor:
    """`weight * x`; a trained weight's gradient is as large as x until its rows are summed."""
    save, back = ((x,), n) if p.full else ((), 0)
    return tape.op((x, weight), n, save=save, back_temp=back, save_weight=True)


def _inverse_rms(tape: Tape, wide: Tensor, n: int, rows: int) -> Tensor:
    """rsqrt(mean(x^2) + eps), one float32 a row; pow keeps x, its backward makes three more of it.

    `grad * (2 * x.pow(1))`: both factors are there until the product is (torch/csrc/autograd/
    FunctionsManual.cpp, pow_backward).
    """
    square = tape.op((wide,), 4 * n, save=(wide,), back_temp=8 * n)
    mean = tape.op((square,), 4 * rows)
    tape.free(square)
    inverse = tape.op((mean,), 4 * rows, save_out=True)
    tape.free(mean)
    return inverse


def multiply(tape: Tape, a: Tensor, b: Tensor) -> Tensor:
    """Elementwise product: keeps both factors."""
    return tape.op((a, b), max(a.bytes, b.bytes), save=(a, b))


__all__ = [
    "Pass",
    "adapted",
    "linear",
    "multiply",
    "norm",
    "normed",
    "outlier_share",
]
