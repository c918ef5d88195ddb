"""The KV cache as transformers really keeps it (`cache_utils.py`).

Dynamic: every layer grows by concatenation, so one layer's old and new copies meet during decode; a
sliding layer is cut to its window only when the first decoded token replaces the prefill's storage.
Latent attention (DeepSeek) caches its compressed latent and the rotated part. Recurrent layers keep a
constant state. Layers that share another layer's keys own none.
"""

from __future__ import annotations

from msgspec import Struct

from planner.memory.tape import rounded
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
    if spec.kind == "recurrent" and spec.state is not None:
        state = rounded(batch * spec.state.state_elements * (4 if spec.state.state_float32 else width))
        return state + rounded(batch * spec.state.conv_dim * spec.state.conv_kernel * width)
    return sum(rounded(batch * tokens * elements * width) for elements in token_elements(spec))


def kept_tokens(spec: Attention, tokens: int, sliced: bool) -> int:
    """Tokens a layer's storage holds. `sliced`: the window is only a view of the full prefill storage."""
    if spec.window is None or sliced:
        return tokens
    return min(tokens, spec.window)


def cache_bytes(
    arch: Architecture, batch: int, prompt: int, tokens: int, width: int, cache: Cache = "dynamic"
) -> CacheBytes:
    """The cache of `batch` sequences after `prompt` tokens and at the end of `tokens` tokens.

    static: allocated whole before prefill. offloaded: the layer in use and the next one on the card, all
    of it in RAM (`offload_only_non_sliding=False`). quantized: 4 bits and two 16-bit numbers per 64
    elements in layers without a window; the last 128 tokens stay as they are
    (`executor.quantized_cache`, KIVI, arXiv:2402.02750).
    """
    whole = [_layer(layer.attention, batch, tokens, width, sliced=False) for layer in arch.kinds]
    final, largest = sum(whole[kind] for kind in arch.order), max(whole, default=0)
    if cache == "static":
        return CacheBytes(final, final, 0)
    if cache == "offloaded":
        return CacheBytes(min(final, 2 * largest), min(final, 2 * largest), largest, final)
    if cache == "quantized":
        packed = [_packed_layer(layer.attention, batch, tokens, width) for layer in arch.kinds]
        kept = sum(packed[kind] for kind in arch.order)
        return CacheBytes(kept, kept, 2 * largest)
    full = [_layer(layer.attention, batch, prompt, width, sliced=True) for layer in arch.kinds]
    return CacheBytes(sum(full[kind] for kind in arch.order), final, largest)


def _layer(spec: Attention, batch: int, tokens: int, width: int, sliced: bool) -> int:
    return layer_kv_bytes(spec, batch, kept_tokens(spec, tokens, sliced), width)


def _packed_layer(spec: Attention, batch: int, tokens: int, width: int) -> int:
    if spec.window is not None or spec.kind == "recurrent":
        return _layer(spec, batch, tokens, width, sliced=False)
    recent = _layer(spec, batch, min(tokens, 128), width, sliced=False)
    elements = (_layer(spec, batch, tokens, width, sliced=False) - recent) // width
    return recent + rounded(elements // 2) + rounded(elements // 64 * 4)
