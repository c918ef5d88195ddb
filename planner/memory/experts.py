"""Routed experts on the tape, as transformers' `integrations/moe.py` runs fused stacks (grouped_mm)."""

from __future__ import annotations

from planner.memory.activations import activation
from planner.memory.forward import Pass, multiply, packed_rows
from planner.memory.tape import Tape, Tensor
from profiles.precisions import load_precisions, weight_bytes_per_parameter
from profiles.schema import Experts


def routed_experts(tape: Tape, p: Pass, y: Tensor, spec: Experts, act: str) -> Tensor:
    """Top-k experts over T x k token copies, as `integrations/moe.py` grouped_mm runs it."""
    t, k, w, d = p.tokens, spec.per_token, p.width, p.hidden
    pairs = t * k
    scores = tape.op(
        (y,), t * spec.count * 4, save=(y,) if p.full else (), save_out=True, temp=t * spec.count * w
    )
    handed = 4 if p.float32_routers else w
    weights = tape.op((scores,), pairs * handed, width=handed)
    picked = tape.op((y,), pairs * d * w, width=w)  # hidden_states[perm // k]
    index = tape.new(pairs * 8 * 3)
    up_spec, down_spec = _expert_weights(spec, d)
    if not p.train and p.seq == 1 and spec.fused:
        # decode copies the weights of every expert a token picked (transformers switches to batched_mm)
        tape.touch(_copied(p, spec, pairs, up_spec, down_spec))
    up_size = up_spec // max(1, spec.count * d)
    temp, back_temp = _beside(p, spec, up_spec, up_size)
    up_w = tape.parameter(up_spec * w, p.full)
    down_w = tape.parameter(down_spec * w, p.full)
    keep = (picked,) if p.full else ()
    biases = [item for item in spec.parameters if item.name.endswith("bias")]
    bias = tape.new(pairs * biases[0].shape[-1] * w) if biases else None  # of each pair's expert
    both = tape.op(
        (picked, up_w),
        pairs * up_size * w,
        save=keep,
        temp=temp,
        back_temp=back_temp,
    )
    gate, up = tape.view(both, both.bytes // 2), tape.view(both, both.bytes // 2)
    middle = _clamped(tape, gate, up) if p.clamped_experts else _activated(tape, p, gate, up, act)
    tape.free(both, gate, up)
    if biases:
        tape.free(bias)
        bias = tape.new(pairs * d * w)
    temp, back_temp = _beside(p, spec, down_spec, d)
    keep = (middle,) if p.full else ()
    out = tape.op((middle, down_w), pairs * d * w, save=keep, temp=temp, back_temp=back_temp)
    tape.free(middle)
    wide = max(w, weights.width)
    # the gradient of a weight is a product with every feature, summed; that of an output is cast back
    back = pairs * d * (wide if wide == w else 2 * wide - w)
    weighted = tape.op(
        (out, weights), pairs * d * wide, save=(out, weights, index), back_temp=back, width=wide
    )
    restored = tape.op((weighted,), pairs * d * wide, save=(index,))
    tape.free(weighted)
    added = 4 if p.autocast else wide  # autocast asks `sum` for float32
    total = tape.op((restored,), t * d * added, width=added)
    out_total = tape.cast(total, y.width)
    tape.free(total, restored, scores, weights, index, out, picked, bias)
    return out_total


def _copied(p: Pass, spec: Experts, pairs: int, up: int, down: int) -> int:
    """Bytes of the experts' weights that a decode step copies. Packed ones one projection at a time, and only
    where their number is small (`executor/packed_experts.py`)."""
    if not p.packed_experts:
        return pairs * (up + down) // max(1, spec.count) * p.width
    if 2 * pairs > spec.count:
        return 0
    return int(
        pairs * max(up, down) / max(1, spec.count) * weight_bytes_per_parameter(load_precisions()["nf4"])
    )


def _beside(p: Pass, spec: Experts, weights: int, outputs: int) -> tuple[int, int]:
    """Bytes beside a product with packed experts, forward and backward: the product of one expert's rows, and
    its weight, forward only where bitsandbytes multiplies so many rows by no packed one."""
    if not (p.packed_experts and spec.fused):
        return 0, 0
    elements = weights // max(1, spec.count)
    weight, rows = elements * p.width, -(-p.tokens * spec.per_token // max(1, spec.count))
    unpacked = rows > packed_rows(elements // outputs, outputs, p.width)
    return rows * outputs * p.width + (weight if unpacked else 0), weight


def _activated(tape: Tape, p: Pass, gate: Tensor, up: Tensor, act: str) -> Tensor:
    active = activation(tape, p, gate, act)
    middle = multiply(tape, active, up)
    tape.free(active)
    return middle


def _clamped(tape: Tape, gate: Tensor, up: Tensor) -> Tensor:
    """(clamp(up) + 1) clamp(gate) sigmoid(alpha clamp(gate)): all but the scaled gate is kept or named."""
    low, high = (tape.op((x,), gate.bytes, save=(x,)) for x in (gate, up))
    scaled = tape.op((low,), low.bytes)
    score = tape.op((scaled,), low.bytes, save_out=True)
    tape.free(scaled)
    glu = multiply(tape, low, score)
    tape.free(score)
    raised = tape.op((high,), high.bytes)
    middle = multiply(tape, raised, glu)
    tape.free(raised, low, high, glu)
    return middle


def _expert_weights(spec: Experts, d: int) -> tuple[int, int]:
    """Elements of the up (gate_up) and down stacks of all experts."""
    if spec.fused:
        sizes = sorted((item.elements for item in spec.parameters), reverse=True)
        total = sum(size for size in sizes[:3])
    else:
        total = spec.count * sum(item.inputs * item.outputs for item in spec.linears)
    down = spec.count * spec.intermediate * d
    return max(total - down, down), down


__all__ = ["routed_experts"]
