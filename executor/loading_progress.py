"""How far the loader is: it goes through the tensors in a loop that shows a bar, which is ours to replace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from executor import ui

_LOADING = "Loading weights"
"""What transformers calls its bar (`core_model_loading.convert_and_load_state_dict_in_model`)."""


class _Counted:
    """Stands for a tqdm bar over tensors and tells `steps` about each."""

    def __init__(self, tensors: Iterable[Any], total: int, steps: ui.Steps) -> None:
        self._tensors, self._steps = tensors, steps
        steps.count(total, "tensors")

    def __iter__(self) -> Iterator[Any]:
        done = 0
        for done, tensor in enumerate(self._tensors, start=1):
            yield tensor
            self._steps.update(done)

    def __enter__(self) -> _Counted:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def __getattr__(self, _name: str) -> Callable[..., None]:
        return lambda *_, **__: None


@contextmanager
def counting_tensors(steps: ui.Steps) -> Iterator[None]:
    """While a model is loaded in this block, `steps` counts its tensors; where the loader lets nobody look,
    it shows time and memory alone."""
    from transformers.utils import logging

    set_hook = getattr(logging, "set_tqdm_hook", None)
    if set_hook is None:
        yield
        return

    def hook(factory: Callable[..., Any], args: tuple[Any, ...], named: dict[str, Any]) -> Any:
        tensors = args[0] if args else named.get("iterable")
        if named.get("desc") == _LOADING and hasattr(tensors, "__len__"):
            return _Counted(tensors, len(tensors), steps)
        return factory(*args, **named)

    before = set_hook(hook)
    try:
        yield
    finally:
        set_hook(before)
