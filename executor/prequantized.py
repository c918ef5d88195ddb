"""Checkpoints that are quantized already: their weights run in the precision they have, or not at all."""

from __future__ import annotations

from typing import Any

from executor.errors import CannotHonour
from planner.types import Strategy
from profiles.facts import published_quantization
from profiles.precisions import STORED

_TORCH_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def take_as_stored(config: Any, strategy: Strategy) -> bool:
    """Whether the weights of `config`, transformers' config object, are quantized by bitsandbytes already; it
    is made to compute in the strategy's dtype then, whatever the checkpoint says.

    Errors: `CannotHonour` where the strategy's precision is not theirs, and for ways of storing that nothing
    here runs.
    """
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return False
    facts = quantization if isinstance(quantization, dict) else quantization.to_dict()
    stored = published_quantization({"quantization_config": facts}) or "an unnamed format"
    if stored == "mxfp4" and strategy.quant == "none":
        return False  # transformers unpacks it to 16 bits where its kernels are not installed
    precision = STORED.get(stored)
    if precision is None:
        raise CannotHonour(
            f"the weights are stored in {stored}, which nothing here runs",
            "take a checkpoint of this model in 16 bits, or one that bitsandbytes quantized to NF4 or int8",
        )
    if strategy.quant != precision or strategy.quant_experts != "none":
        raise CannotHonour(
            f"the weights are stored in {precision}, and run in no other precision",
            f"plan with `--quant {precision} --quant-experts none`, or take a checkpoint in 16 bits",
        )
    config.quantization_config = {**facts, "bnb_4bit_compute_dtype": _TORCH_NAMES[strategy.dtype]}
    return True
