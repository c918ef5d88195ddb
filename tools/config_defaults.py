"""Write profiles/config_defaults.json from the config classes of the installed transformers.

    python tools/config_defaults.py profiles

For every model_type that transformers builds as a causal or image-text language model, and every config
nested in one: the default of each field that `config_fields.json` or a trait file names, as the class states
it, before the class derives one field from another (which the trait files do).
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)


def json_value(value: Any) -> Any:
    """The value as JSON would hold it; None for what it cannot hold."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return None


def describe(config_class: type, wanted: set[str]) -> dict[str, Any]:
    """Defaults, aliases and nested config types of one class."""
    fields = {}
    wanted = wanted | set((config_class.attribute_map or {}).values())
    for item in dataclasses.fields(config_class):
        if item.name not in wanted:
            continue
        if item.default is not dataclasses.MISSING:
            fields[item.name] = json_value(item.default)
        elif item.default_factory is not dataclasses.MISSING:
            fields[item.name] = json_value(item.default_factory())
    aliases = {
        alias: name
        for alias, name in (config_class.attribute_map or {}).items()
        if name in wanted or alias in wanted
    }
    nested = {
        name: getattr(sub, "model_type", "")
        for name, sub in (getattr(config_class, "sub_configs", None) or {}).items()
    }
    entry = {
        "fields": {k: fields[k] for k in sorted(fields)},
        "aliases": dict(sorted(aliases.items())),
        "sub_configs": {k: v for k, v in sorted(nested.items()) if v},
    }
    return {k: v for k, v in entry.items() if v}


def classes() -> dict[str, type]:
    """Config classes by model_type, nested ones included."""
    found: dict[str, type] = {}

    def add(model_type: str, config_class: type) -> None:
        if model_type in found:
            return
        found[model_type] = config_class
        for sub in (getattr(config_class, "sub_configs", None) or {}).values():
            if getattr(sub, "model_type", ""):
                add(sub.model_type, sub)

    for name in (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        if name in CONFIG_MAPPING:
            add(name, CONFIG_MAPPING[name])
    for name in ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model", "pixtral", "intern_vit"):
        if name in CONFIG_MAPPING:
            add(name, CONFIG_MAPPING[name])
    return found


def wanted_fields(folder: Path) -> set[str]:
    """Every field the field table or a trait file names."""
    names = {
        name for kind in json.loads((folder / "config_fields.json").read_text()).values() for name in kind
    }
    for file in (folder / "traits").glob("*.json"):
        names |= set(json.loads(file.read_text()).get("fields", {}))
    return names


def main(folder: str) -> None:
    """Read the field names, write the defaults table."""
    wanted = wanted_fields(Path(folder))
    output = Path(folder) / "config_defaults.json"
    table = {
        "transformers": transformers.__version__,
        "model_types": {name: describe(cls, wanted) for name, cls in sorted(classes().items())},
    }
    lines = ",\n".join(
        f" {json.dumps(name)}: {json.dumps(entry)}" for name, entry in table["model_types"].items()
    )
    text = f'{{"transformers": {json.dumps(table["transformers"])}, "model_types": {{\n{lines}\n}}}}\n'
    temporary = output.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, output)
    print(f"{len(table['model_types'])} model types, transformers {table['transformers']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
