"""Linear attention and state-space layers on the tape, as transformers runs them without fla or mamba-ssm.

Gated delta rule (arXiv:2412.06464; Qwen3-Next, Qwen3.5): `torch_chunk_gated_delta_rule` of
`models/qwen3_5/modeling_qwen3_5.py`, which works in float32 on chunks of 64 tokens. Symbols of its sizes:
Q keys or queries and V values of all value heads, P the chunks' 64 x 64 matrices, G one number a token and
head, S the state; all in float32, tokens padded to whole chunks.
"""

from __future__ import annotations

from msgspec import Struct

from planner.memory.forward import linear, norm
from planner.memory.mamba import is_mamba2, mamba2
from planner.memory.shapes import Pass
from planner.memory.tape import Tape, Tensor
from profiles.schema import Attention, Linear

CHUNK = 64


def is_followed(spec: Attention) -> bool:
    """Does the tape follow this mixer? Of recurrent ones the gated delta rule and the short convolution
    (within 0.02 % of two measured cells of Lfm2, benchmarks/accuracy): what a Mamba scan or Kimi's delta
    attention holds without their own kernels is 3 to 20 times what `_scan` counts (traced on tiny models)."""
    if spec.kind != "recurrent" or any(_is_delta(item) for item in spec.linears):
        return True
    *inner, last = spec.linears
    return not is_mamba2(spec) and _is_short_convolution(inner, last)


def _is_short_convolution(inner: list[Linear], last: Linear) -> bool:
    return len(inner) == 1 and inner[0].outputs == 3 * last.inputs


def _is_delta(item: Linear) -> bool:
    return item.name.rpartition(".")[2] in ("in_proj_qkv", "in_proj_qkvz")


def recurrent(tape: Tape, p: Pass, x: Tensor, spec: Attention, inner: list[Linear], last: Linear) -> Tensor:
    """Output of a recurrent mixer. `inner`: its linears but the output projection `last`. x: [T, D]."""
    if is_mamba2(spec):
        return mamba2(tape, p, x, spec, inner[0], last)
    if any(_is_delta(item) for item in inner):
        return _gated_delta(tape, p, x, spec, inner, last)
    if _is_short_convolution(inner, last):
        return _short_convolution(tape, p, x, inner[0], last)
    return _scan(tape, p, x, spec, inner, last)


def _short_convolution(tape: Tape, p: Pass, x: Tensor, first: Linear, last: Linear) -> Tensor:
    """models/lfm2/modeling_lfm2.py: B, C, x = in_proj(x); C * conv(B * x), made contiguous for out_proj."""
    n = p.tokens * last.inputs * p.width
    fused = linear(tape, p, x, first)
    before, after, source = (tape.view(fused, n) for _ in range(3))
    product = tape.op((before, source), n, save=(before, source))
    weight = tape.parameter(last.inputs * p.width, p.full)
    convolved = tape.op((product, weight), n, save=(product,))
    gated = tape.op((after, convolved), n, save=(after, convolved))
    contiguous = tape.op((gated,), n)
    tape.free(gated)
    out = linear(tape, p, contiguous, last)
    tape.free(fused, before, after, source, product, convolved, contiguous)
    return out


def _scan(tape: Tape, p: Pass, x: Tensor, spec: Attention, inner: list[Linear], last: Linear) -> Tensor:
    """Projections, a short convolution, and a chunked scan that keeps about four float32 copies of the
    convolved channels."""
    state = spec.state
    mixed = [linear(tape, p, x, item) for item in inner]
    width = state.conv_dim if state else spec.heads * spec.head_dim
    convolved = tape.op(
        tuple(mixed), p.tokens * width * p.width, save=tuple(mixed), temp=p.tokens * width * 4
    )
    tape.free(*mixed)
    scanned = tape.op(
        (convolved,),
        p.tokens * width * 4,
        save=(convolved,),
        temp=3 * p.tokens * width * 4,
        save_out=True,
        width=4,
    )
    tape.free(convolved)
    narrow = tape.op((scanned,), p.tokens * last.inputs * p.width, width=p.width)
    tape.free(scanned)
    out = linear(tape, p, narrow, last)
    tape.free(narrow)
    return out


