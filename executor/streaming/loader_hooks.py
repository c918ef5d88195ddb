"""Weights that transformers' loader is to set without reading or quantizing anything.

A `StandIn` goes through the loader in place of a weight: where the loader would read, convert and quantize,
it comes out as it is, and where the loader would set it, it makes the parameter itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from executor.streaming.loading import replaced

Make = Callable[[Any, str], None]
"""Sets the weight of that name in the model."""


class StandIn:
    """Passes for an unread tensor of a checkpoint."""

    def __init__(self, make: Make) -> None:
        self.make = make

    def __getitem__(self, _index: Any) -> StandIn:
        return self

    def to(self, *_: Any, **__: Any) -> StandIn:
        """There is nothing to move or cast."""
        return self


@contextmanager
def reading_instead(substitute: Callable[[dict[str, Any]], Mapping[str, Any]]) -> Iterator[None]:
    """Within, the loader reads from what `substitute` makes of the checkpoint's unread tensors by name."""
    from transformers import modeling_utils

    def around(stock: Any) -> Any:
        def convert_and_load(*args: Any, state_dict: Any, **kwargs: Any) -> Any:
            return stock(*args, state_dict=substitute(state_dict), **kwargs)

        return convert_and_load

    with replaced(modeling_utils, "convert_and_load_state_dict_in_model", around):
        yield


@contextmanager
def standing_in(wanted: Callable[[Any, str], bool], make: Make) -> Iterator[None]:
    """Within, weights `wanted` (of a model, by name) are not read: `make` sets them."""
    from transformers import core_model_loading

    def instead_of_converting(stock: Any) -> Any:
        def convert(self: Any, layer_name: str, model: Any = None, **kwargs: Any) -> Any:
            if len(self.target_patterns) == 1 and wanted(model, layer_name):
                return {layer_name: StandIn(make)}
            return stock(self, layer_name, model=model, **kwargs)

        return convert

    def instead_of_setting(stock: Any) -> Any:
        def set_param(model: Any, name: str, value: Any, loading_info: Any, *args: Any) -> Any:
            if not isinstance(value, StandIn):
                return stock(model, name, value, loading_info, *args)
            loading_info.missing_keys.discard(name)
            value.make(model, name)
            return None

        return set_param

    with ExitStack() as stack:
        for kind in _transforms(core_model_loading.WeightTransform):
            stack.enter_context(replaced(kind, "convert", instead_of_converting))
        stack.enter_context(replaced(core_model_loading, "set_param_for_module", instead_of_setting))
        yield


def _transforms(kind: type) -> Iterator[type]:
    """Every kind of conversion that has a way of its own."""
    for sub in kind.__subclasses__():
        if "convert" in vars(sub):
            yield sub
        yield from _transforms(sub)


def owner_of(model: Any, name: str) -> tuple[Any, str]:
    """The module that holds the weight `name`, and its attribute."""
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def set_weight(model: Any, name: str, value: Any) -> None:
    """Put a parameter, or what may become a buffer, in its place, as the loader does."""
    module, leaf = owner_of(model, name)
    value = value.data if leaf in module._buffers else value
    value._is_hf_initialized = True  # else it would be drawn at random
    setattr(module, leaf, value)
