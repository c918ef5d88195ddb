"""A strategy's settings as transformers' TrainingArguments, and the loss that goes with them."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from executor.losses import chunked_loss
from executor.options import LEARNING_RATE, RunOptions
from planner.memory.optimizer import OPTIMIZERS
from planner.types import Strategy, Workload

if TYPE_CHECKING:
    import torch

_UNPAGED = {"paged_ademamix_32bit": "ademamix", "paged_ademamix_8bit": "ademamix_8bit"}
"""What runs on the CPU: bitsandbytes' other paged optimizers leave paging out there by themselves, these
ask for managed memory (optim/ademamix.py, `get_state_buffer`)."""


def training_arguments(
    workload: Workload,
    strategy: Strategy,
    options: RunOptions,
    output: Path,
    device: torch.device,
    total: int,
    notes: list[str],
) -> Any:
    """TrainingArguments for `total` optimizer steps; what had to differ from the strategy goes to `notes`."""
    from transformers import TrainingArguments

    on_card = device.type == "cuda"
    if not on_card and "paged" in strategy.optimizer:
        notes.append(f"{strategy.optimizer}: paging needs a CUDA card; the same optimizer ran unpaged")
    name = OPTIMIZERS[strategy.optimizer].runs_as or strategy.optimizer
    if name != strategy.optimizer:
        notes.append(f"{strategy.optimizer} is {name} in transformers")
    if not on_card:
        name = _UNPAGED.get(name, name)
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=workload.batch_size,
        per_device_eval_batch_size=workload.batch_size,
        gradient_accumulation_steps=workload.gradient_accumulation_steps,
        max_steps=total,
        learning_rate=LEARNING_RATE[workload.method]
        if options.learning_rate is None
        else options.learning_rate,
        lr_scheduler_type=_schedule(options),
        warmup_steps=math.ceil(options.warmup_ratio * total),
        optim=name,
        bf16=strategy.dtype == "bf16",
        fp16=strategy.dtype == "fp16",
        use_cpu=not on_card,
        gradient_checkpointing=strategy.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if strategy.gradient_checkpointing else None,
        use_liger_kernel=strategy.kernels == "liger" and on_card,
        save_strategy="steps",
        save_steps=_save_steps(options, total),
        logging_strategy="no",
        report_to=[],
        prediction_loss_only=True,
        remove_unused_columns=False,
        dataloader_pin_memory=on_card,
        disable_tqdm=True,
        seed=options.seed,
        data_seed=options.seed,
        full_determinism=options.deterministic,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several visible cards would silently become DataParallel
    return arguments


def _schedule(options: RunOptions) -> str:
    """transformers' name; its `constant` would pass over a warm-up without a word."""
    warm = options.lr_schedule == "constant" and options.warmup_ratio > 0
    return "constant_with_warmup" if warm else options.lr_schedule


def _save_steps(options: RunOptions, total: int) -> int:
    if options.save_steps is not None:
        return options.save_steps
    return total + 1 if options.rehearse else max(1, total // 10)


def choose_loss(
    strategy: Strategy, device: torch.device, model: Any, notes: list[str]
) -> contextlib.AbstractContextManager[None]:
    """The chunked loss where the fused one is asked for and liger's kernels do not bring it."""
    liger = strategy.kernels == "liger" and device.type == "cuda"
    if strategy.kernels == "liger" and not liger:
        notes.append("kernels liger need a CUDA card; torch's ran instead")
    if liger:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

        if model.config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN:
            return contextlib.nullcontext()
        notes.append(f"liger has no kernels for {model.config.model_type}; torch's ran instead")
    return chunked_loss(model) if strategy.loss == "fused" else contextlib.nullcontext()