# --------------------------------------------------------------------------- gated delta rule


class _Sizes(Struct, frozen=True):
    q: int
    v: int
    p: int
    g: int
    s: int
    chunks: int
    """Chunks of one sequence."""


def _sizes(p: Pass, spec: Attention) -> _Sizes:
    chunks = -(-p.seq // CHUNK)
    rows = 4 * p.batch * chunks * CHUNK * spec.heads
    state = 4 * p.batch * spec.heads * spec.head_dim * spec.value_dim
    return _Sizes(rows * spec.head_dim, rows * spec.value_dim, rows * CHUNK, rows, state, chunks)


def _gated_delta(
    tape: Tape, p: Pass, x: Tensor, spec: Attention, inner: list[Linear], last: Linear
) -> Tensor:
    mixed, z, gates, held = _projected(tape, p, x, spec, inner)
    convolved = tape.op((mixed,), mixed.bytes, save=(mixed,))
    tape.free(mixed)
    active = tape.op((convolved,), convolved.bytes, save=(convolved,))
    tape.free(convolved)
    beta = tape.op((gates,), p.tokens * spec.heads * p.width, save_out=True)
    raised = tape.op((gates,), p.tokens * spec.heads * 4)  # a in float32, plus its bias
    decay = tape.op((raised,), p.tokens * spec.heads * 4, save=(raised,))
    tape.free(raised)
    if p.seq == 1 and not p.train:  # one step of the recurrence: the state, its decayed copy, the update
        tape.touch(3 * _sizes(p, spec).s)
        core = tape.op((active,), p.tokens * spec.heads * spec.value_dim * p.width, width=p.width)
    else:
        core = _chunked(tape, p, active, beta, decay, spec)
    tape.free(active, beta, decay)
    gated = _gated_norm(tape, p, core, z, spec)
    tape.free(core, z, gates)
    out = linear(tape, p, gated, last)
    tape.free(gated, held)
    return out


def _projected(
    tape: Tape, p: Pass, x: Tensor, spec: Attention, inner: list[Linear]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What is convolved, the output gate, the two gates of a head together, and what stays named besides."""
    by_name = {item.name.rpartition(".")[2]: item for item in inner}
    value = p.tokens * spec.heads * spec.value_dim * p.width
    if "in_proj_qkvz" in by_name:  # grouped by key head: every part is copied out, then put together
        all_ = linear(tape, p, x, by_name["in_proj_qkvz"])
        gates = linear(tape, p, x, by_name["in_proj_ba"])
        z = tape.op((all_,), value)
        parts = tape.op((all_,), all_.bytes - value)
        mixed = tape.op((parts,), all_.bytes - value)
        tape.free(parts)
        return mixed, z, gates, all_
    mixed = linear(tape, p, x, by_name["in_proj_qkv"])
    z = linear(tape, p, x, by_name["in_proj_z"])
    b, a = (linear(tape, p, x, by_name[name]) for name in ("in_proj_b", "in_proj_a"))
    gates = tape.add(b, a, b.bytes)
    tape.free(b, a)
    return mixed, z, gates, None


def _chunked(tape: Tape, p: Pass, active: Tensor, beta: Tensor, decay: Tensor, spec: Attention) -> Tensor:
    n = _sizes(p, spec)
    query, key = (_unit(tape, p, active, spec, n) for _ in range(2))
    value = tape.op((active,), n.v)
    scaled = tape.op((query,), n.q)
    tape.free(query)
    query, key, value = _padded(tape, (scaled, key, value))
    wide_beta = tape.op((beta,), n.g)
    v_beta = tape.op((value, wide_beta), n.v, save=(value, wide_beta))
    k_beta = tape.op((key, wide_beta), n.q, save=(key, wide_beta))
    pairwise = tape.op((decay,), n.p, temp=n.p, save_out=True)
    system = _attended(tape, p, k_beta, key, pairwise, n)
    intra = _attended(tape, p, query, key, pairwise, n)
    grown = tape.op((decay,), n.g, save_out=True)
    decayed = tape.op((k_beta, grown), n.q, save=(k_beta, grown))
    new_values = tape.op((system, v_beta), n.v, save=(system,), save_out=True)
    cumulative = tape.op((system, decayed), n.q, save=(system,), save_out=True)
    read, written = (tape.op((item, grown), n.q, save=(item, grown)) for item in (query, key))
    tape.free(query, key)
    core = _over_chunks(tape, p, (new_values, cumulative, read, written, intra), n)
    tape.free(value, k_beta, v_beta, wide_beta, pairwise, system, decayed, grown)
    tape.free(new_values, cumulative, read, written, intra)
    out = tape.op((core,), p.tokens * spec.heads * spec.value_dim * p.width, width=p.width)
    tape.free(core)
    return out


def _unit(tape: Tape, p: Pass, active: Tensor, spec: Attention, n: _Sizes) -> Tensor:
    """Queries or keys of every value head in float32, brought to unit length."""
    wide = tape.op((active,), n.q, temp=p.tokens * spec.heads * spec.head_dim * p.width)
    inverse = tape.op((wide,), n.g, save=(wide,), temp=n.q, back_temp=n.q, save_out=True)
    out = tape.op((wide, inverse), n.q, save=(wide, inverse), back_temp=n.q)
    tape.free(wide, inverse)
    return out


def _padded(tape: Tape, items: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Copies padded to whole chunks; all are made before the first original goes."""
    out = tuple(tape.op((item,), item.bytes) for item in items)
    tape.free(*items)
    return out


def _attended(tape: Tape, p: Pass, rows: Tensor, key: Tensor, pairwise: Tensor, n: _Sizes) -> Tensor:
    """(rows key^T) times the pairwise decays; autocast multiplies 16-bit copies."""
    if not p.autocast:
        product = tape.op((rows, key), n.p, save=(rows, key))
    else:
        a, b = (tape.op((item,), n.q * p.width // 4) for item in (rows, key))
        product = tape.op((a, b), n.p * p.width // 4, save=(a, b))
        tape.free(a, b)
    out = tape.op((product, pairwise), n.p, save=(product, pairwise))
    tape.free(product)
    return out


def _over_chunks(tape: Tape, p: Pass, items: tuple[Tensor, ...], n: _Sizes) -> Tensor:
    """The sequential scan. Each chunk keeps 16-bit copies of its slices and of the state it read twice, and
    the state it left; in backward each slice's gradient is a zero-padded tensor of full size."""
    copies = (3 * n.q + 2 * n.v + n.p) * p.width // 4 if p.autocast else 0
    states = n.chunks * n.s * (2 if p.autocast else 1)
    kept = tape.new(copies + states if tape.recording and items[0].needs_grad else n.s)
    save = (kept,) if p.autocast else (kept, *items)
    scanned = tape.op(items, n.v, save=save, back_temp=n.v + 2 * max(n.p, n.q, n.v))
    tape.free(kept)
    # the last chunk's new values and what it read from the state stay named
    named = None if tape.recording else tape.new(2 * n.v // n.chunks)
    core = tape.op((scanned,), n.v)  # the result is in another layout than what follows
    tape.free(scanned, named)
    return core


def _gated_norm(tape: Tape, p: Pass, core: Tensor, z: Tensor, spec: Attention) -> Tensor:
    """RMSNorm over a head's values, times silu of the gate in float32."""
    wide = 4 * p.tokens * spec.heads * spec.value_dim
    normed = norm(tape, p, core, spec.norms[0], p.tokens * spec.heads) if spec.norms else tape.hold(core)
    gate = tape.op((z,), wide)
    active = tape.op((gate,), wide, save=(gate,))
    tape.free(gate)
    product = tape.op((normed, active), wide, save=(normed, active))
    tape.free(normed, active)
    out = tape.op((product,), core.bytes, width=core.width)
    tape.free(product)
    return out
