"""Engines: ways to hold a model's layers while it runs. One module each; `find_engine` knows which are built.

An engine module has `load(request) -> Loaded`. Everything above it (adapters, training, generation,
measuring) is the same for all engines.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from executor.errors import CannotHonour
from executor.source import ModelSource
from planner.types import Candidate, Engine, Strategy, Workload

if TYPE_CHECKING:
    import torch

BUILT: dict[Engine, str] = {
    "resident": "executor.engines.resident",
    "accelerate": "executor.engines.accelerate",
    "stream": "executor.engines.stream",
}


@dataclass(frozen=True, kw_only=True)
class LoadRequest:
    """What an engine needs to know to load."""

    source: ModelSource
    candidate: Candidate
    workload: Workload
    device: torch.device
    scratch: Path
    """A folder of the run's own that an engine may make; the engine removes it when it closes."""
    seed: int
    remote_code: bool = False
    resident_layers: int | None = None
    pack: bool = False
    """Write a slab file first where there is none; engine stream alone can."""


@dataclass(kw_only=True)
class Loaded:
    """A model ready to run, and what its engine has to say in the report."""

    model: Any
    tokenizer: Any
    layers_resident: int
    layers_streamed: int = 0
    layers_on_disk: int = 0
    """Of the streamed ones."""
    slots: int = 0
    pinned_bytes: int = 0
    outside_on_host: tuple[str, ...] = ()
    """Embeddings and output projections whose weights wait in host memory."""
    notes: list[str] = field(default_factory=list)
    """Where loading had to differ from the candidate's strategy."""
    traffic: Callable[[], dict[str, Any]] = field(default=dict)
    """`bytes_streamed`, `link_bytes_per_s`, `disk_bytes_read` and `disk_bytes_per_s` so far, from engines
    that move weights."""
    close: Callable[[], None] = field(default=lambda: None)


def attention_notes(model: Any, strategy: Strategy) -> list[str]:
    """What to say where transformers' class of the model refused the strategy's attention."""
    ran = model.config._attn_implementation
    if ran == strategy.attention:
        return []
    return [f"this model has no {strategy.attention} attention in transformers; {ran} ran instead"]


def find_engine(name: Engine, resident_layers: int | None) -> Callable[[LoadRequest], Loaded]:
    """The load function of an engine.

    Errors: `CannotHonour` for an engine that is not built, or a residency that the engine does not have.
    """
    module = BUILT.get(name)
    if module is None:
        raise CannotHonour(
            f"engine {name} is not built in this version",
            f"built: {', '.join(BUILT)}; choose one with --engine",
        )
    if name == "resident" and resident_layers is not None:
        raise CannotHonour(
            "engine resident keeps every layer on the device; --resident-layers has no meaning for it",
            "leave --resident-layers away",
        )
    if name == "accelerate" and resident_layers is not None:
        raise CannotHonour(
            "engine accelerate keeps the layers on the card that the plan says; --resident-layers cannot "
            "change that",
            "leave --resident-layers away, or plan with another --vram",
        )
    load: Callable[[LoadRequest], Loaded] = importlib.import_module(module).load
    return load
