"""The two mixers of a decoder layer, from the variant of the trait file that applies to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from profiles.errors import BadConfig
from profiles.evaluate import Evaluator, linears, norms, parameters
from profiles.schema import Attention, Experts, FeedForward, LatentAttention, RecurrentState


def choose(scope: Evaluator, variants: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Any]:
    """The first variant whose `when` holds, else the one without `when`.

    Errors: `BadConfig` where none applies.
    """
    fallback = None
    for name, variant in variants.items():
        if "when" not in variant:
            fallback = name
        elif scope.value(variant["when"]):
            return resolve(variants, name)
    if fallback is None:
        raise BadConfig(f"no layer of {scope.facts.model_type} is described for these config fields")
    return resolve(variants, fallback)


def resolve(variants: Mapping[str, Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """A variant with the one it is `as` laid under it (one level of keys, sections merged)."""
    variant = variants[name]
    base = variant.get("as")
    if base is None:
        return variant
    merged = dict(resolve(variants, base))
    for key, value in variant.items():
        if isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            section = {**merged[key], **value}
            merged[key] = {k: v for k, v in section.items() if v is not None}
        else:
            merged[key] = value
    return merged


def build_attention(scope: Evaluator, block: Mapping[str, Any]) -> Attention:
    """The token mixer. Errors: `BadConfig`."""
    heads = scope.value(block.get("heads", 0))
    kv_heads = scope.value(block.get("kv_heads", 0))
    if heads and kv_heads and heads % kv_heads:
        raise BadConfig(f"{heads} attention heads do not divide evenly over {kv_heads} key/value heads")
    head_dim = scope.value(block.get("head_dim", 0))
    if heads and "head_dim" in block:
        scope.size(block["head_dim"])  # heads wider than the stream leave none for each
    latent, state = block.get("latent"), block.get("state")
    return Attention(
        kind=scope.value(block["kind"]),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=scope.value(block.get("value_dim", head_dim)),
        window=scope.optional_size(block.get("window")),
        softcap=bool(scope.value(block.get("softcap", False))),
        rope=bool(scope.value(block.get("rope", True))),
        linears=linears(scope, block.get("linears", {})),
        norms=norms(scope, block.get("norms", {})),
        parameters=parameters(scope, block.get("parameters", {})),
        latent=_latent(scope, latent) if latent else None,
        state=_state(scope, state) if state else None,
        shares_kv=bool(scope.value(block.get("shares_kv", False))),
    )


def _latent(scope: Evaluator, block: Mapping[str, Any]) -> LatentAttention:
    return LatentAttention(
        kv_rank=scope.size(block["kv_rank"]),
        q_rank=scope.optional_size(block.get("q_rank")),
        rope_dim=scope.size(block["rope_dim"]),
        nope_dim=scope.size(block["nope_dim"]),
    )


def _state(scope: Evaluator, block: Mapping[str, Any]) -> RecurrentState:
    return RecurrentState(
        conv_dim=scope.value(block["conv_dim"]),
        conv_kernel=scope.value(block["conv_kernel"]),
        state_elements=scope.value(block["state_elements"]),
        state_float32=bool(scope.value(block.get("float32", True))),
        chunk=scope.value(block.get("chunk", 0)),
    )


def build_feed_forward(scope: Evaluator, block: Mapping[str, Any]) -> FeedForward:
    """The channel mixer. Errors: `BadConfig`."""
    experts = block.get("experts")
    return FeedForward(
        kind=scope.value(block["kind"]),
        activation=scope.value(block.get("activation", "'silu'")),
        intermediate=scope.value(block.get("intermediate", 0)),
        linears=linears(scope, block.get("linears", {})),
        norms=norms(scope, block.get("norms", {})),
        parameters=parameters(scope, block.get("parameters", {})),
        experts=_experts(scope, experts) if experts else None,
    )


def _experts(scope: Evaluator, block: Mapping[str, Any]) -> Experts:
    count, per_token = scope.size(block["count"]), scope.size(block["per_token"])
    if per_token > count:
        raise BadConfig(f"{per_token} experts per token of only {count}")
    router = block.get("router", {})
    return Experts(
        count=count,
        per_token=per_token,
        intermediate=scope.size(block["intermediate"]),
        fused=bool(block.get("fused", True)),
        parameters=parameters(scope, block.get("parameters", {})),
        linears=linears(scope, block.get("linears", {})),
        router=linears(scope, router.get("linears", {})) + parameters(scope, router.get("parameters", {})),
    )
