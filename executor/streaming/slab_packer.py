"""Packing a model while transformers' loader sets its weights: each complete layer goes to the file and away.

What stands in memory at once is one layer, one weight before its quantization, and the writer's buffers.
Weights that are tied to others wait for the end: only then it shows whether the checkpoint ties them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from executor.streaming.forms import form_of
from executor.streaming.layers import Stack, find_stack, tied_names
from executor.streaming.loader_hooks import owner_of, set_weight
from executor.streaming.residency import Tables, Weight, nowhere, weights_of
from executor.streaming.slab_file import WeightEntry
from executor.streaming.slab_writer import SlabWriter


class SlabPacker:
    """Hands layers and other weights of a model to `writer`. `packed` is told how many layers of how many are
    done."""

    def __init__(self, writer: SlabWriter, packed: Callable[[int, int], None]) -> None:
        self._writer, self._packed = writer, packed
        self._tables = Tables()
        self._model: Any = None
        self._stack: Stack | None = None
        self._tied: frozenset[str] = frozenset()
        self._layer_of: dict[str, int] = {}
        self._missing: dict[int, set[str]] = {}
        self._names: dict[int, frozenset[str]] = {}
        self._waiting: dict[str, torch.Tensor] = {}
        self._done = writer.done

    def took(self, model: Any, name: str) -> None:
        """The loader has set the weight `name` of `model`.

        Errors: `CannotHonour` for a model without layers; what stopped the writing.
        """
        self._look_at(model)
        layer = self._layer_of.get(name)
        if self.has(model, name):
            self._drop(name)
        elif layer is not None:
            self._missing[layer].discard(name)
            if not self._missing[layer]:
                self._write(layer, sorted(self._names[layer]))
                self._say()
        elif name in self._tied:
            self._waiting[name] = _weight(model, name)
        else:
            self._write(None, [name])

    def has(self, model: Any, name: str) -> bool:
        """Is the weight `name` in the file already, so that it need not be read?"""
        self._look_at(model)
        return name in self._done and name not in self._tied

    def skip(self, model: Any, name: str) -> None:
        """Set such a weight to a stand-in of its shape."""
        module, leaf = owner_of(model, name)
        hollow = torch.zeros((), dtype=torch.bool).expand(getattr(module, leaf).shape)
        set_weight(model, name, torch.nn.Parameter(hollow, requires_grad=False))
        layer = self._layer_of.get(name)
        if layer is not None:
            self._missing[layer].discard(name)
            if not self._missing[layer]:
                self._say()

    def finish(self) -> None:
        """Write what waited, once loading is over. Errors: what stopped the writing."""
        for name, weight in self._waiting.items():
            tied = _weight(self._model, name) is not weight  # to another one, after all
            if not tied and name not in self._done:
                self._write(None, [name])

    def _look_at(self, model: Any) -> None:
        if self._model is not None:
            return
        self._model, self._stack, self._tied = model, find_stack(model), tied_names(model)
        for index in range(len(self._stack.layers)):
            names = self._stack.parameter_names(index, self._tied)
            self._missing[index], self._names[index] = set(names), frozenset(names)
            self._layer_of |= dict.fromkeys(names, index)

    def _say(self) -> None:
        self._packed(sum(not missing for missing in self._missing.values()), len(self._missing))

    def _write(self, layer: int | None, names: Sequence[str]) -> None:
        entries, found = [], []
        for name in names:
            weights = self._weights(name)
            module, leaf = owner_of(self._model, name)
            form = form_of(getattr(module, leaf), self._writer.number_of)
            entries.append(WeightEntry(name=name, pieces=len(weights), form=form))
            found += weights
        self._writer.add(layer, entries, [weight.tensor for weight in found])
        _hollow(found)

    def _weights(self, name: str) -> list[Weight]:
        module, leaf = owner_of(self._model, name)
        return list(weights_of(module, getattr(module, leaf), self._tables))

    def _drop(self, name: str) -> None:
        _hollow(self._weights(name))


def _weight(model: Any, name: str) -> torch.Tensor:
    module, leaf = owner_of(model, name)
    weight: torch.Tensor = getattr(module, leaf)
    return weight


def _hollow(weights: Sequence[Weight]) -> None:
    for weight in weights:
        for owner, attribute in weight.places:
            setattr(owner, attribute, nowhere(weight.tensor))
