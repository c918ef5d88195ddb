"""Other ends of a model than transformers' own: liger's kernels, and the executor's loss in chunks.

liger's Python code is run as it stands; only the launches of its Triton kernels, which work on memory that is
not there, do nothing. The loss in chunks repeats what `executor.losses` does, statement by statement; a test
holds the two against each other.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from planner.errors import BadOption
from planner.types import Strategy

CHUNK = 512
"""Tokens whose logits exist at once (executor.losses)."""


def ending(model: Any, how: Strategy, notes: list[str]) -> contextlib.AbstractContextManager[None]:
    """The loss and kernels of a strategy, while the context is open; what was left out in `notes`."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if how.kernels == "liger":
        if _liger_knows(inner.config):
            return liger_kernels(inner)
        notes.append(f"liger has no kernels for {inner.config.model_type}: traced without")
    return chunked_loss(inner) if how.loss == "fused" else contextlib.nullcontext()


def _liger_knows(config: Any) -> bool:
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError:
        raise BadOption(
            "--kernels liger is traced through liger's own code, which is not installed here",
            "install liger-kernel, or leave out --exact",
        ) from None
    return config.model_type in MODEL_TYPE_TO_APPLY_LIGER_FN


@contextlib.contextmanager
def liger_kernels(model: Any) -> Iterator[None]:
    """liger's modules in the model (`use_liger_kernel`), its launches silenced."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from triton.runtime.autotuner import Autotuner, Heuristics
    from triton.runtime.jit import JITFunction

    module = sys.modules[type(model).__module__]
    before = dict(vars(module))  # liger replaces functions of the modelling file for every model
    with contextlib.ExitStack() as stack:
        for kernel in (JITFunction, Autotuner, Heuristics):
            stack.enter_context(mock.patch.object(kernel, "run", _nothing))
        properties = mock.Mock(multi_processor_count=132)
        stack.enter_context(mock.patch("torch.cuda.get_device_properties", lambda *_: properties))
        try:
            _apply_liger_kernel_to_instance(model=model)
            yield
        finally:
            vars(module).update(before)


def _nothing(*_: Any, **__: Any) -> None:
    """A kernel launch without a card."""


@contextlib.contextmanager
def chunked_loss(model: Any) -> Iterator[None]:
    """Within, the output projection hands hidden states through and the loss projects them in chunks."""
    head = model.get_output_embeddings()
    text = model.config.get_text_config()
    softcap = getattr(text, "final_logit_softcapping", None)
    project = head.forward
    previous = model.loss_function

    def loss(logits: torch.Tensor, labels: torch.Tensor, vocab_size: int, **kwargs: Any) -> torch.Tensor:
        return _chunks(logits, labels, project, softcap, kwargs.get("num_items_in_batch"))

    if softcap is not None:
        text.final_logit_softcapping = None
    head.forward = lambda hidden: hidden
    model.loss_function = loss
    try:
        yield
    finally:
        del head.forward
        model.loss_function = previous
        if softcap is not None:
            text.final_logit_softcapping = softcap


def _chunks(
    hidden: torch.Tensor, labels: torch.Tensor, project: Any, softcap: Any, items: Any
) -> torch.Tensor:
    """hidden [B, S, D], labels [B, S] -> the mean loss."""
    from torch.utils.checkpoint import checkpoint

    flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    targets = labels[:, 1:].reshape(-1)

    def part(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = project(states).float()
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        return torch.nn.functional.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum")

    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, flat.shape[0], CHUNK):
        chunk = slice(start, start + CHUNK)
        total = total + checkpoint(part, flat[chunk], targets[chunk], use_reentrant=False)
    if items is None:
        items = (targets != -100).sum().clamp(min=1)
    return total / items
