"""Token mixers on the tape: self-attention by kernel, latent attention, recurrent layers.

sdpa follows transformers' `integrations/sdpa_attention.py`: no mask and causal goes to torch's flash
kernel with grouped heads; a mask that is really there (padding, a window shorter than the sequence)
repeats keys and values and goes to the memory-efficient kernel. eager is `eager_attention_forward` of
`models/llama/modeling_llama.py`.
"""

from __future__ import annotations

from msgspec.structs import replace

from planner.memory.forward import Pass, adapted, linear, norm, normed
from planner.memory.kvcache import remember
from planner.memory.mamba import mamba2
from planner.memory.recurrent import recurrent
from planner.memory.tape import Tape, Tensor, rounded
from profiles.schema import Architecture, Attention, Linear


def attention(tape: Tape, p: Pass, x: Tensor, spec: Attention) -> Tensor | None:
    """Output of the mixer, [T, D]; None where the layer has none. x: [T, D], still held by the caller.

    What a pass leaves in the KV cache stays on the tape.
    """
    if spec.kind == "none":
        return None
    if spec.kind == "recurrent":
        return recurrent(tape, p, x, spec, _inner(spec), output_projection(spec))
    if beside := [item for item in spec.linears if item.name.startswith("mamba.")]:
        return _beside_mamba(tape, p, x, spec, beside)
    if spec.kind == "latent":
        return _latent(tape, p, x, spec)
    q, k, v, gate = _qkv(tape, p, x, spec)
    out = _core(tape, p, spec, q, k, v)
    if gate is not None:
        gated = tape.op((out, gate), out.bytes, save=(out, gate))
        tape.free(out, gate)
        out = gated
    result = linear(tape, p, out, output_projection(spec))
    tape.free(out)
    return result


def _beside_mamba(tape: Tape, p: Pass, x: Tensor, spec: Attention, beside: list[Linear]) -> Tensor:
    """Falcon H1: a state-space mixer and attention read the same input; both are scaled and added up."""
    plain = replace(spec, linears=tuple(item for item in spec.linears if item not in beside))
    scanned = mamba2(tape, p, x, spec, beside[0], beside[-1])
    scaled = tape.op((scanned,), scanned.bytes)
    tape.free(scanned)
    mixed = attention(tape, p, x, plain)
    assert mixed is not None
    out = tape.add(scaled, mixed)
    tape.free(scaled, mixed)
    return out


def output_projection(spec: Attention) -> Linear:
    """The linear that leaves the mixer: by its usual names, else the last one."""
    for item in reversed(spec.linears):
        if item.name.rsplit(".", 1)[-1] in ("o_proj", "out_proj", "dense", "c_proj", "wo", "o"):
            return item
    return spec.linears[-1]


def _inner(spec: Attention) -> list[Linear]:
    last = output_projection(spec)
    return [item for item in spec.linears if item is not last]


def _qkv(tape: Tape, p: Pass, x: Tensor, spec: Attention) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    heads, kv, e = spec.heads, spec.kv_heads or spec.heads, spec.head_dim
    named = {item.name.rsplit(".", 1)[-1]: item for item in reversed(_inner(spec))}
    gates = [item for name, item in named.items() if name in GATES]
    projections = [item for item in _inner(spec) if item not in gates][:3]
    gate = linear(tape, p, x, gates[0]) if gates else None
    if "q_a_proj" in named:  # low-rank queries over one shared key/value head (DeepSeek-V4)
        low = linear(tape, p, x, named["q_a_proj"])
        q = linear(tape, p, low, named["q_b_proj"])
        tape.free(low)
        k = linear(tape, p, x, named["kv_proj"])
        v = tape.hold(k)
    elif len(projections) == 1 and projections[0].outputs > heads * e:
        fused = linear(tape, p, x, projections[0])  # query, key and value: views of one storage
        q, k, v = _split(tape, fused, (heads * e, kv * e, kv * (spec.value_dim or e)))
        q, k = _head_norm(tape, p, q, spec, "q", heads), _head_norm(tape, p, k, spec, "k", kv)
    else:
        q = linear(tape, p, x, projections[0])
        if projections[0].outputs >= 2 * heads * e:  # query and output gate in one linear
            q, gate = _split(tape, q, (heads * e, projections[0].outputs - heads * e))
        q = _head_norm(tape, p, q, spec, "q", heads)
        # Layers that share keys and values have no projection of their own and read an earlier layer's.
        k = linear(tape, p, x, projections[1]) if len(projections) > 1 else tape.view(x, 0)
        k = _head_norm(tape, p, k, spec, "k", kv) if len(projections) > 1 else k
        v = linear(tape, p, x, projections[2]) if len(projections) > 2 else tape.hold(k)
    if spec.rope:
        q, k = rope(tape, p, q, k, e)
    return q, k, v, gate


GATES = ("g_proj", "gate_proj", "output_gate")
"""Names of linears that gate attention's output elementwise."""


def _split(tape: Tape, fused: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Views of one fused projection, which stays alive as long as any of them."""
    total = sum(sizes)
    parts = tuple(tape.view(fused, fused.bytes * size // total) for size in sizes)
    tape.free(fused)
    return parts


def _head_norm(tape: Tape, p: Pass, x: Tensor, spec: Attention, which: str, heads: int) -> Tensor:
    """q_norm / k_norm where the architecture has them: per head, or over all heads (OLMo 2)."""
    for item in spec.norms:
        if item.name.split(".")[-1].startswith(which):
            rows = p.tokens * max(1, heads * spec.head_dim // item.size)
            out = norm(tape, p if p.liger_head_norms else replace(p, liger=False), x, item, rows)
            tape.free(x)
            return out
    return x


def rope(tape: Tape, p: Pass, q: Tensor, k: Tensor, features: int) -> tuple[Tensor, Tensor]:
    """apply_rotary_pos_emb: three copies in flight for each of q and k; the inputs stay bound until it
    returns. `features`: of a head."""
    if p.liger:  # rotates in place (liger_kernel/ops/rope.py)
        return q, k
    if p.rope_by_term:
        tables = tape.new(2 * 4 * p.seq * features)  # every entry of cos and sin twice
        rotated_by_term = _rope_by_term(tape, q, k)
        tape.free(tables)
        return rotated_by_term
    wide = tuple(tape.cast(x, 4) if p.float32_rope else tape.hold(x) for x in (q, k))
    rotated = []
    for x in wide:
        cos = tape.op((x,), x.bytes)
        half = tape.op((x,), x.bytes, temp=x.bytes // 2)
        sin = tape.op((half,), x.bytes)
        tape.free(half)
        rotated.append(tape.add(cos, sin))
        tape.free(cos, sin)
    narrow = [tape.cast(x, item.width) for x, item in zip(rotated, (q, k), strict=True)]
    tape.free(*wide, *rotated, q, k)
    return narrow[0], narrow[1]


def _rope_by_term(tape: Tape, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """models/ernie4_5/modeling_ernie4_5.py: q.float() * cos + rotate_half(q).float() * sin, cast back at the
    end."""
    sums = []
    for x in (q, k):
        terms = []
        for turned in (False, True):
            source = tape.op((x,), x.bytes, temp=x.bytes // 2) if turned else tape.hold(x)
            raised = tape.cast(source, 4)
            tape.free(source)
            terms.append(tape.op((raised,), raised.bytes))
            tape.free(raised)
        sums.append(tape.add(terms[0], terms[1]))
        tape.free(*terms)
    narrow = [tape.cast(x, item.width) for x, item in zip(sums, (q, k), strict=True)]
    tape.free(*sums, q, k)
    return narrow[0], narrow[1]


def uses_mask(p: Pass, spec: Attention) -> bool:
    """Is a [B, 1, S, S] mask really built and applied?"""
    if p.attention == "eager":
        return True
    if p.attention == "flash_attention_2":
        return False
    beyond = spec.window is not None and p.seq + p.past >= spec.window
    return p.masked or (beyond and p.seq > 1)


def mask_bytes(arch: Architecture, p: Pass) -> int:
    """Attention masks of one pass: [B, 1, S, S], bool for sdpa, in the compute dtype for eager; one a
    kind of layer."""
    kinds = {layer.attention.window: layer.attention for layer in arch.kinds if layer.attention.heads}
    element = p.width if p.attention == "eager" else 1
    one = rounded(p.batch * p.seq * (p.seq + p.past) * element)
    return one * sum(uses_mask(p, spec) for spec in kinds.values())


def input_bytes(arch: Architecture, p: Pass, tokens: int) -> int:
    """Token ids, labels, positions and mask (int64, B x `tokens` each), the cos and sin tables of rotary
    embeddings, attention masks."""
    turned = {
        layer.attention.window: layer.attention.head_dim for layer in arch.kinds if layer.attention.rope
    }
    rope = sorted(turned.values(), reverse=True)[: None if p.rope_by_kind else 1]
    width = 4 if p.rope_by_term else p.width  # those that rotate in float32 keep float32 tables
    tables = sum(2 * rounded(p.seq * features * width) for features in rope)
    return 4 * rounded(p.batch * tokens * 8) + tables + mask_bytes(arch, p) + _per_layer_bytes(arch, p)


def _per_layer_bytes(arch: Architecture, p: Pass) -> int:
    """What Gemma 3n and 4 embed for every layer at once, and for a model with towers, whose outer frame names
    it, also as it came from the table (models/gemma4/modeling_gemma4.py, project_per_layer_inputs)."""
    columns = sum(item.shape[1] for item in arch.embeddings if "per_layer" in item.name)
    return rounded(p.tokens * columns * p.width) * (2 if arch.towers else 1)


def _core(tape: Tape, p: Pass, spec: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T) v. Frees q, k and v; what a cache keeps stays."""
    stays = False
    if p.cache:
        k, v, stays = remember(tape, p, spec, k, v)
    if p.autocast and p.attention != "eager":  # autocast hands the kernel 16-bit copies
        q, k, v = (_narrow(tape, p, t) for t in (q, k, v))
    out = _eager(tape, p, spec, q, k, v) if p.attention == "eager" else _fused(tape, p, spec, q, k, v)
    tape.free(q)
    if not stays:
        tape.free(k, v)
    return out


def _narrow(tape: Tape, p: Pass, x: Tensor) -> Tensor:
    out = tape.cast(x, p.width)
    tape.free(x)
    return out


def _fused(tape: Tape, p: Pass, spec: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads, kv = spec.heads, spec.kv_heads or spec.heads
    if p.ungrouped and heads != kv and p.attention == "sdpa":
        return _plain(tape, p, spec, q, k, v)
    value = spec.value_dim or spec.head_dim
    out_bytes = p.tokens * heads * value * p.width
    statistics = tape.new(p.tokens * heads * 4)
    groups = heads // max(kv, 1)
    masked = uses_mask(p, spec)
    repeated: list[Tensor] = []
    keys, values = k, v
    if groups > 1 and (masked or spec.head_dim > 256 or value != spec.head_dim):
        keys = tape.op((k,), k.bytes * groups)
        values = tape.op((v,), v.bytes * groups)
        repeated = [keys, values]
    # flash backward: dq accumulated in float32, and dk, dv of every query head before the groups are summed
    back = p.tokens * heads * (spec.head_dim * 4 + 4)
    if groups > 1 and not repeated:
        back += p.tokens * heads * (spec.head_dim + value) * p.width
    # the memory-efficient kernel takes the mask as numbers in the compute dtype
    bias = tape.new(p.batch * p.seq * (p.seq + p.past) * p.width) if masked else None
    keep = (q, keys, values, statistics) if bias is None else (q, keys, values, statistics, bias)
    out = tape.op((q, keys, values), out_bytes, save=keep, back_temp=back, save_out=True)
    tape.free(statistics, bias, *repeated)
    if p.concatenated_rope and p.seq > 1:
        contiguous = tape.op((out,), out_bytes)
        tape.free(out)
        out = contiguous
    return out


def _plain(tape: Tape, p: Pass, spec: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's attention without a fused kernel, in float32 (aten/native/transformers/attention.cpp,
    `_scaled_dot_product_attention_math`); its softmax looks for rows that are masked as a whole."""
    span = p.seq + p.past
    scores = p.batch * spec.heads * p.seq * span * 4
    wide = [tape.cast(x, 4) for x in (q, k, v)]
    scaled = [tape.op((x,), x.bytes) for x in wide[:2]]
    mask = tape.new(p.seq * span * 4) if p.seq > 1 else None
    product = tape.op(scaled, scores, save=scaled)
    soft = tape.op((product,), scores, save_out=True, back_temp=scores)
    tape.touch(scores // 4)
    tape.free(product, mask)
    values = wide[2]
    answer = tape.op(
        (soft, values), p.tokens * spec.heads * (spec.value_dim or spec.head_dim) * 4, save=(soft, values)
    )
    out = tape.cast(answer, p.width)
    tape.touch(scores * p.width // 4)  # the weights too are cast back
    tape.free(soft, answer, *wide, *scaled)
    return out


def _eager(tape: Tape, p: Pass, spec: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    heads, kv = spec.heads, spec.kv_heads or spec.heads
    span = p.seq + p.past
    scores = p.batch * heads * p.seq * span
    width = p.width
    groups = heads // max(kv, 1)
    keys = tape.op((k,), k.bytes * groups) if groups > 1 else tape.hold(k)
    values = tape.op((v,), v.bytes * groups) if groups > 1 else tape.hold(v)
    narrow = tuple(tape.cast(item, width) if p.autocast else tape.hold(item) for item in (q, keys))
    # matmul folds batch and heads into one dimension: a copy, unless repeating has made one
    folds = p.batch > 1 and not p.train
    copies = [tape.new(item.bytes) for item in narrow[: 2 if groups == 1 else 1]] if folds else []
    product = tape.op(narrow, scores * width, save=narrow)
    tape.free(*copies, *narrow)
    # models/bloom/modeling_bloom.py: the products stay by their name, and so do the weights that the layer
    # before has returned, until this one returns its own
    kept = [tape.hold(product), tape.new(scores * width)] if p.eager == "returned" and not p.train else []
    weights = tape.op((product,), scores * width)  # * scaling
    tape.free(product)
    if spec.softcap:
        divided = tape.op((weights,), scores * width)
        tape.free(weights)
        bounded = tape.op((divided,), scores * width, save_out=True)
        tape.free(divided)
        weights = tape.op((bounded,), scores * width)
        tape.free(bounded)
    masked = tape.op((weights,), scores * width)
    tape.free(weights)
    if p.eager == "shifted":
        return _shifted(tape, p, spec, masked, keys, values)
    share = _share_of_sink(tape, p, masked, p.tokens * heads) if p.eager == "rescaled" else None
    # softmax(dtype=float32) converts bfloat16 first (ATen/native/SoftMax.cpp)
    wide = tape.cast(masked, 4)
    # its backward begins with grad * output (the same file)
    soft = tape.op((wide,), scores * 4, save_out=True, back_temp=scores * 4)
    tape.free(wide)
    answered = tape.cast(soft, q.width)  # .to(query.dtype)
    tape.free(masked, soft)
    out_bytes = p.tokens * heads * (spec.value_dim or spec.head_dim) * width
    factors = tuple(tape.cast(item, width) if p.autocast else tape.hold(item) for item in (answered, values))
    folded = tape.new(values.bytes) if folds and groups == 1 else None
    out = tape.op(factors, out_bytes, save=factors)
    tape.free(folded, *factors)
    if share is not None:
        scaled = tape.op((out, share), out_bytes, save=(out, share))
        tape.free(out, share)
        out = scaled
    contiguous = tape.op((out,), out_bytes)
    tape.named.append(answered)  # eager attention returns its weights
    tape.free(out, keys, values, *kept)
    return contiguous


def _share_of_sink(tape: Tape, p: Pass, scores: Tensor, rows: int) -> Tensor:
    """sigmoid(logsumexp(scores) - sink), which autocast works out of a float32 copy that stays."""
    wide = tape.cast(scores, 4) if p.autocast else tape.hold(scores)
    # backward: the scores less their sum, its exponential, times the gradient
    total = tape.op((wide,), rows * wide.width, save=(wide,), back_temp=2 * wide.bytes, save_out=True)
    tape.free(wide)
    share = tape.op((total,), rows * p.width, save_out=True, width=p.width)
    tape.free(total)
    return share


def _shifted(tape: Tape, p: Pass, spec: Attention, masked: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """models/gpt_oss/modeling_gpt_oss.py: a column more for the sink where there is one, less the maximum,
    softmax in the dtype it has."""
    n, combined = masked.bytes, masked
    if any(item.name.endswith("sinks") for item in spec.parameters):
        n += p.tokens * spec.heads * masked.width
        combined = tape.op((masked,), n)
        tape.free(masked)
    shifted = tape.op((combined,), n)
    tape.free(combined)
    soft = tape.op((shifted,), n, save_out=True, back_temp=n)
    tape.free(shifted)
    out_bytes = p.tokens * spec.heads * (spec.value_dim or spec.head_dim) * p.width
    out = tape.op((soft, values), out_bytes, save=(soft, values), width=p.width)
    contiguous = tape.op((out,), out_bytes)
    tape.named.append(soft)
    tape.free(out, keys, values)
    return contiguous


def _latent(tape: Tape, p: Pass, x: Tensor, spec: Attention) -> Tensor:
    """DeepSeek's low-rank attention: what is cached is compressed, and decompressed to full heads in every
    pass over the whole context. All names live until the layer's attention returns."""
    assert spec.latent is not None
    by_name = {item.name.split(".")[-1]: item for item in spec.linears}
    norms = {item.name.split(".")[-1]: item for item in spec.norms}
    if "q_a_proj" in by_name:
        low = linear(tape, p, x, by_name["q_a_proj"])
        low = normed(tape, p, low, norms.get("q_a_layernorm"))
        q = linear(tape, p, low, by_name["q_b_proj"])
        tape.free(low)
    else:
        q = linear(tape, p, x, next(item for name, item in by_name.items() if name.startswith("q")))
    compressed = linear(tape, p, x, by_name["kv_a_proj_with_mqa"])
    spec_norm = norms.get("kv_a_layernorm")
    nope = norm(tape, p, compressed, spec_norm, p.tokens) if spec_norm else tape.hold(compressed)
    rotated = p.tokens * spec.latent.rope_dim * q.width
    q_rope = tape.op((q,), rotated * spec.heads, temp=rotated * spec.heads)
    k_rope = tape.op((compressed,), rotated, temp=rotated)
    stays = False
    if p.cache:
        nope, k_rope, stays = remember(tape, p, spec, nope, k_rope)
    query = tape.op((q, q_rope), p.tokens * spec.heads * q.width * spec.head_dim)
    whole = replace(p, seq=p.seq + p.past, past=0)
    kv = linear(tape, whole, nope, by_name["kv_b_proj"])
    context = whole.tokens * spec.heads * q.width
    key = tape.op((kv, k_rope), context * spec.head_dim)
    value = tape.view(kv, context * spec.value_dim)
    held = [q, compressed, q_rope, kv, *([] if stays else [nope, k_rope])]
    # the flash kernel, which wants heads of one size, answers in the layout of the queries: a copy follows
    plain = replace(p, concatenated_rope=spec.value_dim == spec.head_dim, cache="")
    out = _core(tape, plain, spec, query, key, value)
    result = linear(tape, p, out, output_projection(spec))
    tape.free(out, *held)
    return result


__all__ = ["adapted", "attention", "rope", "uses_mask"]
