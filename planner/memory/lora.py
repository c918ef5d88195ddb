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
    weight, named = _dora_weights(tape, p, spec, dropped.width, packed) if p.dora else (None, [])
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
        scaled = _dora(tape, p, dropped, result, high, spec, t, weight)
        tape.free(*named)
    else:
        scaled = tape.op((high,), high.bytes)
        tape.free(high)
    out = tape.add(result, scaled, max(wide_out, scaled.bytes))
    tape.free(scaled)
    if out.width > result.width and not (packed and p.autocast):  # peft casts back what it widened
        narrowed = tape.cast(out, result.width)
        tape.free(out)
        out = narrowed
    tape.free(result)
    if dropped is not source:
        tape.free(dropped)
    if owned:
        tape.free(source)
    return out


def is_joined(p: Pass, x: Tensor, base: Tensor) -> bool:
    """Does engine stream compute this adapter as one node (`executor/streaming/adapters.py`)?"""
    return p.joined and p.train and p.autocast and not p.dora and x.width == p.width == base.width


def joined_lora(tape: Tape, p: Pass, x: Tensor, base: Tensor, spec: Linear, t: int) -> Tensor:
    """LoRA as one node of autograd. What dropout left of the input is made again in backward."""
    wide_in = t * spec.inputs * p.width
    packed = p.quant != "none" and spec.quantized
    a, b = (tape.parameter(n * p.rank * p.adapter_width, True) for n in (spec.inputs, spec.outputs))
    saved, dropped = [], 0
    if p.dropout > 0:
        # peft has an adapter drop elements of its input in the adapter's dtype, but over quantized layers
        wide = wide_in if packed else t * spec.inputs * p.adapter_width
        cast = tape.new(wide if wide != wide_in else 0)
        mask = tape.new(t * spec.inputs)
        kept = tape.new(wide)
        tape.free(cast)
        if wide != wide_in:
            narrow = tape.new(wide_in)
            tape.free(kept)
            kept = narrow
        saved, dropped = [mask], wide_in
    if p.adapter_width != p.width:
        saved += [tape.new(n * p.rank * p.width) for n in (spec.inputs, spec.outputs)]
    saved.append(tape.new(t * p.rank * p.width))
    if p.dropout > 0:
        tape.free(kept)
    out = tape.op(
        (x, a, b),
        base.bytes,
        save=(x, *saved),
        save_late=True,
        before=max(base.bytes, dropped),
        back_temp=dropped,
        alias=base,
    )
    tape.free(base, *saved)
    return out


def _if_cached(weight: Tensor) -> tuple[Tensor, ...]:
    return () if weight.leaf else (weight,)


def _dora(
    tape: Tape, p: Pass, x: Tensor, result: Tensor, high: Tensor, spec: Linear, t: int, weight: Tensor | None
) -> Tensor:
    """DoRA (arXiv:2402.09353): magnitudes times the base product and the adapter's, in the magnitude's dtype.

    `weight`: the base weight where it is a copy.
    """
    wide, out = p.adapter_width, t * spec.outputs
    magnitude = tape.parameter(spec.outputs * wide, True)
    base = result
    if p.dropout > 0 and p.train:  # the base product again, of the dropped input
        saved, narrow = [] if weight is None else [tape.hold(weight)], 0
        if p.autocast and x.width != p.width:
            tape.free(*saved)
            saved, narrow = [tape.new(spec.inputs * spec.outputs * p.width)], t * spec.inputs * p.width
        base = tape.op((x,), out * p.width, save=saved, temp=narrow, save_weight=True, width=p.width)
        tape.free(*saved)
    elif spec.bias:
        base = tape.op((result,), result.bytes)
    # the magnitude's gradient is as large as the product until its rows are summed
    left = tape.op((base, magnitude), out * wide, save=(base,), back_temp=out * wide, width=wide)
    right = tape.op((high, magnitude), out * wide, save=(high,), back_temp=out * wide, width=wide)
    scaled = tape.op((right,), right.bytes)
    tape.free(right)
    change = tape.add(left, scaled)
    tape.free(left, scaled, high)
    if base is not result:
        tape.free(base)
    return change


def _dora_weights(
    tape: Tape, p: Pass, spec: Linear, width: int, packed: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """The norms of W + BA, which peft works out anew in every pass; W where it is a copy, and all that its
    frame names until the layer returns.

    BA comes from pushing an identity matrix of `inputs` x `inputs` through A and B; W is dequantized (int8:
    to float32); both are cast to the input's dtype, of `width` bytes.
    """
    n, identity = spec.inputs * spec.outputs, spec.inputs**2
    compute = p.width if p.autocast else p.adapter_width
    eye = tape.new(identity * p.adapter_width)
    narrow = tape.new(identity * compute) if compute != p.adapter_width else tape.hold(eye)
    product = tape.new(n * compute, width=compute)
    tape.free(eye)
    named = [tape.cast(product, width)]
    tape.free(product)
    if tape.recording:  # A keeps its input for as long as BA is there
        named.append(narrow)
    else:
        tape.free(narrow)
    weight = None
    own = 4 if p.quant == "int8" and packed else p.width
    if packed or own != width:
        dequantized = tape.new(n * own if packed else 0, width=own)
        if packed and own == 4:
            tape.touch(n * own)
        weight = tape.cast(dequantized, width) if packed else tape.new(n * width, width=width)
        tape.free(dequantized)
        named.append(weight)
    tape.touch(2 * n * width)  # scaled, and the sum
    return weight, named
