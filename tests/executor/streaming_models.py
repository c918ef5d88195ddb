"""Tiny models of many families whose every weight is different, and requests to load them by an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import STACK

from executor.engines import LoadRequest
from executor.source import ModelSource
from executor.tiny import byte_tokenizer
from planner.types import Candidate, DiskEstimate, Estimate, HostEstimate, ModelRef, Speed, Strategy, Workload

LAYERS = 5
"""More than slots, and odd: layers come to other slots in every round of decoding."""
_COMMON: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
_LATENT = {
    **_EXPERTS,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
}
"""Latent attention, and a dense layer before those with experts: slabs of two sizes."""
_TWO_KINDS = ["linear_attention", "full_attention"] * 2 + ["linear_attention"]
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": 8},
    "gemma2": {"head_dim": 32, "sliding_window": 8},
    "gemma3_text": {"head_dim": 32, "sliding_window": 8},
    "phi3": {},
    "granite": {},
    "olmo2": {},
    "glm4": {"head_dim": 32},
    "gpt2": {},
    "deepseek_v2": {**_LATENT, "q_lora_rank": None, "head_dim": 32},
    "deepseek_v3": {**_LATENT, "q_lora_rank": 64},
    "gemma3n_text": {
        "head_dim": 32,
        "sliding_window": 8,
        "num_kv_shared_layers": 2,
        "vocab_size_per_layer_input": 320,
        "hidden_size_per_layer_input": 32,
        "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
        "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0, 0.0],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2 + ["conv"]},
    "qwen3_next": {
        **_EXPERTS,
        "num_experts": 4,
        "head_dim": 32,
        "shared_expert_intermediate_size": 64,
        "layer_types": _TWO_KINDS,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
    },
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {**_EXPERTS, "num_experts": 4, "head_dim": 32},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32, "sliding_window": 8},
}
ESTIMATE = Estimate(
    model=ModelRef("tiny", 1), stack=STACK, gpus=(), host=HostEstimate(ram_bytes=10**9), disk=DiskEstimate(),
    speed=Speed(), verdict="fits",
)  # fmt: skip


def write_model(folder: Path, kind: str) -> ModelSource:
    """A model of `kind`; norms and biases are no ones and zeros, so that a wrong one shows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**_COMMON, **KINDS[kind]})
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.mul_(3.0)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return ModelSource(folder, {"model_type": kind, **_COMMON, **KINDS[kind]})


def request(
    source: ModelSource, quant: str = "none", resident: int | None = 0, task: str = "infer", **strategy: Any
) -> LoadRequest:
    """To load `source` on the CPU with `resident` layers that stay. quant: "nf4+experts" has fused experts in
    NF4, too."""
    quant, _, experts = quant.partition("+")
    strategy["quant_experts"] = "nf4" if experts else "none"
    candidate = Candidate(
        rank=1,
        strategy=Strategy(**{"placement": "cpu", "quant": quant, **strategy}),
        engine="stream",
        device_map={"": "cpu"},
        estimate=ESTIMATE,
        speed=Speed(),
    )
    job = Workload(task=task, method="lora" if quant == "none" else "qlora")  # type: ignore[arg-type]
    return LoadRequest(
        source=source,
        candidate=candidate,
        workload=job,
        device=torch.device("cpu"),
        scratch=Path("nowhere"),
        seed=3,
        resident_layers=resident,
    )


def random_source(kind: str) -> ModelSource:
    """A model without weights, as a rehearsal has it."""
    return ModelSource(None, {"model_type": kind, **_COMMON, **KINDS[kind]})


def logits(model: Any) -> torch.Tensor:
    """Of a prefill over 12 tokens and three decode steps, 2 x 15 x V."""
    ids = torch.randint(0, 320, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        step = model(ids, use_cache=True)
        parts = [step.logits]
        for at in range(3):
            step = model(ids[:, at : at + 1], past_key_values=step.past_key_values, use_cache=True)
            parts.append(step.logits)
    return torch.cat(parts, 1)
