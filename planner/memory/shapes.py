"""Shapes and numerics of one pass through a model, and the habits of modelling code behind them."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import msgspec
from msgspec import Struct

from planner.types import Cache
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
    cache: Cache | Literal[""] = ""
    """The KV cache that this pass fills; empty for none, as in training."""
    train: bool = False
    width: int = 2
    """Bytes of an activation in the compute dtype."""
    stream: int = 2
    """Bytes of an element of the residual stream where the pass begins: 4 where embeddings were upcast to
    float32, or where an earlier layer answered in float32."""
    upcast: bool = False
    """Frozen weights that are not quantized were upcast to float32."""
    autocast: bool = False
    quant: str = "none"
    full: bool = False
    """Base weights are trained."""
    adapters: bool = False
    attention_only: bool = False
    """LoRA on attention linears only (q, k, v, o)."""
    fused_experts: bool = False
    """Experts are 3-D parameters: LoRA leaves them, and linears called like them, alone."""
    packed_experts: bool = False
    """Experts are quantized: each is dequantized when its rows are multiplied by it."""
    rank: int = 8
    dropout: float = 0.05
    adapter_width: int = 4
    dora: bool = False
    joined: bool = False
    """An adapter is one node of autograd, as engine stream trains it."""
    at_once: bool = False
    """Under checkpointing, a layer is computed again before anything of its backward, as engine stream has
    it."""
    liger: bool = False
    liger_head_norms: bool = False
    """liger's kernels are also in the norms of queries and keys of a model that is there already."""
    attention: str = "sdpa"
    layer_norm: str = "fused"
    """How LayerNorms are written: fused (`nn.LayerNorm`: float32 under autocast), returned (the same, cast
    back), by_hand (Cohere's, operator by operator), lowered (Nemotron's, in 16 bits)."""
    float32_norm: bool = False
    """RMS norms multiply by their weight before they leave float32 (Gemma, OLMo 2)."""
    concatenated_rope: bool = False
    """Rotated and untouched parts of a head are concatenated: another memory layout for attention."""
    float32_rope: bool = False
    """Queries and keys are rotated in float32 (Cohere)."""
    rope_by_term: bool = False
    """Each of the two products of a rotation widens its factor to float32 (Ernie 4.5)."""
    rope_by_kind: bool = False
    """One pair of rotary tables for each kind of layer."""
    ungrouped: bool = False
    """torch's attention gets one key head for many query heads: plain matrix products (Falcon)."""
    keeps_attention: bool = False
    """A layer's frame names attention's output while its feed-forward runs (GPT-2, StableLM)."""
    keeps_normed: bool = False
    """The same for attention's normed input."""
    inline_feed_forward: bool = False
    """The feed-forward is written out in the layer's forward, whose input goes with its first one (OPT)."""
    shared_first: bool = False
    """Shared experts run before the routed ones."""
    eager: str = ""
    """Eager attention less its maximum, in the dtype it has (shifted), or times a sink's share (rescaled), or
    in layers that hand their weights on (returned)."""
    clamped_experts: bool = False
    """Experts clamp gate and up, and spell the activation out (GPT-OSS)."""
    float32_routers: bool = False
    """Experts are handed float32 weights, so that their weighted outputs are float32."""
    embeddings: str = ""
    """What follows the embeddings before the first layer: a product or a sum (moved), a sum with position
    embeddings that stay named, of one sequence (positioned) or of all (placed), a norm (normed)."""
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
    float32_rope: frozenset[str]
    rope_by_term: frozenset[str]
    rope_by_kind: frozenset[str]
    ungrouped: frozenset[str]
    keeps_attention: frozenset[str]
    keeps_normed: frozenset[str]
    inline_feed_forward: frozenset[str]
    shared_first: frozenset[str]
    clamped_experts: frozenset[str]
    shared_code: frozenset[str]
    """Experts run in transformers' common code, which engines replace where they are quantized."""
    routers: dict[str, str]
    layer_norm: dict[str, str]
    embeddings: dict[str, str]
    eager: dict[str, str]


def habits(model_type: str, train: bool) -> dict[str, Any]:
    """What the code of a model_type says of a pass, as fields of `Pass`."""
    facts = numerics()
    routers = facts.routers.get(model_type)
    return {
        "float32_norm": model_type in facts.float32_norm,
        "concatenated_rope": model_type in facts.concatenated_rope,
        "float32_rope": model_type in facts.float32_rope,
        "rope_by_term": model_type in facts.rope_by_term,
        "rope_by_kind": model_type in facts.rope_by_kind,
        "ungrouped": model_type in facts.ungrouped,
        "keeps_attention": model_type in facts.keeps_attention,
        "keeps_normed": model_type in facts.keeps_normed,
        "inline_feed_forward": model_type in facts.inline_feed_forward,
        "clamped_experts": model_type in facts.clamped_experts,
        "shared_first": model_type in facts.shared_first,
        "float32_routers": routers in ("always", "training" if train else "inference"),
        "eager": facts.eager.get(model_type, ""),
        "embeddings": facts.embeddings.get(model_type, ""),
        "layer_norm": facts.layer_norm.get(model_type, "fused"),
        "liger_head_norms": model_type in _with_head_norms(),
    }


@cache
def _with_head_norms() -> frozenset[str]:
    """Model types whose norms of queries and keys liger replaces (its transformers/monkey_patch.py)."""
    return frozenset(msgspec.json.decode(read_table("kernels.json"))["liger"]["head_norms"])


@cache
def numerics() -> Numerics:
    """The table read from transformers' source."""
    return msgspec.json.decode(read_table("numerics.json"), type=Numerics)
