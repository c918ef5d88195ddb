"""LoRA and DoRA on the tape, as peft's `tuners/lora/{layer,bnb,dora}.py` run them."""

from __future__ import annotations

from planner.memory.shapes import Pass
from planner.memory.tape import Tape, Tensor
from profiles.schema import Linear


def lora(tape: Tape, p: Pass, x: Tensor, base: Tensor, spec: Linear, t: int) -> Tensor:
    wide_out = base.bytes
    result = base
    packed = p.quant != "none" and spec.quantized
    if p.quant == "nf4" and spec.quantized:
        result = tape.op((base,), wide_out)  # peft clones a 4-bit layer's result
        tape.free(base)
    source, owned = x, False
    if x.width != p.adapter_width and not (packed and p.autocast):
        # peft casts the input to the adapters' dtype; x stays bound until the layer returns
        source, owned = tape.cast(x, p.adapter_width), True
    dropped = source
    if p.dropout > 0 and p.train:
        mask = tape.new(t * spec.inputs)  # one byte an element
        dropped = tape.op((source,), source.bytes, save=(mask,))
        tape.free(mask)
    compute = p.width if p.autocast else p.adapter_width
    a = tape.parameter(spec.inputs * p.rank * p.adapter_width, True)
    b = tape.parameter(spec.outputs * p.rank * p.adapter_width, True)
    if p.autocast and p.adapter_width != p.width:
        a = tape.cached((id(spec), "a"), a, spec.inputs * p.rank * p.width)
        b = tape.cached((id(spec), "b"), b, spec.outputs * p.rank * p.width)
    narrow = dropped
    if p.autocast and dropped.width != p.width:
        narrow = tape.cast(dropped, p.width)
        if dropped is not source and not p.dora:
            tape.free(dropped)
            dropped = source
    low = tape.op((narrow, a), t * p.rank * compute, save=(narrow, *_if_cached(a)), width=compute)
    if narrow is not dropped:
        tape.free(narrow)
    high = tape.op((low, b), t * spec.outputs * compute, save=(low, *_if_cached(b)))
    tape.free(low)
    if p.dora:
        out = _dora(tape, p, dropped, result, high, spec, t)
    else:
        scaled = tape.op((high,), high.bytes)
        tape.free(high)
        out = tape.add(result, scaled, wide_out)
        tape.free(scaled)
    tape.free(result)
    if dropped is not source:
        tape.free(dropped)
    if owned:
        tape.free(source)
    return out


def _if_cached(weight: Tensor) -> tuple[Tensor, ...]:
    return () if weight.leaf else (weight,)


def _dora(tape: Tape, p: Pass, x: Tensor, result: Tensor, high: Tensor, spec: Linear, t: int) -> Tensor:
    """DoRA (arXiv:2402.09353): magnitudes over the norms of W + BA, which peft works out anew in every pass.

    BA comes from pushing an identity matrix of `inputs` x `inputs` through A and B; W is dequantized and
    cast to the input's dtype; the two products meet in the magnitude's float32.
    """
    n, wide = spec.inputs * spec.outputs, p.adapter_width
    x_width = x.width
    identity = spec.inputs**2
    tape.touch(identity * (wide + (p.width if p.autocast and wide != p.width else 0)))
    kept_identity = identity * p.width if tape.recording else 0
    tape.touch(kept_identity + 4 * n * x_width)
    magnitude = tape.parameter(spec.outputs * wide, True)
    base = result
    if p.dropout > 0 and p.train:  # the base product again, of the dropped input
        weight = tape.new(n * x_width)
        cast = tape.new(n * p.width) if p.autocast and x_width != p.width else tape.hold(weight)
        base = tape.op((x,), t * spec.outputs * p.width, save=(cast,), width=p.width)
        tape.free(weight, cast)
    left = tape.op((base, magnitude), t * spec.outputs * wide, save=(base,), width=wide)
    right = tape.op((high, magnitude), t * spec.outputs * wide, save=(high,), width=wide)
    scaled = tape.op((right,), right.bytes)
    tape.free(right, high)
    change = tape.add(left, scaled)
    tape.free(left, scaled)
    total = tape.add(result, change)
    tape.free(change)
    if base is not result:
        tape.free(base)
    if total.width <= result.width:
        return total
    out = tape.cast(total, result.width)
    tape.free(total)
    return out
