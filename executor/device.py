"""The device a candidate runs on, and whether it can do what the candidate asks for."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from executor.errors import CannotHonour, MissingPackage
from planner.types import Candidate, Dtype, Workload

if TYPE_CHECKING:
    import torch


def require_packages(candidate: Candidate, workload: Workload, report_to: str = "none") -> None:
    """Errors: `MissingPackage` naming what the candidate needs and is not installed. Imports nothing."""
    needed = ["torch", "transformers", "accelerate", "safetensors"]
    if candidate.strategy.quant != "none":
        needed.append("bitsandbytes")
    if workload.task == "train" and workload.method != "full":
        needed.append("peft")
    if candidate.strategy.optimizer.endswith("8bit") or candidate.strategy.optimizer.startswith("paged"):
        needed += ["bitsandbytes"] if workload.task == "train" else []
    missing = sorted({name for name in needed if importlib.util.find_spec(name) is None})
    if missing:
        raise MissingPackage(f"{', '.join(missing)} not installed", "pip install 'fitwright[executor]'")
    if report_to == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
        raise MissingPackage("tensorboard is not installed", "pip install tensorboard")


def choose_device(candidate: Candidate) -> torch.device:
    """The device of the first layer: the CPU for placement `cpu`, else the first card.

    Errors: `CannotHonour` when the candidate is for a card and there is none.
    """
    import torch

    if candidate.strategy.placement == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise CannotHonour(
            "the candidate is for a CUDA card and torch sees none here",
            "make the plan on this machine, or for it with `planner plan ... --placement cpu`",
        )
    return torch.device("cuda", min(_first_card(candidate), torch.cuda.device_count() - 1))


def _first_card(candidate: Candidate) -> int:
    cards = [place for place in candidate.device_map.values() if isinstance(place, int)]
    return min(cards, default=0)


def torch_dtype(name: Dtype) -> torch.dtype:
    """The torch dtype of a strategy's dtype."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def check_abilities(candidate: Candidate, workload: Workload, device: torch.device) -> None:
    """Errors: `CannotHonour` when dtype, kernels or optimizer of the candidate do not work on `device`."""
    import torch

    strategy = candidate.strategy
    if device.type == "cuda" and strategy.dtype == "bf16" and not torch.cuda.is_bf16_supported(False):
        raise CannotHonour("this card has no bf16", "make the plan again with `--dtype fp16`")
    if workload.task == "train" and strategy.dtype == "fp16":
        if workload.method == "full":
            raise CannotHonour(
                "full fine-tuning of fp16 weights cannot scale its gradients",
                "plan with `--dtype bf16` or `--dtype fp32`",
            )
        if device.type == "cpu":
            raise CannotHonour(
                "training in fp16 does not work on the CPU", "plan with `--dtype bf16` or `--dtype fp32`"
            )
    if strategy.attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise MissingPackage("flash_attention_2 needs the package flash-attn", "plan with `--attention sdpa`")
    if (
        strategy.kernels == "liger"
        and device.type == "cuda"
        and importlib.util.find_spec("liger_kernel") is None
    ):
        raise MissingPackage(
            "kernels liger need the package liger-kernel", "pip install 'fitwright[executor]'"
        )
    if strategy.quant_experts != "none":
        raise CannotHonour(
            "quantized experts are not built in this engine", "plan with `--quant-experts none`"
        )
    if strategy.speculate != "none":
        raise CannotHonour("speculation is not built in this engine", "plan with `--speculate none`")
