"""config.json files: read, checked, and cut down to the fields that decide shapes, memory and speed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from profiles.architecture import describe
from profiles.errors import BadConfig
from profiles.facts import NESTED
from profiles.fields import check_value, shown
from profiles.schema import Architecture

__all__ = ["config_facts", "load_config_file", "read_config"]

LARGEST_FILE_BYTES = 4 * 2**20
_KEPT = ("architectures", "dtype", "torch_dtype")
_KEPT_NESTED = ("model_type", "dtype", "torch_dtype")


def load_config_file(path: str | Path) -> dict[str, Any]:
    """The JSON object of a config.json, or of the config.json in a folder.

    Errors: `BadConfig` in one line for a missing, unreadable, oversized or malformed file.
    """
    name = shown(str(path))
    content = _read_bytes(Path(path), name)
    try:
        raw = json.loads(content)  # not msgspec: published configs hold Infinity
    except RecursionError:
        raise BadConfig(f"{name} is nested too deeply to be a config.json") from None
    except ValueError as error:
        raise BadConfig(f"{name} is not valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise BadConfig(f"{name} holds {shown(raw)}, not a JSON object")
    return raw


def _read_bytes(file: Path, name: str) -> bytes:
    try:
        if file.is_dir():
            file = file / "config.json"
        if not file.is_file():
            raise BadConfig(f"no config.json at {name}", "give a model folder or the path of its config.json")
        if file.stat().st_size > LARGEST_FILE_BYTES:
            raise BadConfig(f"{name} is larger than {LARGEST_FILE_BYTES >> 20} MiB: no config.json")
        return file.read_bytes()
    except (OSError, ValueError) as error:
        raise BadConfig(f"cannot read {name}: {getattr(error, 'strerror', None) or error}") from None


def read_config(raw: object) -> dict[str, Any]:
    """The facts of a parsed config.json: the stated fields that decide shapes, memory and speed.

    Each one is checked; `architecture` reads the result as it reads the whole file.

    Errors: `BadConfig` in one line.
    """
    if not isinstance(raw, Mapping):
        raise BadConfig(f"a config.json holds one JSON object, not {shown(raw)}")
    return config_facts(raw)[1]


def config_facts(config: Mapping[str, Any]) -> tuple[Architecture, dict[str, Any], tuple[str, ...]]:
    """Architecture, the stated fields it was derived from, and the fields transformers' defaults filled.

    Errors: `BadConfig` for a config that is malformed, absurd, or of a model_type nobody described.
    """
    arch, read = describe(config)
    check_value("architectures", config.get("architectures"), "texts?")
    kept: dict[str, Any] = {"model_type": arch.model_type}
    kept |= {name: config[name] for name in _KEPT if config.get(name) is not None}
    # whether the text model alone ties its head is asked of its own config
    _nest(kept, config, read.used | describe(config, loaded=True)[1].used)
    kept = _in_order(kept, config)
    if arch.pretrained_quantization is not None:
        kept["quantization_config"] = {"quant_method": arch.pretrained_quantization}
    return arch, kept, tuple(sorted(read.defaulted))


def _in_order(kept: Any, config: Any) -> Any:
    """What is kept in the order the config has it, so that equal facts are equal files."""
    if isinstance(kept, dict):
        names = sorted(kept, key=lambda name: (name != "model_type", _place(config, name)))
        return {name: _in_order(kept[name], config.get(name)) for name in names}
    if isinstance(kept, list) and kept and isinstance(kept[0], dict):
        return [_in_order(item, at) for item, at in zip(kept, config, strict=True)]
    return kept


def _place(config: Mapping[str, Any], name: str) -> int:
    names = list(config)
    return names.index(name) if name in config else len(names)


def _nest(kept: dict[str, Any], config: Mapping[str, Any], used: Mapping[str, Any]) -> None:
    """Put `text_config.hidden_size` back where it was, with the model_type of each nested config."""
    for path, value in used.items():
        *parents, name = path.split(".")
        into: Any = kept
        at: Any = config
        for parent in parents:
            at, into = _step(at, into, parent)
        if value is NESTED:
            _step(at, into, name)
        else:
            into[name] = value


def _step(at: Any, into: Any, parent: str) -> tuple[Any, Any]:
    """One level down in the config and in what is kept of it."""
    if isinstance(at, list):
        while len(into) <= int(parent):
            into.append({})
        return at[int(parent)], into[int(parent)]
    at = at[parent]
    into = into.setdefault(parent, [] if isinstance(at, list) else {})
    if isinstance(at, Mapping):
        for name in _KEPT_NESTED:
            if isinstance(at.get(name), str):
                into.setdefault(name, at[name])
    return at, into
