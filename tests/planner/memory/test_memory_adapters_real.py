"""The adapters we count against those peft really makes, on tiny models of every shape of feed-forward."""

from __future__ import annotations

import json

import pytest

from planner.memory.adapters import adapter_parameters
from planner.types import Strategy, Workload
from profiles.architecture import architecture

pytestmark = pytest.mark.executor

SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS = {
    "llama": {},
    "phi3": {},
    "lfm2": {},
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4},
    "qwen3_moe": ROUTED,
    # a dense first layer and shared experts beside the routed ones: linears that are called like experts
    "qwen2_moe": {**ROUTED, "shared_expert_intermediate_size": 64, "mlp_only_layers": [0]},
    "deepseek_v3": {
        "head_dim": 8, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("targets", ["all-linear", "attention"])
@pytest.mark.parametrize("model_type", MODELS)
def test_trainable_parameters(model_type: str, targets: str, variant: str) -> None:
    pytest.importorskip("peft")
    from transformers import AutoConfig, AutoModelForCausalLM

    from planner.exact.adapters import add_adapters

    config = AutoConfig.for_model(model_type, **{**SHAPE, **MODELS[model_type]})
    work = Workload(task="train", method="lora", lora_targets=targets, lora_variant=variant, lora_rank=4)
    model = add_adapters(AutoModelForCausalLM.from_config(config), work, Strategy())
    arch = architecture(json.loads(json.dumps(config.to_dict(), default=str)))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert adapter_parameters(arch, work) == trained
