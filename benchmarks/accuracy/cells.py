"""Cells of the accuracy grid: a job, how its memory is measured, and which half it belongs to.

A cell's id is the digest of what it asks; its half follows from the id, so nobody chooses it: constants may
be fitted on `fit`, the estimator is judged on `judge`.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import UNSET, Struct, UnsetType

from planner.estimate import estimate
from planner.machine import machine_from_gpus
from planner.types import Estimate, Machine, Strategy, Workload
from planner.units import GIB
from profiles.catalogue import load_model, profile_from_config
from profiles.config import load_config_file
from profiles.errors import UnknownModel
from profiles.hardware import load_gpu
from profiles.schema import ModelProfile

HERE = Path(__file__).resolve().parent
GRID = HERE / "grid.jsonl"
PREDICTIONS = HERE / "predictions.jsonl"
RESULTS = HERE / "results.jsonl"
CONFIGS = HERE / "configs"
GPU = "h200"

Allocator = Literal["stock", "expandable"]
Data = Literal["random", "ragged", "packed"]
Half = Literal["fit", "judge"]


class Cell(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One line of grid.jsonl."""

    id: str = ""
    half: Half = "fit"
    model: str
    """An id of the catalogue, or of a file in `configs/`."""
    workload: Workload
    strategy: Strategy
    data: Data = "random"
    """random: sequences of full length; ragged: lengths from a quarter up to the full one, padded; packed."""
    allocators: tuple[Allocator, ...] = ("stock",)
    vram_gib: int | None = None
    """The card that layers are placed for, where some of them leave it."""
    timed: bool = False
    """Measured for its speed, alone on the machine; no cap is searched."""
    seconds: float | UnsetType = UNSET
    """About how long it takes."""

    @property
    def group(self) -> str:
        """What is averaged together: task and precision, or method and checkpointing."""
        if self.workload.task == "infer":
            place = "" if self.strategy.placement == "full_gpu" else f", {self.strategy.placement}"
            return f"infer {self.strategy.quant}{place}"
        return self.workload.method + ("" if self.strategy.gradient_checkpointing else ", no checkpointing")

    @property
    def name(self) -> str:
        """A few words for a person."""
        work, how = self.workload, self.strategy
        if work.task == "infer":
            shape = f"{work.batch_size}x{work.prompt_tokens}+{work.new_tokens} {how.quant} {how.cache}"
        else:
            shape = f"{work.method} {work.batch_size}x{work.seq_len} {how.optimizer}"
        return f"{self.id} {self.model} {work.task} {shape}"


_LATER = b',"prefill_chunk_tokens":0'
"""A field of `Strategy` younger than the grid; at its default it changes no id."""


def identified(cell: Cell) -> Cell:
    """The cell with the id and the half that follow from what it asks."""
    asked = msgspec.structs.replace(cell, id="", half="fit", seconds=UNSET)
    text = msgspec.json.encode(asked, order="deterministic").replace(_LATER, b"")
    digest = hashlib.sha256(text).hexdigest()
    return msgspec.structs.replace(cell, id=digest[:10], half="judge" if int(digest[10], 16) % 2 else "fit")


def read_cells(path: Path = GRID) -> list[Cell]:
    """Every cell of a grid file."""
    return [msgspec.json.decode(line, type=Cell) for line in path.read_bytes().splitlines()]


@lru_cache(maxsize=256)
def model_of(name: str) -> ModelProfile:
    """Facts of a cell's model: from the catalogue, else from `configs/`."""
    try:
        return load_model(name)
    except UnknownModel:
        return profile_from_config(load_config_file(CONFIGS / f"{name}.json"), name)


@lru_cache(maxsize=64)
def machine_of(vram_gib: int | None = None) -> Machine:
    """The measured machine: one card, of `vram_gib` where layers are placed for a smaller one."""
    size = None if vram_gib is None else vram_gib * GIB
    return machine_from_gpus([(load_gpu(GPU), 1)], vram_bytes=size, ram_bytes=128 * GIB, disk_bytes=64 * GIB)


def predict(cell: Cell) -> Estimate:
    """Today's estimate of a cell. Errors: those of the estimator, where it refuses."""
    return estimate(model_of(cell.model), machine_of(cell.vram_gib), cell.workload, cell.strategy)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; none where there is no file. A line cut off by a kill is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows
