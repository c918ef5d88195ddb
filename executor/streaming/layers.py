"""Finding a model's repeated layers by structure, and the parameters of each that can be streamed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from executor.errors import CannotHonour

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Stack:
    """The repeated layers of a model, in the order they run."""

    name: str
    """The list's own name, like `model.layers`."""
    owner: nn.Module
    """The module that runs them."""
    layers: tuple[nn.Module, ...]

    def parameter_names(self, index: int, tied: frozenset[str]) -> set[str]:
        """Full names of the parameters of layer `index` that can be streamed.

        Left on the device: weights tied to others, and those that belong to the layer itself rather than to
        a module in it, since nothing tells when a layer that is computed again reads its own.
        """
        prefix = f"{self.name}.{index}"
        names = (name for name, _ in self.layers[index].named_parameters())
        return {f"{prefix}.{name}" for name in names if "." in name} - tied


def find_stack(model: Any) -> Stack:
    """The decoder layers of `model`: the outermost `ModuleList` of modules with the most weights.

    Works on a model on the meta device. Errors: `CannotHonour` where there is none.
    """
    from torch import nn

    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    }
    outermost = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    sizes = Counter({name: sum(p.numel() for p in lists[name].parameters()) for name in outermost})
    if not sizes or not max(sizes.values()):
        raise CannotHonour(
            f"{type(model).__name__} has no list of layers to stream", "--engine resident or accelerate"
        )
    name = sizes.most_common(1)[0][0]
    owner = model.get_submodule(name.rpartition(".")[0])
    return Stack(name, owner, tuple(lists[name]))


def put_checkpointing_back(layers: Sequence[nn.Module], wrapper: type) -> None:
    """Where a layer's checkpointing function is a `wrapper`, have it be the `stock` one in it again."""
    for layer in layers:
        wrapped = getattr(layer, "_gradient_checkpointing_func", None)
        if isinstance(wrapped, wrapper):
            layer._gradient_checkpointing_func = wrapped.stock  # type: ignore[attr-defined, assignment]


def tied_names(model: Any) -> frozenset[str]:
    """Names of all parameters that share their weights with another one."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return frozenset(tied) | frozenset(tied.values())
