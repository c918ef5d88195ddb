"""From a model's config to every tensor it has: `architecture(config)`.

The trait file of the model_type says what there is; this evaluates its shapes. Each distinct layer is built
once: `per_layer` in the trait file lists what varies with the layer index, and layers whose values are equal
are the same kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from profiles.arithmetic import parameter_count
from profiles.blocks import build_attention, build_feed_forward, choose
from profiles.errors import BadConfig
from profiles.evaluate import Evaluator, linears, norm, norms, parameters
from profiles.facts import Facts, model_type_of, published_dtype, published_quantization
from profiles.fields import shown
from profiles.schema import Architecture, Layer, Linear, Norm, Parameter
from profiles.towers import build_towers, nested
from profiles.traits import load_traits

LARGEST_KINDS = 1000
LARGEST_PARAMETERS = 10**16


def architecture(config: Mapping[str, Any]) -> Architecture:
    """Every tensor of the model a config.json describes, as transformers builds it.

    Fields that the config leaves out take transformers' defaults. Errors: `BadConfig` for a config that is
    malformed, absurd, or of a model_type without trait file.
    """
    return describe(config)[0]


def loaded_architecture(config: Mapping[str, Any]) -> Architecture:
    """The tensors that `AutoModelForCausalLM` makes of a config: of some models around a language model
    (Qwen3.5, Llama 4) only the text model, under its own module paths.

    Errors: `BadConfig`, as `architecture`.
    """
    return describe(config, loaded=True)[0]


def describe(config: Mapping[str, Any], loaded: bool = False) -> tuple[Architecture, Facts]:
    """`architecture(config)` together with the facts read for it (`used`, `defaulted`).

    `loaded`: as `AutoModelForCausalLM` builds it.
    """
    if not isinstance(config, Mapping):
        raise BadConfig(f"a config is a JSON object, not {shown(config)}")
    model_type = model_type_of(config)
    traits = load_traits(model_type)
    if "layers" not in traits and "text" not in traits:
        raise BadConfig(f"{model_type} is a part of other models, not a language model")
    facts = Facts(config, model_type, traits=traits)
    scope = Evaluator(facts, traits.get("let", {}))
    part = traits.get("text")
    towers = traits.get("towers", {})
    inner: Mapping[str, Any] | None = None
    if part is None:
        built = _text_model(scope, traits, traits.get("base", "model"))
    else:
        text, text_traits = nested(scope, part)
        inner = text.facts.config
        scope.scopes["text"] = text
        text.scopes["outer"] = scope
        if loaded and "causal_lm" in part:
            built, towers = _text_model(text, text_traits, part["causal_lm"]), {}
        else:
            built = _text_model(text, {**text_traits, **part}, part["base"])
    built = msgspec.structs.replace(
        built,
        model_type=model_type,
        towers=build_towers(scope, towers),
        dtype=published_dtype(config, inner),
        pretrained_quantization=published_quantization(config),
    )
    if parameter_count(built) > LARGEST_PARAMETERS:
        raise BadConfig("the config describes more than 10^16 parameters")
    return built, facts


def _text_model(scope: Evaluator, traits: Mapping[str, Any], base: str) -> Architecture:
    kinds, order = _layers(scope, traits)
    hidden_size = scope.size(traits.get("hidden_size", "hidden_size"))
    tied = bool(scope.value(traits.get("tied", "tie_word_embeddings")))
    path = f"{base}." if base else ""
    head = _head(scope, traits)
    own_bias = (Parameter(f"{head.name}.bias", (head.outputs,)),) if tied and head and head.bias else ()
    return Architecture(
        model_type=scope.facts.model_type,
        hidden_size=hidden_size,
        vocab_size=scope.size(traits.get("vocab_size", "vocab_size")),
        kinds=kinds,
        order=order,
        layers_path=f"{path}{traits.get('layers_path', 'layers')}",
        embeddings=_outer_parameters(path, parameters(scope, traits["embeddings"])),
        final_norm=_final_norm(scope, traits, path),
        head=None if tied else head,
        max_position_embeddings=scope.value(traits.get("max_positions", "max_position_embeddings")) or None,
        logit_softcap=bool(scope.value(traits.get("logit_softcap", False))),
        embedding_scale=bool(scope.value(traits.get("embedding_scale", False))),
        logit_scale=bool(scope.value(traits.get("logit_scale", False))),
        linears=_outer_linears(path, linears(scope, traits.get("linears", {}))),
        parameters=(*_outer_parameters(path, parameters(scope, traits.get("parameters", {}))), *own_bias),
    )


def _layers(scope: Evaluator, traits: Mapping[str, Any]) -> tuple[tuple[Layer, ...], tuple[int, ...]]:
    """Distinct layers in order of appearance, and the kind of every layer."""
    count = scope.value(traits["layers"])
    varies = traits.get("per_layer", {})
    kinds: list[Layer] = []
    seen: dict[tuple[Any, ...], int] = {}
    order: list[int] = []
    for i in range(count):
        variables: dict[str, Any] = {"i": i}
        at = scope.at_layer(variables)
        for name, entry in varies.items():
            at.set(name, at.value(entry))
        key = tuple([_frozen(at.lookup(name)) for name in varies])
        if key not in seen:
            if len(kinds) >= LARGEST_KINDS:
                raise BadConfig(f"the config describes more than {LARGEST_KINDS} different layers")
            seen[key] = len(kinds)
            at.forget("i")
            kinds.append(_layer(at, traits))
        order.append(seen[key])
    return tuple(kinds), tuple(order)


def _frozen(value: Any) -> Any:
    return str(value) if isinstance(value, (list, dict)) else value


def _layer(scope: Evaluator, traits: Mapping[str, Any]) -> Layer:
    return Layer(
        attention=build_attention(scope, choose(scope, traits["attention"])),
        feed_forward=build_feed_forward(scope, choose(scope, traits["feed_forward"])),
        norms=norms(scope, traits.get("norms", {})),
        residual="parallel" if scope.value(traits.get("parallel", False)) else "sequential",
        residual_scale=bool(scope.value(traits.get("residual_scale", False))),
        parameters=parameters(scope, traits.get("layer_parameters", {})),
        linears=linears(scope, traits.get("layer_linears", {})),
    )


def _final_norm(scope: Evaluator, traits: Mapping[str, Any], path: str) -> Norm | None:
    for name, entry, at in scope.entries(traits.get("final_norm", {})):
        return norm(at, path + name, entry)
    return None


def _head(scope: Evaluator, traits: Mapping[str, Any]) -> Linear | None:
    found = linears(scope, traits.get("head", {"lm_head": ["hidden_size", "vocab_size"]}))
    return found[0] if found else None


def _outer_linears(path: str, found: tuple[Linear, ...]) -> tuple[Linear, ...]:
    return tuple(msgspec.structs.replace(x, name=path + x.name) for x in found)


def _outer_parameters(path: str, found: tuple[Parameter, ...]) -> tuple[Parameter, ...]:
    return tuple(msgspec.structs.replace(x, name=path + x.name) for x in found)
