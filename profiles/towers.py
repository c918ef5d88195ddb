"""Vision and audio encoders beside the text model: counted, resident, idle in text-only work."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from profiles.errors import BadConfig
from profiles.evaluate import Evaluator, linears, norms, parameters
from profiles.facts import Facts
from profiles.schema import Linear, Norm, Parameter, Tower
from profiles.traits import known_model_types, load_traits


def nested_type(config: Mapping[str, Any], part: Mapping[str, Any], where: str) -> str:
    """The model_type of a nested config: fixed by the class around it, or stated, or its default.

    Errors: `BadConfig` for one without trait file.
    """
    fixed = part.get("type")
    if fixed is not None:
        return str(fixed)
    stated = config.get("model_type", part["default_type"])
    if not isinstance(stated, str) or stated not in known_model_types():
        raise BadConfig(f"{where} has a model_type that is not described here: {ascii(stated)[:40]}")
    return stated


def nested(outer: Evaluator, part: Mapping[str, Any]) -> tuple[Evaluator, dict[str, Any]]:
    """Scope and traits of a nested config. `flat`: older files keep its fields at the top level.

    A nested config that is missing is that of its class with nothing set, as transformers has it.
    """
    field = part["field"]
    stated = outer.facts.lookup(field)
    if stated is None and part.get("flat"):
        inner, prefix = outer.facts.config, ""
    else:
        inner, prefix = {} if stated is None else stated.config, f"{field}."
    model_type = nested_type(inner if prefix else {}, part, field)
    traits = load_traits(model_type)
    facts = Facts(inner, model_type, prefix=prefix, traits=traits, outer=outer.facts)
    return Evaluator(facts, traits.get("let", {})), traits


def build_towers(scope: Evaluator, section: Mapping[str, Any]) -> tuple[Tower, ...]:
    """Every tower of a trait file, in its order."""
    towers: list[Tower] = []
    for part in section.values():
        if "when" in part and not scope.value(part["when"]):
            continue
        if "field" in part:
            inner, traits = nested(scope, part)
            inner.scopes.update(scope.scopes, outer=scope)
            towers.extend(_encoder(inner, traits, part["path"]))
            scope.scopes[part.get("as", "vision")] = inner
        else:
            towers.extend(_encoder(scope, {"encoder": part}, part["path"]))
    return tuple(towers)


def _encoder(scope: Evaluator, traits: Mapping[str, Any], path: str) -> list[Tower]:
    if "encoder" not in traits:
        raise BadConfig(f"{scope.facts.model_type} is a language model, not the encoder of {path}")
    found = []
    for name in traits.get("keep", ()):
        scope.facts.lookup(name)  # decides no shape, but the class refuses a config without it
    for part in (traits["encoder"], *traits.get("more_encoders", ())):
        blocks = scope.value(part.get("blocks", 0))
        block = part.get("block", {})
        found.append(
            Tower(
                name=path + part.get("blocks_path", ""),
                blocks=blocks,
                block_linears=linears(scope, block.get("linears", {})) if blocks else (),
                block_parameters=_tensors(scope, block) if blocks else (),
                linears=_prefixed(path, linears(scope, part.get("linears", {}))),
                parameters=_prefixed_tensors(path, _tensors(scope, part)),
            )
        )
    return found


def _tensors(scope: Evaluator, block: Mapping[str, Any]) -> tuple[Parameter, ...]:
    """Parameters of a block, its norms written out as tensors."""
    written = [tensor for norm in norms(scope, block.get("norms", {})) for tensor in norm_tensors(norm)]
    return (*parameters(scope, block.get("parameters", {})), *written)


def norm_tensors(norm: Norm) -> list[Parameter]:
    """Weight and bias of a norm."""
    names = [name for name, present in (("weight", norm.weight), ("bias", norm.bias)) if present]
    return [Parameter(f"{norm.name}.{name}", (norm.size,)) for name in names]


def _prefixed(path: str, found: tuple[Linear, ...]) -> tuple[Linear, ...]:
    return tuple(msgspec.structs.replace(x, name=f"{path}.{x.name}") for x in found)


def _prefixed_tensors(path: str, found: tuple[Parameter, ...]) -> tuple[Parameter, ...]:
    return tuple(msgspec.structs.replace(x, name=f"{path}.{x.name}") for x in found)
