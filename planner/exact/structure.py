"""The `Architecture` of a model nobody wrote a trait file for, read off the modules transformers builds.

Linears, norms, stacked experts and every other tensor are the real ones. Which linears belong to attention is
told by their names; heads and windows come from the config's usual fields. Speed, host RAM and disk are
worked out from this; memory is traced.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from planner.exact.layers import find_layers, survey
from profiles.schema import (
    Architecture,
    Attention,
    Experts,
    FeedForward,
    Layer,
    Linear,
    ModelProfile,
    Norm,
    Parameter,
    Source,
    Verification,
)

_ATTENTION = ("attn", "attention", "mixer", "temporal")


def architecture_of_modules(model: Any) -> Architecture:
    """Every tensor of a causal language model on the meta device, layer kinds told apart."""
    text = model.config.get_text_config()
    layers = survey(model, reduce=False)
    found = find_layers(model)
    path, modules = found if found is not None else ("layers", torch.nn.ModuleList())
    kinds: dict[int, Layer] = {}
    order = layers.kinds if layers is not None else ()
    for kind, module in zip(order, modules, strict=True):
        if kind not in kinds:
            kinds[kind] = _layer(module, text)
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    tied = head is None or head.weight is table
    outside = [
        (name, p)
        for name, p in model.named_parameters()
        if not name.startswith(f"{path}.") and p is not table and (head is None or p is not head.weight)
    ]
    return Architecture(
        model_type=str(model.config.model_type),
        hidden_size=int(text.hidden_size),
        vocab_size=int(table.shape[0]),
        kinds=tuple(kinds[i] for i in range(len(kinds))),
        order=order,
        embeddings=(Parameter(_name(model, table), tuple(table.shape)),),
        final_norm=None,
        head=None if tied else Linear("lm_head", head.weight.shape[1], head.weight.shape[0]),
        max_position_embeddings=getattr(text, "max_position_embeddings", None),
        layers_path=path,
        parameters=tuple(Parameter(name, tuple(p.shape)) for name, p in outside),
    )


def profile_of_modules(facts: Mapping[str, Any], id: str, model: Any) -> ModelProfile:
    """A profile of a model that only transformers knows."""
    return ModelProfile(
        id=id,
        name=id,
        family=str(facts.get("model_type", "")),
        repo_ids=(),
        config=dict(facts),
        parameters=sum(p.numel() for p in model.parameters()),
        verification=Verification("unverified", "counted on the modules transformers builds"),
        sources=(Source("config.json"),),
    )


def _name(model: Any, wanted: torch.Tensor) -> str:
    return next(name for name, p in model.named_parameters() if p is wanted)


def _layer(layer: torch.nn.Module, text: Any) -> Layer:
    mixer: list[Linear] = []
    channel: list[Linear] = []
    norms: list[Norm] = []
    taken: set[int] = set()
    for name, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor):
            continue
        bias = isinstance(getattr(module, "bias", None), torch.Tensor)
        if isinstance(module, torch.nn.Linear):
            spec = Linear(name, weight.shape[1], weight.shape[0], bias)
            (mixer if any(part in name for part in _ATTENTION) else channel).append(spec)
        elif weight.dim() == 1 and "norm" in type(module).__name__.lower():
            norms.append(Norm(name, weight.shape[0], "layer" if bias else "rms", bias))
        else:
            continue
        taken.update(id(p) for p in module.parameters(recurse=False))
    rest = [(name, p) for name, p in layer.named_parameters() if id(p) not in taken]
    stacks = [(name, p) for name, p in rest if p.dim() == 3 and ".experts." in name]
    others = tuple(
        Parameter(name, tuple(p.shape)) for name, p in rest if p.dim() != 3 or ".experts." not in name
    )
    return Layer(
        attention=_attention(layer, text, tuple(mixer)),
        feed_forward=_feed_forward(text, tuple(channel), stacks),
        norms=tuple(norms),
        parameters=others,
    )


def _attention(layer: torch.nn.Module, text: Any, linears: tuple[Linear, ...]) -> Attention:
    heads = int(getattr(text, "num_attention_heads", 0) or 0)
    if not linears or not heads:
        return Attention(kind="none", linears=linears)
    attends = any("attn" in name or "attention" in name for name, _ in layer.named_modules())
    head = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    window: Any = next(
        (m.sliding_window for m in layer.modules() if getattr(m, "sliding_window", None)), None
    )
    return Attention(
        kind=("sliding" if window else "full") if attends else "recurrent",
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=head,
        value_dim=head,
        window=window,
        linears=linears,
    )


def _feed_forward(text: Any, linears: tuple[Linear, ...], stacks: list[tuple[str, Any]]) -> FeedForward:
    if not stacks:
        kind: Any = "none" if not linears else "gated" if len(linears) > 2 else "plain"
        return FeedForward(
            kind=kind, intermediate=max((x.outputs for x in linears), default=0), linears=linears
        )
    names = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts", "moe_top_k")
    per_token = next((int(n) for name in names if (n := getattr(text, name, None))), 1)
    down = min(stacks, key=lambda item: int(item[1].numel()))[1]
    experts = Experts(
        count=int(down.shape[0]),
        per_token=per_token,
        intermediate=int(min(down.shape[1:])),
        fused=True,
        parameters=tuple(Parameter(name, tuple(p.shape)) for name, p in stacks),
    )
    return FeedForward(kind="moe", linears=linears, experts=experts)
