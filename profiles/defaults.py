"""What transformers' config classes fill in: a table that `tools/config_defaults.py` writes."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import msgspec

from profiles.data import read_table


class _Table(msgspec.Struct):
    """Config classes of one transformers version; each is decoded when asked for."""

    transformers: str
    model_types: dict[str, msgspec.Raw]


class ClassDefaults(msgspec.Struct):
    """What one config class fills in."""

    fields: dict[str, Any] = {}
    aliases: dict[str, str] = {}
    """Other names the class accepts (`attribute_map`): alias to field."""
    sub_configs: dict[str, str] = {}
    """Nested configs: field to the model_type it has when it does not say."""


@lru_cache(maxsize=1)
def _table() -> _Table:
    return msgspec.json.decode(read_table("config_defaults.json"), type=_Table)


@lru_cache(maxsize=512)
def class_defaults(model_type: str) -> ClassDefaults:
    """Defaults of transformers' config class of a model_type; empty where transformers has no such class."""
    raw = _table().model_types.get(model_type)
    return ClassDefaults() if raw is None else msgspec.json.decode(raw, type=ClassDefaults)


def defaults_version() -> str:
    """The transformers version the defaults were read from."""
    return _table().transformers


def described_by_transformers() -> tuple[str, ...]:
    """Every model_type of the table."""
    return tuple(_table().model_types)
