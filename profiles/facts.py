"""One config as facts: each field checked when it is read, a missing one filled as transformers does.

A field the file does not state takes the default of transformers' own config class for that model_type and is
reported as defaulted. Any other missing field is an error that names it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from profiles.defaults import class_defaults
from profiles.errors import BadConfig
from profiles.fields import check_value, kind_of, rejected, shown
from profiles.traits import known_model_types, load_traits, model_type_of_class

_DTYPES = frozenset(
    {"float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8"}
)
DEFAULT_DTYPE = "bfloat16"
NESTED = object()
"""In `used`: the path is a nested config. That it is there says something, even with nothing read of it."""
PUBLISHED = "use the config.json that was published with the weights"


class Facts:
    """A config, or one nested in it.

    `used` collects the stated fields that were read, by path, and `defaulted` those that were filled in;
    nested configs write into the same two.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        model_type: str,
        *,
        prefix: str = "",
        traits: Mapping[str, Any] | None = None,
        outer: Facts | None = None,
    ) -> None:
        self.config = config
        self.model_type = model_type
        self.prefix = prefix
        self.class_defaults = class_defaults(model_type)
        self.kinds: Mapping[str, str] = (traits or {}).get("fields", {})
        self.trait_defaults: Mapping[str, Any] = (traits or {}).get("defaults", {})
        self.used: dict[str, Any] = outer.used if outer else {}
        self.defaulted: dict[str, Any] = outer.defaulted if outer else {}
        self._values: dict[str, Any] = {}

    def lookup(self, name: str) -> Any:
        """The checked value of a field. Errors: `BadConfig` for a missing, ill-typed or absurd one."""
        if name not in self._values:
            self._values[name] = self._read(name)
        return self._values[name]

    def _read(self, name: str) -> Any:
        where = self.prefix + name
        kind = self.kinds.get(name) or kind_of(name)
        names = self._names(name)
        for stated in names:
            if stated in self.config:
                return self._stated(stated, kind)
        for table in (self.trait_defaults, self.class_defaults.fields):
            for known in names:
                if known in table:
                    self.defaulted[where] = table[known]
                    return table[known]
        if kind.endswith("?"):
            return None
        raise BadConfig(f"config.json has no {where}, and {self.model_type} has no default for it", PUBLISHED)

    def _stated(self, name: str, kind: str) -> Any:
        path, value = self.prefix + name, self.config[name]
        check_value(path, value, kind)
        if value is not None and "config" in kind:
            return self._nested(path, value)
        self.used[path] = value
        return value

    def _nested(self, path: str, value: Any) -> Any:
        """A nested config, or a list of them, whose fields are checked in the same way."""
        if isinstance(value, list):
            return [self._nested(f"{path}.{i}", item) for i, item in enumerate(value)]
        self.used.setdefault(path, NESTED)
        return Facts(value, self.model_type, prefix=f"{path}.", outer=self)

    def _names(self, name: str) -> tuple[str, ...]:
        """A field under all the names its config class gives it."""
        aliases = self.class_defaults.aliases
        others = [alias for alias, field in aliases.items() if field == name]
        return (name, aliases[name], *others) if name in aliases else (name, *others)


def language_model_types() -> list[str]:
    """Every described model_type that is a language model, not a part of one."""
    return [name for name in known_model_types() if not {"layers", "text"}.isdisjoint(load_traits(name))]


def model_type_of(config: Mapping[str, Any]) -> str:
    """The model_type of a config, through `architectures` where it states none.

    Errors: `BadConfig` for none, or one that no trait file describes; the hint names the nearest.
    """
    model_type = config.get("model_type")
    classes = config.get("architectures")
    first = classes[0] if isinstance(classes, list) and classes and isinstance(classes[0], str) else None
    if model_type is None and first is not None:
        model_type = model_type_of_class(first) or first
    if model_type is None:
        raise BadConfig("config.json states no model_type", PUBLISHED)
    if not isinstance(model_type, str):
        raise rejected("model_type", model_type, "a text")
    if model_type in known_model_types():
        return model_type
    near = difflib.get_close_matches(model_type[:60].lower(), language_model_types(), n=3, cutoff=0.4)
    names = f"the nearest known: {', '.join(near)}; " if near else ""
    raise BadConfig(
        f"model_type {shown(model_type)} is not described here",
        f"{names}describe it in profiles/traits/<model_type>.json (one file, no code)",
    )


def published_dtype(config: Mapping[str, Any], nested: Mapping[str, Any] | None = None) -> str:
    """`dtype` or `torch_dtype` of the checkpoint, of the config or the one nested in it; else bfloat16.

    Errors: `BadConfig` for anything that is no dtype of torch.
    """
    for source in (config, nested or {}):
        for name in ("dtype", "torch_dtype"):
            value = source.get(name)
            if value is None:
                continue
            if not isinstance(value, str) or value.removeprefix("torch.") not in _DTYPES:
                raise rejected(name, value, "a dtype of torch")
            return value.removeprefix("torch.")
    return DEFAULT_DTYPE


def published_quantization(config: Mapping[str, Any]) -> str | None:
    """`quantization_config.quant_method`: how the published weights are already quantized. bitsandbytes' name
    takes the precision with it: bitsandbytes-nf4, -fp4 or -int8.

    Errors: `BadConfig` for anything that is no such object.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return None
    if not isinstance(quantization, Mapping):
        raise rejected("quantization_config", quantization, "an object")
    method = quantization.get("quant_method")
    check_value("quantization_config.quant_method", method, "text?")
    if method == "bitsandbytes":
        return f"{method}-{_bitsandbytes_precision(quantization)}"
    return None if method is None else str(method)


def _bitsandbytes_precision(quantization: Mapping[str, Any]) -> str:
    if quantization.get("load_in_8bit"):
        return "int8"
    kind = quantization.get("bnb_4bit_quant_type", "fp4")
    check_value("quantization_config.bnb_4bit_quant_type", kind, "text?")
    return "nf4" if kind == "nf4" else "fp4"
