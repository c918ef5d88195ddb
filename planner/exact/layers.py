"""Decoder layers: where they are, which are alike, and a model with only as many of each as must be run.

Layers are alike when their modules have the same classes, the same parameters and the same plain settings
(a window, a kind of attention). Of each kind the first, the second and the last stay: what the first and the
last do differently belongs to their place, what lies between repeats.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

LIST_NAMES = ("layers", "h", "blocks", "block", "layer")


@dataclass(frozen=True)
class Layers:
    """The decoder layers of a model and what of them is run."""

    kinds: tuple[int, ...]
    """Kind of every layer of the whole model, first to last."""
    kept: tuple[int, ...]
    """Indices of the layers that are run, ascending."""
    path: str

    @property
    def whole(self) -> bool:
        """Is every layer run?"""
        return len(self.kept) == len(self.kinds)

    def sample(self, index: int) -> int:
        """Position among the kept layers of the one that stands for layer `index`."""
        if index in self.kept:
            return self.kept.index(index)
        kind = self.kinds[index]
        alike = [i for i in self.kept if self.kinds[i] == kind and i not in (0, len(self.kinds) - 1)]
        if not alike:
            alike = [i for i in self.kept if self.kinds[i] == kind]
        return self.kept.index(min(alike, key=lambda i: abs(i - index)))

    def stands_for(self) -> dict[int, int]:
        """How many layers of the whole model each kept position stands for."""
        counts = dict.fromkeys(range(len(self.kept)), 0)
        for index in range(len(self.kinds)):
            counts[self.sample(index)] += 1
        return counts


def find_layers(model: Any) -> tuple[str, torch.nn.ModuleList] | None:
    """Path and list of the decoder layers: the longest list of one length with the config's count."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    best: tuple[str, torch.nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.ModuleList) or name.rpartition(".")[2] not in LIST_NAMES:
            continue
        if len(module) == count and not any(part in name for part in ("vision", "visual", "audio")):
            best = min(filter(None, (best, (name, module))), key=lambda item: len(item[0]))
    return best


def signature(layer: torch.nn.Module) -> tuple[Any, ...]:
    """What makes layers alike."""
    parts: list[Any] = []
    for name, module in layer.named_modules():
        plain = tuple(
            (key, value)
            for key, value in sorted(vars(module).items())
            if key not in ("layer_idx", "layer_id", "layer_number", "idx")
            and isinstance(value, (int, float, str, bool))
        )
        parts.append((name, type(module).__name__, plain))
    parts += [(name, tuple(p.shape), str(p.dtype)) for name, p in layer.named_parameters()]
    return tuple(parts)


def survey(model: Any, reduce: bool = True, attention_only: bool = False) -> Layers | None:
    """The layers of a model and which of them to run; None where they cannot be told apart.

    `attention_only`: nothing before the first layer with attention is trained, so layers there are not like
    those that follow.
    """
    found = find_layers(model)
    if found is None:
        return None
    path, layers = found
    seen: dict[tuple[Any, ...], int] = {}
    types = getattr(model.config.get_text_config(), "layer_types", None) or [None] * len(layers)
    if len(types) != len(layers):
        types = [None] * len(layers)
    first = next((i for i, layer in enumerate(layers) if _attends(layer)), 0) if attention_only else 0
    places = [max(-1, min(1, i - first)) if first else 0 for i in range(len(layers))]
    keys = [(types[i], places[i], *signature(layer)) for i, layer in enumerate(layers)]
    kinds = tuple(seen.setdefault(key, len(seen)) for key in keys)
    if not reduce or _shares_between_layers(model):
        return Layers(kinds, tuple(range(len(kinds))), path)
    keep: set[int] = {0, len(kinds) - 1}
    for kind in set(kinds):
        places = [i for i, k in enumerate(kinds) if k == kind]
        inner = [i for i in places if i not in (0, len(kinds) - 1)]
        keep.update(inner[:1])
        if len(places) > 2 and kind == kinds[-1] and len(inner) > 1:
            keep.add(inner[-1])
    return Layers(kinds, tuple(sorted(keep)), path)


def _attends(layer: torch.nn.Module) -> bool:
    return any("attn" in name or "attention" in name for name, _ in layer.named_modules())


def _shares_between_layers(model: Any) -> bool:
    """Do layers read what earlier ones left (shared keys and values)? Then none can be left out."""
    text = model.config.get_text_config()
    return bool(getattr(text, "num_kv_shared_layers", 0))


def cut(model: Any, layers: Layers) -> None:
    """Leave only the kept layers in the model, renumbered, and its config to match."""
    if layers.whole:
        return
    parent = model.get_submodule(layers.path.rpartition(".")[0])
    name = layers.path.rpartition(".")[2]
    old = getattr(parent, name)
    setattr(parent, name, torch.nn.ModuleList([old[i] for i in layers.kept]))
    for position, layer in enumerate(getattr(parent, name)):
        for module in layer.modules():
            for key in ("layer_idx", "layer_id", "layer_number"):
                if isinstance(vars(module).get(key), int):
                    setattr(module, key, position)
    count = len(layers.kinds)
    for config in _configs(model):
        for key, value in list(vars(config).items()):
            if isinstance(value, (list, tuple)) and len(value) == count:
                setattr(config, key, type(value)(value[i] for i in layers.kept))
        if getattr(config, "num_hidden_layers", None) == count:
            config.num_hidden_layers = len(layers.kept)
    if getattr(parent, "num_hidden_layers", None) == count:
        parent.num_hidden_layers = len(layers.kept)


def _configs(model: Any) -> Iterator[Any]:
    seen: set[int] = set()
    text = model.config.get_text_config()
    for config in (model.config, text, *(getattr(m, "config", None) for m in model.modules())):
        if config is not None and id(config) not in seen:
            seen.add(id(config))
            yield config
