"""The KV cache as transformers really keeps it (`cache_utils.py`).

Dynamic: every layer grows by concatenation, its keys before its values, so an old and a new tensor meet in
decode; a sliding layer is cut to its window only when the first decoded token replaces the prefill's storage.
Latent attention (DeepSeek) caches its compressed latent and the rotated part. Recurrent layers keep a
constant state. Layers that share another layer's keys own none. Packed layers: `executor.quantized_cache`.
"""

from __future__ import annotations

from msgspec import Struct

from planner.memory.shapes import Pass
from planner.memory.tape import Tape, Tensor, rounded
from planner.types import Cache
from profiles.schema import Architecture, Attention


class CacheBytes(Struct, frozen=True):
    """Where a cache is at its largest: on the card after prefill and after the last token, and in RAM."""

    prefill: int
    final: int
    growth: int
    """What one step adds for a moment: a layer's copy when it grows, or its dequantized form."""
    host: int = 0


def token_elements(spec: Attention) -> tuple[int, ...]:
    """Elements kept for one token in each cached tensor of a layer; none where it owns no growing cache.

    >>> token_elements(Attention(kind="full", heads=28, kv_heads=4, head_dim=128, value_dim=128))
    (512, 512)
    """
    if spec.kind in ("none", "recurrent") or spec.shares_kv:
        return ()
    if spec.latent is not None:  # the compressed latent and the rotated part, one head each
        return spec.latent.kv_rank, spec.latent.rope_dim
    heads = spec.kv_heads or spec.heads
    return heads * spec.head_dim, heads * (spec.value_dim or spec.head_dim)


def layer_kv_bytes(spec: Attention, batch: int, tokens: int, width: int) -> int:
    """Keys and values of one layer: 2 x B x K x tokens x E x width for plain grouped-query attention.

    >>> layer_kv_bytes(Attention(kind="full", heads=28, kv_heads=4, head_dim=128, value_dim=128), 1, 2048, 2)
    4194304
    """
    state = 0
    if spec.state is not None:
        state = rounded(batch * spec.state.state_elements * (4 if spec.state.state_float32 else width))
        state += rounded(batch * spec.state.conv_dim * spec.state.conv_kernel * width)
    return state + sum(rounded(batch * tokens * elements * width) for elements in token_elements(spec))


def kept_tokens(spec: Attention, tokens: int, sliced: bool) -> int:
    """Tokens a layer's storage holds. `sliced`: the window is only a view of the full prefill storage."""
    if spec.window is None or sliced:
        return tokens
    return min(tokens, spec.window)


def cache_bytes(
    arch: Architecture, batch: int, prompt: int, tokens: int, width: int, cache: Cache = "dynamic"
) -> CacheBytes:
    """The cache of `batch` sequences after `prompt` tokens and at the end of `tokens` tokens.

    static: allocated whole before prefill. offloaded: in decode the layer in use and the next one on the
    card, after prefill the first one, fetched back for decode; all of it in RAM
    (`offload_only_non_sliding=False`). quantized: see `filled_bytes`.
    """
    specs = [layer.attention for layer in arch.kinds]
    grown = max((growth_bytes(spec, batch, tokens, width, cache) for spec in specs), default=0)
    whole = [_layer(spec, batch, tokens, width, sliced=False) for spec in specs]
    final = sum(whole[kind] for kind in arch.order)
    if cache == "static":
        return CacheBytes(final, final, grown)
    if cache == "offloaded":
        away = [n for n, spec in zip(whole, specs, strict=True) if spec.kind != "recurrent"]
        stays = sum(whole[kind] for kind in arch.order if specs[kind].kind == "recurrent")
        one, two = (min(final, stays + n * max(away, default=0)) for n in (1, 2))
        copies = [_pinned(spec, batch, prompt, tokens, width) for spec in specs]
        return CacheBytes(one, two, grown, sum(copies[kind] for kind in arch.order))
    full = [filled_bytes(spec, batch, prompt, width, cache) for spec in specs]
    if cache == "quantized":
        whole = [_packed(spec, batch, prompt, tokens, width) for spec in specs]
        final = sum(whole[kind] for kind in arch.order)
    return CacheBytes(sum(full[kind] for kind in arch.order), final, grown)


def _pinned(spec: Attention, batch: int, prompt: int, tokens: int, width: int) -> int:
    """RAM behind one layer of an offloaded cache: `.to("cpu", non_blocking=True)` pins it, and torch's pinned
    allocator takes powers of two and keeps what is freed (ATen/core/CachingHostAllocator.h). So the sizes
    that a tensor has had, from the prompt to the last token, stand side by side."""
    total = 0
    for elements in token_elements(spec):
        sizes = [batch * kept_tokens(spec, n, False) * elements * width for n in (prompt, tokens)]
        first, last = (1 << (n - 1).bit_length() for n in sizes)
        total += first if first == last else 2 * last - first
    return total


def filled_bytes(spec: Attention, batch: int, prompt: int, width: int, cache: str) -> int:
    """What one layer of a growing cache holds after the prompt, a sliding one all of it.

    quantized: 4 bits and two 16-bit numbers for each group of values in layers without a window; up to 128
    recent tokens stay as they are (`executor.quantized_cache`, KIVI, arXiv:2402.02750).
    """
    if cache == "quantized" and packs(spec):
        return _packed(spec, batch, prompt, prompt, width)
    return _layer(spec, batch, prompt, width, sliced=True)


def growth_bytes(spec: Attention, batch: int, tokens: int, width: int, cache: Cache) -> int:
    """What one layer holds beside its cache while a token is decoded.

    Keys are put together anew before the old ones go, then values; of a window both are there at once. A full
    static window is rolled. A packed layer is unpacked: all keys, then values through 8-bit levels and
    two factors in the compute dtype.
    """
    parts = [batch * kept_tokens(spec, tokens, False) * n for n in token_elements(spec)]
    if spec.window is not None:
        rolled = cache == "static" and tokens <= spec.window
        return 0 if rolled else sum(rounded(n * width) for n in parts)
    if not parts or cache == "static":
        return 0
    if cache == "quantized" and packs(spec):
        return rounded(parts[0] * width) + rounded(parts[-1]) + 2 * rounded(parts[-1] * width)
    return max(rounded(n * width) for n in parts)


def _layer(spec: Attention, batch: int, tokens: int, width: int, sliced: bool) -> int:
    return layer_kv_bytes(spec, batch, kept_tokens(spec, tokens, sliced), width)


# --------------------------------------------------------------------------- packed layers

GROUP = 64
RECENT_TOKENS = 128
"""As in `executor.quantized_cache`, which says what they are."""


def packs(spec: Attention) -> bool:
    """Is a layer's cache one that `executor.quantized_cache` packs? Windows and hybrid layers stay."""
    return spec.window is None and spec.kind not in ("none", "recurrent") and spec.state is None


def group_of(features: int) -> int:
    """Values of a head that share a scale and an offset.

    >>> group_of(128), group_of(96)
    (64, 48)
    """
    return next(n for n in range(min(GROUP, max(features, 1)), 0, -1) if features % n == 0)


def _packed(spec: Attention, batch: int, prompt: int, tokens: int, width: int) -> int:
    if not packs(spec):
        return _layer(spec, batch, tokens, width, sliced=False)
    # a prompt is packed as soon as it is in
    recent = min(tokens - prompt if prompt >= RECENT_TOKENS else tokens, RECENT_TOKENS)
    n = _layer(spec, batch, recent, width, sliced=False)
    old = batch * (tokens - recent)
    for elements, features in zip(token_elements(spec), _features(spec), strict=True):
        n += rounded(old * elements // 2) + 2 * rounded(old * elements // group_of(features) * width)
    return n


def _features(spec: Attention) -> tuple[int, ...]:
    if spec.shares_kv:
        return ()
    if spec.latent is not None:
        return spec.latent.kv_rank, spec.latent.rope_dim
    return spec.head_dim, spec.value_dim or spec.head_dim


# --------------------------------------------------------------------------- on the tape


def remember(tape: Tape, p: Pass, spec: Attention, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Hand a pass's keys and values to the cache: (keys, values, do they stay) as attention then reads them.

    `torch.cat` makes copies of both before the names of the originals are bound anew. A static cache is
    written in place. Packing leaves the originals to attention.
    """
    if p.cache == "static":
        if spec.window is not None and p.seq > spec.window:
            return k, v, False
        tape.free(k, v)
        tape.settle(k, v)
        return _elsewhere(k), _elsewhere(v), False
    if p.cache == "quantized" and packs(spec) and not p.past:
        if p.seq < RECENT_TOKENS:
            return k, v, True
        for x, features in zip((k, v), _features(spec) or (1, 1), strict=True):
            _pack(tape, x, features)
        return k, v, False
    copies = tape.new(k.bytes, width=k.width), tape.new(v.bytes, width=v.width)
    tape.free(k, v)
    return *copies, p.cache != "offloaded"


def _elsewhere(x: Tensor) -> Tensor:
    """A tensor whose bytes are counted with the cache."""
    out = Tensor(x.bytes, width=x.width)
    out.booked = 0
    return out


def _pack(tape: Tape, x: Tensor, features: int) -> None:
    """`executor.quantized_cache.pack`, statement by statement; what it returns stays."""
    n = x.bytes // x.width
    groups = tape.cast(x, 4)
    few = n // group_of(features)
    bounds = [tape.new(few * 4) for _ in range(2)]
    scales = [tape.new(few * x.width) for _ in range(2)]
    tape.free(*bounds)
    shifted = tape.new(4 * n)
    divided = tape.new(4 * n)
    tape.free(shifted)
    levels = tape.new(n)
    tape.free(divided)
    high = tape.new(n // 2)
    tape.new(n // 2)
    tape.free(high, levels, groups)
    del scales  # kept, like the packed numbers
