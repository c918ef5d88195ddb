"""Where slab files are kept and looked for: beside the weights, else in Fitwright's data folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from executor.errors import BadWeights, CannotWrite
from executor.source import ModelSource
from executor.streaming.recipe import difference
from executor.streaming.slab_file import SUFFIX, SlabFile
from planner.inspect.probes import data_folder
from planner.inspect.system import System
from planner.types import Strategy


def find_slab_file(
    source: ModelSource, strategy: Strategy, recipe: dict[str, Any], replace: bool = False
) -> tuple[SlabFile | None, list[str]]:
    """The file with this recipe, and what to say about files that were passed over.

    `replace`: one that is damaged is passed over, too, since a new one will take its place.

    Errors: `BadWeights` naming a file that is cut short, damaged or unreadable.
    """
    notes = []
    for path in _places(source, strategy):
        try:
            found = SlabFile.open(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            notes.append(f"{path} is not used: {error.strerror}")
            continue
        except BadWeights as error:
            if not replace:
                raise
            notes.append(str(error))
            continue
        differs = difference(found.index.recipe, recipe)
        if differs is None:
            return found, notes
        notes.append(f"{path} is not used: {differs}")
    return None, notes


def any_there(source: ModelSource, strategy: Strategy) -> bool:
    """Is there a file that could be it?"""
    return any(path.exists() for path in _places(source, strategy))


def place_for(source: ModelSource, strategy: Strategy) -> Path:
    """Where to write the slab file: the first place that can be written.

    Errors: `CannotWrite` where there is none.
    """
    for path in _places(source, strategy):
        if _writable(path.parent):
            return path
    raise CannotWrite(
        "there is no folder to keep the slab file in", "set FITWRIGHT_HOME to one you may write"
    )


def link_to(path: Path, source: ModelSource, strategy: Strategy) -> bool:
    """Let runs find the slab file `path`, wherever it is; whether that could be done.

    The link is in the data folder: none that leads out of a model's folder is ever followed.
    """
    standard = list(_places(source, strategy))
    if path.absolute() in (place.absolute() for place in standard):
        return True
    temporary = standard[-1].with_name(f".{standard[-1].name}.{os.getpid()}.tmp")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        os.symlink(path.resolve(), temporary)
        os.replace(temporary, standard[-1])
    except OSError:
        return False
    return True


def _places(source: ModelSource, strategy: Strategy) -> Iterator[Path]:
    precision = "-".join((strategy.quant, strategy.dtype) if strategy.quant != "none" else (strategy.dtype,))
    precision += "-experts" if strategy.quant_experts != "none" else ""
    if source.folder is not None and not _in_hub_cache(source.folder):
        yield source.folder / f"fitwright-{precision}{SUFFIX}"
    home = data_folder(System())
    if home is not None:
        yield home / "slabs" / f"{_key(source)}-{precision}{SUFFIX}"


def _in_hub_cache(folder: Path) -> bool:
    """Its folders belong to the Hub's client, which counts and removes what is in them."""
    return folder.parent.name == "snapshots"


def _key(source: ModelSource) -> str:
    """A name for the model: readable, and its own."""
    if source.folder is None:
        text = json.dumps(source.config, sort_keys=True, default=str)
        return f"random-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    real = source.folder.resolve()
    name = real.parents[1].name if _in_hub_cache(real) else real.name
    return f"{name[:60]}-{hashlib.sha256(os.fspath(real).encode()).hexdigest()[:16]}"


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)
