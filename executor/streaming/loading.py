"""Loading one layer at a time: transformers' loader does the reading, converting and quantizing, and every
layer leaves the device as soon as its last weight is there.

The loader sets weight by weight in the order of their names, each made on the device when its turn comes.
What stands on the device at once is what is not streamed, one layer, and one weight before its quantization.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from executor.errors import CannotHonour
from executor.load import differing_shape, other_shape
from executor.streaming.arena import Arena
from executor.streaming.disk_tier import Spill, layers_on_disk
from executor.streaming.layers import Stack, find_stack, tied_names
from executor.streaming.residency import Tables, Weight, nowhere, weights_of
from executor.streaming.ring import DiskBlock
from executor.streaming.room import Room
from executor.streaming.slab import Layout, lay_out
from executor.streaming.streamer import StreamedLayer
from planner.placement import spread_evenly


@dataclass(frozen=True)
class Packed:
    """A layer in host memory or on disk, before it has a streamer."""

    module: nn.Module
    readers: tuple[nn.Module, ...]
    layout: Layout
    places: tuple[tuple[tuple[Any, str], ...], ...]
    slab: torch.Tensor | DiskBlock


class Packer:
    """Takes the weights of a model as they are set, and packs every streamed layer that is complete.

    `resident`: how many layers stay on the device. The others go to `arena`, and those that `device_map`
    places on disk to `spill`.
    """

    def __init__(
        self, resident: int, arena: Arena, device_map: Mapping[str, int | str], spill: Spill
    ) -> None:
        self._wanted, self._arena, self._device_map, self._spill = resident, arena, device_map, spill
        self._tables = Tables()
        self._model: Any = None
        self._missing: dict[int, set[str]] = {}
        self._names: dict[int, frozenset[str]] = {}
        self._packed: dict[int, Packed] = {}
        self._on_disk: frozenset[int] = frozenset()
        self.stack: Stack | None = None

    def took(self, model: Any, name: str) -> None:
        """The loader has set the weight `name` of `model`.

        Errors: `CannotHonour` for a model without layers, a number of layers it does not have, or too little
        RAM.
        """
        if self._model is None:
            self._look_at(model)
        assert self.stack is not None
        index = self._index_of(name)
        missing = self._missing.get(index) if index is not None else None
        if index is None or missing is None or name not in missing:
            return
        missing.remove(name)
        if not missing:
            self._packed[index] = self._pack(index)

    def _look_at(self, model: Any) -> None:
        self._model, self.stack = model, find_stack(model)
        total = len(self.stack.layers)
        refuse_too_many(self._wanted, total)
        tied = tied_names(model)
        resident = spread_evenly(self._wanted, total)
        for index in range(total):
            names = self.stack.parameter_names(index, tied)
            if index not in resident and names:
                self._missing[index], self._names[index] = set(names), frozenset(names)
        self._on_disk = layers_on_disk(total, resident, self._device_map)
        self._room = Room(model, self.stack, self._names, self._on_disk)

    def _index_of(self, name: str) -> int | None:
        assert self.stack is not None
        head, _, rest = name.partition(f"{self.stack.name}.")
        number = rest.partition(".")[0]
        return int(number) if not head and number.isdigit() else None

    def _pack(self, index: int) -> Packed:
        assert self.stack is not None
        readers: dict[nn.Module, None] = {}
        weights: list[Weight] = []
        for name in sorted(self._names[index]):
            path, _, leaf = name.rpartition(".")
            module = self._model.get_submodule(path)
            readers[module] = None
            weights += weights_of(module, getattr(module, leaf), self._tables)
        tensors = [weight.tensor for weight in weights]
        layout = lay_out(tensors)
        slab = self._memory_for(index, layout.nbytes)
        for view, weight in zip(layout.views(slab), weights, strict=True):
            view.copy_(weight.tensor)
            for owner, attribute in weight.places:
                setattr(owner, attribute, nowhere(weight.tensor))
        places = tuple(weight.places for weight in weights)
        home = self._keep(index, slab)
        return Packed(self.stack.layers[index], tuple(readers), layout, places, home)

    def _memory_for(self, index: int, nbytes: int) -> torch.Tensor:
        self._room.packing(index, nbytes)
        return self._spill.memory(nbytes) if index in self._on_disk else self._arena.take(nbytes)

    def _keep(self, index: int, slab: torch.Tensor) -> torch.Tensor | DiskBlock:
        if index not in self._on_disk:
            return slab
        return self._spill.add(slab, self._room.on_disk_to_come(index, slab.numel()))

    def close(self) -> None:
        """Give back what is on disk."""
        self._spill.close()

    def layers(self) -> list[StreamedLayer]:
        """The streamed layers in their order, once all are complete."""
        self._spill.finish()
        left = [name for names in self._missing.values() for name in names]
        assert not left, f"never set: {left[:3]}"
        return [
            StreamedLayer(number, packed.module, packed.readers, packed.layout, packed.places, packed.slab)
            for number, (_, packed) in enumerate(sorted(self._packed.items()))
        ]


def refuse_too_many(wanted: int, total: int) -> None:
    """Errors: `CannotHonour` where more layers are to stay on the device than there are."""
    if wanted > total:
        raise CannotHonour(f"--resident-layers {wanted}: the model has {total} layers", f"at most {total}")


@contextmanager
def handing_over(packer: Packer) -> Iterator[None]:
    """Within, transformers' loader shows every weight it sets to `packer`, and makes one at a time.

    Errors: `BadWeights` for a weight of another shape than the model's.
    """
    from transformers import core_model_loading, modeling_utils

    with (
        replaced(core_model_loading, "set_param_for_module", _then(packer.took)),
        # it would reserve the whole model's size on the card
        replaced(modeling_utils, "caching_allocator_warmup", lambda _stock: lambda *_, **__: None),
        one_weight_at_a_time(),
    ):
        yield


def _then(took: Callable[[Any, str], None]) -> Callable[[Any], Any]:
    def around(stock: Any) -> Any:
        def set_and_tell(model: Any, name: str, value: Any, loading_info: Any, *args: Any) -> Any:
            result = stock(model, name, value, loading_info, *args)
            # the loader notes a weight of another shape and leaves its place empty: nothing to pack or stream
            for tensor, *shapes in loading_info.mismatched_keys:
                raise other_shape(tensor, *shapes)
            differing = differing_shape(model.get_submodule(name.rpartition(".")[0]))
            if differing is not None:
                raise other_shape(name, *differing)
            took(model, name)
            return result

        return set_and_tell

    return around


@contextmanager
def replaced(module: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Within, the attribute `name` of a module or class is what `make` makes of it."""
    stock = getattr(module, name)
    setattr(module, name, make(stock))
    try:
        yield
    finally:
        setattr(module, name, stock)


@contextmanager
def one_weight_at_a_time() -> Iterator[None]:
    """Within, the loader makes a weight when its turn to be set comes, not several ahead by threads."""
    name = "HF_DEACTIVATE_ASYNC_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
