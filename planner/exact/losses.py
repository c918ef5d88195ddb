"""Other ends of a model than transformers' own: liger's kernels, and the executor's loss in chunks.

liger's Python code is run as it stands; only the launches of its Triton kernels, which work on memory that is
not there, do nothing.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from planner.errors import BadOption
from planner.exact.chunked_loss import chunked_loss
from planner.types import Strategy


def ending(
    model: Any, how: Strategy, notes: list[str], cuda: Any = None
) -> contextlib.AbstractContextManager[None]:
    """The loss and kernels of a strategy, while the context is open; what was left out in `notes`.

    `cuda`: the card that must be there again when chunks are recomputed.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if how.kernels == "liger":
        if _liger_knows(inner.config):
            return liger_kernels(inner)
        notes.append(f"liger has no kernels for {inner.config.model_type}: traced without")
    if how.loss != "fused":
        return contextlib.nullcontext()
    there = {} if cuda is None else {"determinism_check": "none", "context_fn": _with(cuda)}
    return chunked_loss(inner, **there)


def _with(card: Any) -> Callable[[], tuple[Any, Any]]:
    """Contexts of a checkpointed pass and of its recomputation."""
    return lambda: (contextlib.nullcontext(), card)


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
