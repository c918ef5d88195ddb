"""Small configurations of every causal language model that transformers and the catalogue both know."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BATCH, TOKENS = 2, 256
_SIZES: dict[str, Any] = {
    "hidden_size": 256, "n_embd": 256, "d_model": 256, "intermediate_size": 704, "ffn_dim": 704,
    "n_inner": 704, "num_hidden_layers": 4, "n_layer": 4, "num_layers": 4, "n_layers": 4,
    "num_attention_heads": 8, "n_head": 8, "n_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
    "max_position_embeddings": 1024, "n_positions": 1024, "num_experts": 8, "num_local_experts": 8,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 192,
    "shared_expert_intermediate_size": 192, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "n_group": 1, "topk_group": 1, "q_lora_rank": 96, "kv_lora_rank": 64, "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32, "v_head_dim": 48, "attention_dropout": 0.0, "attn_pdrop": 0.0,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "hidden_dropout": 0.0, "dropout": 0.0,
    "activation_dropout": 0.0, "layerdrop": 0.0, "attention_probs_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0, "resid_dropout": 0.0, "embedding_dropout": 0.0,
    "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 32,
    "linear_value_head_dim": 32, "sliding_window": 1024, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
"""What each field is set to in configs that have it: wide enough that tensors are larger than one block."""

AGREEMENT = json.loads((Path(__file__).parent / "agreement.json").read_text())
"""The types compared, their own fields, and where the fast estimator is known to be off, with the reason."""


def tiny(model_type: str, vocabulary: int) -> dict[str, Any]:
    """The fields of a small config.json, as transformers would write it."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    standard = kind()
    fields = {key: value for key, value in _SIZES.items() if getattr(standard, key, False) is not False}
    fields |= {"vocab_size": vocabulary, **AGREEMENT["fields"].get(model_type, {})}
    if getattr(standard, "layer_types", None) is not None:
        fields.setdefault("layer_types", None)  # decided anew for this many layers
    try:
        config = kind(**fields)
    except (TypeError, ValueError):
        fields.pop("layer_types", None)
        config = kind(**fields)
    facts: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
    return facts
