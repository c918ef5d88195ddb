"""Trait files: what each model_type is made of, as data.

`traits/<model_type>.json` names every tensor of the architecture with its shape as arithmetic over config
fields. A file may start from another (`"like": "llama"`): objects are merged key by key, `null` removes. The
format is described in `traits/README.md`.
"""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec

FOLDER = Path(__file__).parent / "traits"


@lru_cache(maxsize=1)
def known_model_types() -> tuple[str, ...]:
    """Every model_type that has a trait file."""
    return tuple(
        sorted(name[:-5] for name in os.listdir(FOLDER) if name.endswith(".json") and name[0] != "_")
    )


def merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """`base` with `change` laid over it: objects key by key, `null` removes, `key=` replaces whole."""
    merged = dict(base)
    for key, value in change.items():
        if key.endswith("="):
            merged[key[:-1]] = value
        elif value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


@lru_cache(maxsize=256)
def load_traits(name: str) -> dict[str, Any]:
    """The trait file of a model_type with everything it is like merged in; shared, so not to be changed.

    Errors: `FileNotFoundError` for a name without file (callers check `known_model_types` first).
    """
    own: dict[str, Any] = msgspec.json.decode((FOLDER / f"{name}.json").read_bytes())
    base = own.pop("like", None)
    return own if base is None else merge(load_traits(base), own)


@lru_cache(maxsize=1)
def _classes() -> dict[str, str]:
    table: dict[str, str] = msgspec.json.decode((FOLDER / "_classes.json").read_bytes())
    return table


def model_type_of_class(class_name: str) -> str | None:
    """The model_type of a class named in `architectures`, for configs that predate `model_type`."""
    return _classes().get(class_name)
