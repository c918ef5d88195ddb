"""Reading the ledger that finished runs leave in the data folder (`planner.inspect.probes` says where)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.inspect.probes import data_folder
from planner.inspect.system import System
from planner.ledger import Entry, config_hash, machine_key, parse
from planner.types import Machine, Stack

LARGEST_LEDGER_BYTES = 64 * 2**20


def ledger_file(system: System) -> Path | None:
    """The ledger's path; None where no home is known."""
    folder = data_folder(system)
    return folder / "ledger.jsonl" if folder else None


def read_ledger(system: System, containing: str = "") -> tuple[tuple[Entry, ...], int]:
    """Entries in the order they were written, and how many lines cannot be read.

    Only lines that hold the text `containing` are looked at. A last line without its newline was torn by a
    kill or a full disk, or is being written: it is left out and not counted.
    """
    path = ledger_file(system)
    text = system.read(os.fspath(path), LARGEST_LEDGER_BYTES) if path else None
    *whole, _torn = (text or "").split("\n")
    return parse(line for line in whole if containing in line)


def recall(config: Mapping[str, Any], machine: Machine, system: System | None = None) -> tuple[Entry, ...]:
    """Runs of a model on a machine's cards or processor under the libraries installed now."""
    entries, _ = read_ledger(system or System(), config_hash(config))
    if not entries:
        return ()
    here = {machine_key(machine, (gpu.index,)) for gpu in machine.gpus} | {machine_key(machine, ())}
    stack = _installed()
    return tuple(
        e for e in entries if e.stack == stack and any(part in here for part in e.machine.split(" + "))
    )


def _installed() -> Stack:
    from planner.inspect.installed import installed_libraries, stack_of

    return stack_of(installed_libraries())
