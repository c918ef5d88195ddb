"""Mamba 2 mixers on the tape, as transformers 5.17 runs them without mamba-ssm (arXiv:2405.21060).

`mamba2_chunk_scan` of `models/falcon_h1/modeling_falcon_h1.py` and its siblings works in float32 and writes
its contractions as products that are summed afterwards: the largest holds one number for every token, every
other token of its chunk, every head and every feature of the state. transformers 5.23 has einsums there,
which hold a tenth.
"""

from __future__ import annotations

from msgspec import Struct

from planner.memory.forward import linear, multiply, norm
from planner.memory.shapes import Pass
from planner.memory.tape import Tape, Tensor
from profiles.schema import Attention, Linear


class _Sizes(Struct, frozen=True):
    """float32 bytes; tokens are padded to whole chunks."""

    x: int
    """Values of all heads."""
    s: int
    """Keys or queries (B, C) of all heads."""
    pairs: int
    """One number a head for each pair of tokens of a chunk."""
    chunk: int
    state_dim: int


def is_mamba2(spec: Attention) -> bool:
    """Does the mixer scan in chunks, with one decay a head?"""
    return spec.state is not None and spec.state.chunk > 0


def _sizes(p: Pass, spec: Attention, inner: int) -> _Sizes:
    assert spec.state is not None
    chunk = spec.state.chunk
    rows = 4 * p.batch * -(-p.seq // chunk) * chunk
    heads = next(item.shape[0] for item in spec.parameters if item.name.endswith("A_log"))
    state_dim = spec.state.state_elements // inner
    return _Sizes(rows * inner, rows * heads * state_dim, rows * heads * chunk, chunk, state_dim)


def mamba2(tape: Tape, p: Pass, x: Tensor, spec: Attention, first: Linear, last: Linear) -> Tensor:
    """Output of the mixer between its projections `first` and `last`. x: [T, D]."""
    assert spec.state is not None
    inner, width = last.inputs, p.tokens * p.width
    projected = linear(tape, p, x, first)
    convolved = tape.op((projected,), width * spec.state.conv_dim, save=(projected,))
    active = tape.op((convolved,), convolved.bytes, save=(convolved,))
    tape.free(convolved)
    if p.seq == 1 and not p.train:  # the state, its decay and the update
        tape.touch(3 * 4 * p.batch * spec.state.state_elements)
        scanned = tape.op((active,), width * inner, width=p.width)
    else:
        scanned = _scan(tape, active, _sizes(p, spec, inner))
    gate = tape.op((projected,), width * inner, save=(projected,))
    gated = multiply(tape, scanned, gate)
    tape.free(gate, scanned)
    if norms := [item for item in spec.norms if item.name.endswith("norm") and item.size == inner]:
        normed = norm(tape, p, gated, norms[0], p.tokens)
        tape.free(gated)
        gated = normed
    narrow = tape.cast(gated, p.width)
    tape.free(gated)
    out = linear(tape, p, narrow, last)
    tape.free(narrow, active, projected)
    return out


def _scan(tape: Tape, active: Tensor, n: _Sizes) -> Tensor:
    """The scan, in the order of the code; its names live until it returns."""
    wide = tape.op((active,), n.x, width=4)
    keys, queries = (tape.op((active,), n.s, width=4) for _ in range(2))
    residual = tape.op((wide,), n.x, save=(wide,))
    values = tape.op((wide,), n.x, save=(wide,))
    tape.free(wide)
    decay = tape.op((active,), n.pairs, temp=2 * n.pairs, save_out=True, width=4)
    scores = _summed(tape, queries, keys, n.pairs, n.s * n.chunk)
    weights = _summed(tape, scores, decay, n.pairs, n.pairs)
    inside = _summed(tape, weights, values, n.x, n.x * n.chunk)
    decayed = tape.op((keys,), n.s, save=(keys,))
    states = _summed(tape, decayed, values, n.x * n.state_dim // n.chunk, n.x * n.state_dim)
    # the product of queries and states has a name
    product = tape.op((queries, states), n.x * n.state_dim, save=(queries, states))
    across = tape.op((product,), n.x)
    both = tape.add(inside, across)
    out = tape.add(both, residual)
    tape.free(keys, queries, residual, values, decay, scores, weights, inside)
    tape.free(decayed, states, product, across, both)
    return out


def _summed(tape: Tape, a: Tensor, b: Tensor, n: int, product: int) -> Tensor:
    """(a * b).sum(): the product is there until the sum is; backward spreads the gradient over two of it."""
    return tape.op((a, b), n, save=(a, b), temp=product, back_temp=2 * product)


__all__ = ["is_mamba2", "mamba2"]
