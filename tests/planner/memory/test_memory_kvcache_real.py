"""The cache we count against the tensors transformers keeps, after prefill and after one more token."""

from __future__ import annotations

import json
from typing import Any

import pytest

from planner.memory.kvcache import cache_bytes
from planner.memory.tape import rounded
from profiles.architecture import architecture

pytestmark = pytest.mark.executor

BATCH, PROMPT = 2, 64
SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 128, "head_dim": 64, "pad_token_id": 0,
    "max_position_embeddings": 1024,
}  # fmt: skip
LATENT = {
    "head_dim": 32, "n_routed_experts": 4, "moe_intermediate_size": 32, "q_lora_rank": 16, "kv_lora_rank": 64,
    "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 64, "num_key_value_heads": 4, "n_group": 2,
    "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
}  # fmt: skip
DELTA = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 32},
    "gemma3_text": {"sliding_window": 32},
    "exaone4": {"sliding_window": 32},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 32},
    "llama4_text": {"intermediate_size_mlp": 96, "num_local_experts": 4, "attention_chunk_size": 32},
    "deepseek_v3": LATENT,
    "qwen3_5_text": DELTA,
    "qwen3_next": {**DELTA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gemma3n_text": {
        "num_kv_shared_layers": 2, "sliding_window": 32, "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 128, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}  # fmt: skip


def stored(cache: Any, torch: Any) -> int:
    """Bytes of every storage a cache's layers hold."""
    seen: dict[int, int] = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            held = (
                value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            )
            for tensor in held:
                if isinstance(tensor, torch.Tensor) and tensor.numel():
                    storage = tensor.untyped_storage()
                    seen[storage.data_ptr()] = rounded(storage.nbytes())
    return sum(seen.values())


@pytest.mark.parametrize("model_type", MODELS)
def test_cache(model_type: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type, **{**SHAPE, **MODELS[model_type]})
    arch = architecture(json.loads(json.dumps(config.to_dict(), default=str)))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        cache = model(torch.ones(BATCH, PROMPT, dtype=torch.long), use_cache=True).past_key_values
        prefill = stored(cache, torch)
        model(torch.ones(BATCH, 1, dtype=torch.long), past_key_values=cache, use_cache=True)
        after = stored(cache, torch)
    expected = cache_bytes(arch, BATCH, PROMPT, PROMPT + 1, 2)
    # a layer with a window of its own also keeps a counter
    counters = 512 * sum(
        spec.window is not None and not spec.shares_kv
        for spec in (arch.kinds[kind].attention for kind in arch.order)
    )
    assert prefill - counters == expected.prefill
    assert after - counters == expected.final
