"""Shapes and numerics of one pass through a model, and the habits of modelling code behind them."""

from __future__ import annotations

from functools import cache

import msgspec
from msgspec import Struct

from profiles.data import read_table


class Pass(Struct, frozen=True, kw_only=True):
    """Shapes and numerics of one forward pass."""

    batch: int
    seq: int
    """Tokens of each sequence in this pass."""
    hidden: int = 0
    """D, the features of the residual stream; set where a layer's pass begins."""
    past: int = 0
    """Tokens already in the KV cache."""
    train: bool = False
    width: int = 2
    """Bytes of an activation in the compute dtype."""
    stream: int = 2
    """Bytes of the residual stream: 4 where frozen norms were upcast to float32."""
    autocast: bool = False
    quant: str = "none"
    full: bool = False
    """Base weights are trained."""
    adapters: bool = False
    attention_only: bool = False
    """LoRA on attention linears only (q, k, v, o)."""
    fused_experts: bool = False
    """Experts are 3-D parameters: LoRA leaves them, and linears called like them, alone."""
    rank: int = 8
    dropout: float = 0.05
    adapter_width: int = 4
    dora: bool = False
    liger: bool = False
    attention: str = "sdpa"
    float32_norm: bool = False
    """RMS norms multiply by their weight before they leave float32 (Gemma, OLMo 2)."""
    concatenated_rope: bool = False
    """Rotated and untouched parts of a head are concatenated: another memory layout for attention."""
    masked: bool = False
    """A padding mask is really there (ragged batches), so sdpa cannot use its causal fast path."""

    @property
    def tokens(self) -> int:
        """T = batch x seq."""
        return self.batch * self.seq


class Numerics(Struct, frozen=True):
    """Habits of transformers' modelling code that no config field tells (tools/read_numerics.py)."""

    transformers: str
    float32_norm: frozenset[str]
    concatenated_rope: frozenset[str]


@cache
def numerics() -> Numerics:
    """The table read from transformers' source."""
    return msgspec.json.decode(read_table("numerics.json"), type=Numerics)
