"""A KV cache in 4 bits: transformers' own needs a package that compiles kernels at first use, this one torch.

As in KIVI (arXiv:2402.02750), recent tokens stay as they are and older ones are kept as 4-bit numbers with a
scale and an offset for each group of values. Here a group is up to 64 neighbouring values of one head and
token, so packed tokens are never touched again. Layers with a sliding window or a recurrent state are small
and stay as transformers makes them.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

GROUP = 64
"""Largest number of values that share a scale and an offset."""
RECENT_TOKENS = 128
"""Tokens that are kept unpacked before they are packed together; as in transformers' quantized cache."""

Packed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Two 4-bit numbers a byte (B, K, T, E/2), then scale and offset of each group (B, K, T, E/group, 1)."""


def quantized_cache(config: Any) -> DynamicCache:
    """A cache whose layers of full attention are quantized."""
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    cache.layers = [QuantizedLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class QuantizedLayer(DynamicLayer):
    """Keys and values of one layer: packed ones, then `keys` and `values`, the recent ones as they came."""

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.packed_keys: Packed | None = None
        self.packed_values: Packed | None = None
        self.tokens = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the states of new tokens, B x K x T x E each; returns those of all tokens."""
        first = not self.is_initialized
        if first:
            self.lazy_initialization(key_states, value_states)
        self.tokens += key_states.shape[-2]
        self.keys = key_states if first else torch.cat([self.keys, key_states], dim=-2)
        self.values = value_states if first else torch.cat([self.values, value_states], dim=-2)
        keys, values = _whole(self.packed_keys, self.keys), _whole(self.packed_values, self.values)
        if self.keys.shape[-2] >= RECENT_TOKENS:
            self.packed_keys = _append(self.packed_keys, pack(self.keys))
            self.packed_values = _append(self.packed_values, pack(self.values))
            self.keys, self.values = self.keys[..., :0, :].clone(), self.values[..., :0, :].clone()
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self.tokens

    def kept(self) -> list[torch.Tensor]:
        """Every tensor the layer holds."""
        own = [self.keys, self.values] if self.is_initialized else []
        return [*own, *(self.packed_keys or ()), *(self.packed_values or ())]


def pack(states: torch.Tensor) -> Packed:
    """States in 4 bits, each group stretched over its own range. States: B x K x T x E, E even."""
    group = next(n for n in range(min(GROUP, states.shape[-1]), 0, -1) if states.shape[-1] % n == 0)
    groups = states.unflatten(-1, (-1, group)).float()
    low, high = groups.aminmax(dim=-1, keepdim=True)
    # the rounded numbers are what unpacking will use, so they are what packing uses too
    scale = ((high - low) / 15).clamp(min=torch.finfo(torch.float32).tiny).to(states.dtype)
    low = low.to(states.dtype)
    levels = ((groups - low.float()) / scale.float().clamp(min=1e-12)).round_().clamp_(0, 15)
    levels = levels.to(torch.uint8).flatten(-2)
    return levels[..., ::2] | (levels[..., 1::2] << 4), scale, low


def unpack(packed: Packed) -> torch.Tensor:
    """The states that `pack` was given, as near as 4 bits come."""
    both, scale, low = packed
    levels = torch.stack((both & 15, both >> 4), dim=-1).flatten(-2)
    return (levels.unflatten(-1, (scale.shape[-2], -1)).to(scale.dtype) * scale + low).flatten(-2)


def _whole(packed: Packed | None, recent: torch.Tensor) -> torch.Tensor:
    return recent if packed is None else torch.cat([unpack(packed), recent], dim=-2)


def _append(old: Packed | None, new: Packed) -> Packed:
    if old is None:
        return new
    keys, scales, lows = (torch.cat(pair, dim=2) for pair in zip(old, new, strict=True))
    return keys, scales, lows
