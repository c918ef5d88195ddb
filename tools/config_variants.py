"""Small configs of a model_type, one field changed at a time, to hold against transformers' class.

`variants(model_type)` starts from the class defaults, made small, and then flips every flag, fills every
empty size and halves every size the class has. What the class itself refuses is left out by the caller.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 24, "vocab_size": 160,
    "shared_expert_intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 12, "num_experts": 6, "num_local_experts": 6, "n_routed_experts": 6,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 2, "kv_lora_rank": 20,
    "q_lora_rank": 28, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12, "pad_token_id": 0,
    "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0, "sliding_window": 32,
    "max_window_layers": 2, "depth": 3, "embed_dim": 32, "num_heads": 4, "image_size": 56, "patch_size": 14,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6,
    "linear_value_head_dim": 10, "vision_output_dim": 384, "num_position_embeddings": 36,
    "attention_heads": 4, "num_global_layers": 2, "cross_attention_layers": [1], "n_embd": 64, "n_head": 8,
    "n_layer": 3, "n_positions": 128, "d_model": 64, "n_heads": 8, "n_layers": 3, "num_layers": 3,
    "mamba_n_heads": 8, "mamba_d_state": 12, "mamba_num_heads": 8, "mamba_head_dim": 16, "state_size": 12,
}  # fmt: skip
FLAGS_LEFT = {
    "dtype", "id2label", "rope_parameters", "is_encoder_decoder", "return_dict", "output_hidden_states",
    "use_cache", "is_decoder", "output_attentions",
}  # fmt: skip


def class_fields(model_type: str) -> dict[str, Any]:
    """Fields of the config class with their plain defaults."""
    found = {}
    for item in dataclasses.fields(CONFIG_MAPPING[model_type]):
        if item.default is not dataclasses.MISSING:
            found[item.name] = item.default
    return found


def small(model_type: str, changes: dict[str, Any] | None = None) -> dict[str, Any]:
    """A small config of the type: the fields of `SMALL` that it has, then `changes`."""
    fields = class_fields(model_type)
    aliases = CONFIG_MAPPING[model_type].attribute_map or {}
    config: dict[str, Any] = {"model_type": model_type}
    for name, value in SMALL.items():
        if name in fields and not (name == "head_dim" and fields[name] is None):
            config[name] = value
        elif aliases.get(name) in fields:
            config[aliases[name]] = value
    for field, nested_type in nested_types(model_type).items():
        config[field] = small(nested_type)
    for name, value in (changes or {}).items():
        config[name] = {**config.get(name, {}), **value} if isinstance(value, dict) else value
    return config


def nested_types(model_type: str) -> dict[str, str]:
    """Model types of nested configs, by field, as the class fills them in."""
    config_class = CONFIG_MAPPING[model_type]
    if not getattr(config_class, "sub_configs", None):
        return {}
    filled = config_class()
    found = {}
    for name in config_class.sub_configs:
        nested = getattr(getattr(filled, name, None), "model_type", "")
        if nested in CONFIG_MAPPING:
            found[name] = nested
    return found


def variants(model_type: str, changes: dict[str, Any] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and config of the small base and of each one-field change of it."""
    base = small(model_type, changes)
    yield "small", base
    for name, value in changed(model_type, base):
        yield f"{name}={value}", {**base, name: value}
    for field, nested_type in nested_types(model_type).items():
        for name, value in changed(base[field].get("model_type", nested_type), base[field]):
            yield f"{field}.{name}={value}", {**base, field: {**base[field], name: value}}


def changed(model_type: str, base: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Each field with another value than it has in `base`."""
    for name, default in class_fields(model_type).items():
        value = base.get(name, default)
        if name in FLAGS_LEFT or name.startswith(("pad_", "bos_", "eos_")):
            continue
        if isinstance(value, bool):
            yield name, not value
        elif isinstance(value, int) and value > 1:
            yield name, value // 2
        elif value == 0 or value == 1:
            yield name, 2
        elif value is None:
            yield name, 16
        if value is not None and default is None and not isinstance(value, dict):
            yield name, None
