"""Low-rank adapters on a model, as peft makes them: the executor trains them, the tracer follows them.

One piece of code for both, so that what is predicted is what runs.
"""

from __future__ import annotations

from typing import Any

import torch

from planner.memory.adapters import EXPERT_NAMES, ROUTER
from planner.types import Strategy, Workload


def add_adapters(model: Any, workload: Workload, strategy: Strategy) -> Any:
    """The model wrapped by peft with the workload's adapters; only they are trainable.

    Variants: LoRA (arXiv:2106.09685), DoRA (arXiv:2402.09353), rank-stabilized LoRA (arXiv:2312.03732).
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if strategy.upcast_frozen:
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=strategy.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    targets = target_modules(model, workload.lora_targets)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=workload.lora_rank,
        lora_alpha=workload.lora_alpha,
        lora_dropout=workload.lora_dropout,
        target_modules=targets,
        use_dora=workload.lora_variant == "dora",
        use_rslora=workload.lora_variant == "rslora",
    )
    adapted = get_peft_model(model, config, autocast_adapter_dtype=workload.adapter_dtype == "fp32")
    if workload.adapter_dtype == "bf16":
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    return adapted


def target_modules(model: Any, wanted: str) -> str | list[str]:
    """What `all-linear` and `attention` mean for `model`, as peft's `target_modules`.

    In models whose experts are fused, peft reads the names of dense feed-forward linears as names of the
    experts' stacked parameters (in `all-linear` even unasked). Those cannot have dropout, so there only
    linears with other names are adapted, each spelled out; routers that answer with a tuple are not.
    """
    fused = _has_fused_experts(model)
    if wanted == "all-linear" and not fused:
        return "all-linear"
    names = _linears_of_layers(model)
    if wanted == "attention":
        names = [n for n in names if any("attn" in part or "attention" in part for part in n.split(".")[:-1])]
    left_alone = {*EXPERT_NAMES, ROUTER} if fused else set()
    return [n for n in names if n.rsplit(".", 1)[-1] not in left_alone]


def _has_fused_experts(model: Any) -> bool:
    return any(p.dim() == 3 and ".experts." in name for name, p in model.named_parameters())


def _linears_of_layers(model: Any) -> list[str]:
    head = model.get_output_embeddings()
    return [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
