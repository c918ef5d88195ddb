"""A saved machine: what `planner inspect --json` printed, read back. The file may come from anyone, so every
number in it is held against what it can be before anything divides by it."""

from __future__ import annotations

import os
import re
import stat
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import asdict, replace

from planner.errors import BadMachine
from planner.types import MACHINE_SCHEMA, Machine
from profiles.hardware import LARGEST_COUNT

LARGEST_FILE_BYTES = 4 * 2**20
LARGEST_NUMBER = 2**62
_POSITIVE = (
    "memory_bytes",
    "total_bytes",
    "pcie_generation",
    "pcie_generation_max",
    "pcie_lanes",
    "pcie_lanes_max",
)
_CAPABILITY = re.compile(r"[0-9]{1,3}\.[0-9]{1,2}")
_HINT = "write one with: planner inspect --json > machine.json"


class _Tagged(Struct):
    schema: Any = None


def load_machine_file(path: str | os.PathLike[str]) -> Machine:
    """The machine of a file written by `planner inspect --json`; its origin becomes `file`.

    Errors: `BadMachine` for a file that cannot be read, is no JSON, is too large or too deep, has another
    schema, misses a field, or holds a number that cannot be (a negative size, a rate of zero, over 64 cards).
    """
    shown = _shortened(ascii(os.fspath(path))[1:-1])
    machine = _decode(_read(path, shown), shown)
    if len(machine.gpus) > LARGEST_COUNT:
        raise BadMachine(f"{shown}: more than {LARGEST_COUNT} cards", _HINT)
    problem = _impossible(machine, "")
    if problem is None and [gpu.index for gpu in machine.gpus] != list(range(len(machine.gpus))):
        problem = "gpus are not numbered 0, 1, 2, ..."
    if problem is not None:
        raise BadMachine(f"{shown}: {problem}", _HINT)
    return replace(machine, origin="file")


def _read(path: str | os.PathLike[str], shown: str) -> bytes:
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadMachine(f"{shown} is not a regular file", _HINT)
            data = file.read(LARGEST_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not a file name"
        raise BadMachine(f"cannot read {shown}: {reason}", _HINT) from None
    if len(data) > LARGEST_FILE_BYTES:
        raise BadMachine(f"{shown} is larger than any saved machine (over 4 MiB)", _HINT)
    return data


def _without_waiting(path: str, flags: int) -> int:
    # A pipe without a writer would block for ever.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _decode(data: bytes, shown: str) -> Machine:
    try:
        tag = msgspec.json.decode(data, type=_Tagged).schema
        if tag != MACHINE_SCHEMA:
            stated = ascii(tag)[:40] if tag is not None else "none"
            raise BadMachine(
                f"{shown} is no saved machine: schema is {stated}, not {MACHINE_SCHEMA!r}", _HINT
            )
        return msgspec.json.decode(data, type=Machine)
    except RecursionError:
        raise BadMachine(f"{shown} is nested too deeply", _HINT) from None
    except msgspec.ValidationError as error:
        raise BadMachine(f"{shown} is no saved machine: {_line(error)}", _HINT) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadMachine(f"{shown} is not JSON: {_line(error)}", _HINT) from None


def _shortened(path: str) -> str:
    return path if len(path) <= 60 else "..." + path[-57:]


def _line(error: Exception) -> str:
    return ascii(str(error))[1:-1][:160]


def _impossible(value: object, where: str) -> str | None:
    """The first number that cannot be, as text, or None."""
    if isinstance(value, Struct):
        return _first(_impossible(item, f"{where}.{name}") for name, item in asdict(value).items())
    if isinstance(value, tuple):
        return _first(_impossible(item, f"{where}[{place}]") for place, item in enumerate(value))
    if where.endswith(".compute_capability") and isinstance(value, str):
        return None if _CAPABILITY.fullmatch(value) else f"{where.lstrip('.')} cannot be {ascii(value)[:30]}"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        name = where.rpartition(".")[2]
        least = 1 if name in _POSITIVE or name.endswith("_per_s") else 0
        if not least <= value <= LARGEST_NUMBER:
            return f"{where.lstrip('.')} cannot be {ascii(value)[:30]}"
    return None


def _first(found: Any) -> str | None:
    return next((text for text in found if text is not None), None)
