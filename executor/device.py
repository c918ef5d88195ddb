"""The device a candidate runs on, and whether it can do what the candidate asks for."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from executor.errors import CannotHonour, MissingPackage
from planner.types import Candidate, Dtype, Strategy, Workload

if TYPE_CHECKING:
    import torch


def require_packages(candidate: Candidate, workload: Workload, report_to: str = "none") -> None:
    """Errors: `MissingPackage` naming what the candidate needs and is not installed. Imports nothing."""
    needed = ["torch", "transformers", "accelerate", "safetensors"]
    if candidate.strategy.quant != "none":
        needed.append("bitsandbytes")
    if workload.task == "train" and workload.method != "full":
        needed.append("peft")
    optimizer = candidate.strategy.optimizer
    if workload.task == "train" and (optimizer.endswith("8bit") or optimizer.startswith("paged")):
        needed.append("bitsandbytes")
    missing = sorted({name for name in needed if not _installed(name)})
    if missing:
        raise MissingPackage(f"{', '.join(missing)} not installed", "pip install 'fitwright[executor]'")
    if report_to == "tensorboard" and not _installed("tensorboard"):
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
    # where one card is made visible it is number 0, whatever the plan calls it
    first = min(_cards(candidate), default=0)
    return torch.device("cuda", min(first, torch.cuda.device_count() - 1))


def _cards(candidate: Candidate) -> set[int]:
    return {place for place in candidate.device_map.values() if isinstance(place, int)}


def torch_dtype(name: Dtype) -> torch.dtype:
    """The torch dtype of a strategy's dtype."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[name]


def check_abilities(candidate: Candidate, workload: Workload, device: torch.device) -> None:
    """Errors: `CannotHonour` for a setting of the candidate that does not work on `device` or that nothing
    here carries out, `MissingPackage` for kernels that are not installed."""
    strategy = candidate.strategy
    _require_cards(candidate, workload)
    _require_dtype(strategy, workload, device)
    if strategy.attention == "flash_attention_2" and not _installed("flash_attn"):
        raise MissingPackage("flash_attention_2 needs the package flash-attn", "plan with `--attention sdpa`")
    if strategy.kernels == "liger" and device.type == "cuda" and not _installed("liger_kernel"):
        raise MissingPackage(
            "kernels liger need the package liger-kernel", "pip install 'fitwright[executor]'"
        )
    if strategy.speculate != "none" and strategy.cache in ("static", "quantized"):
        raise CannotHonour(
            f"speculation takes rejected tokens back, which a {strategy.cache} cache cannot do",
            "plan with `--cache dynamic` or `--speculate none`",
        )
    if strategy.speculate == "draft" and strategy.draft is None:
        raise CannotHonour("the candidate drafts with no model", "make the plan again with --draft MODEL")
    if workload.task == "train" and strategy.activation_offload and not strategy.gradient_checkpointing:
        raise CannotHonour(
            "activation offload moves checkpoints, and checkpointing is off",
            "plan with `--gradient-checkpointing`",
        )


def _require_cards(candidate: Candidate, workload: Workload) -> None:
    import torch

    cards, seen = _cards(candidate), torch.cuda.device_count()
    # training runs one replica on the first card, whatever else the plan names
    if workload.task == "infer" and len(cards) > 1 and max(cards) >= seen:
        raise CannotHonour(
            f"the candidate splits its layers over cards {', '.join(map(str, sorted(cards)))} and torch sees "
            f"{seen}",
            "make the plan again on this machine; CUDA_VISIBLE_DEVICES may hide cards",
        )


def _require_dtype(strategy: Strategy, workload: Workload, device: torch.device) -> None:
    import torch

    if device.type == "cuda" and strategy.dtype == "bf16" and not torch.cuda.is_bf16_supported(False):
        raise CannotHonour("this card has no bf16", "make the plan again with `--dtype fp16`")
    if workload.task != "train" or strategy.dtype != "fp16":
        return
    instead = "plan with `--dtype bf16` or `--dtype fp32`"
    if workload.method == "full":
        raise CannotHonour("full fine-tuning of fp16 weights cannot scale its gradients", instead)
    if device.type == "cpu":
        raise CannotHonour("training in fp16 does not work on the CPU", instead)


def _installed(package: str) -> bool:
    """Imports nothing."""
    return importlib.util.find_spec(package) is not None
