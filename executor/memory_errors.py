"""Telling out-of-memory errors from others, and saying which line of the estimate was too small."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from executor.disk_errors import chain
from executor.predicted_lines import lines_at
from planner.types import Candidate, Plan
from planner.units import format_bytes

_SIGNS = ("out of memory", "can't allocate memory", "cudaerrormemoryallocation", "cublas_status_alloc_failed")
_UNITS = {"bytes": 1, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_SIZE = r"([0-9.]+) (bytes|[KMGT]iB)"
_ASKED = re.compile(rf"[Tt]r(?:ied|ying) to allocate {_SIZE}")
_ALLOCATED = re.compile(rf"{_SIZE} is allocated by PyTorch")
_SPARE = re.compile(rf"{_SIZE} is reserved by PyTorch")
_FREE = re.compile(rf"of which {_SIZE} is free")
_ALLOWED = re.compile(rf"{_SIZE} allowed")


@dataclass(frozen=True, kw_only=True)
class Shortage:
    """What a candidate ran out of. Bytes are None where nothing says them."""

    moment: str
    predicted_bytes: int | None = None
    """Allocated bytes predicted for the moment."""
    wanted_bytes: int | None = None
    """Allocated, with what was asked for last."""
    room_bytes: int | None = None
    """What the allocator could have had at most."""
    line: str | None = None
    """The line that was under-estimated, or the largest where none was."""
    line_predicted_bytes: int = 0
    line_wanted_bytes: int | None = None
    """At least so much was needed; None where the line was not under-estimated."""
    said: str = ""

    def __str__(self) -> str:
        when = f"out of memory in {self.moment.replace('_', ' ')}"
        room = f", and there was room for {format_bytes(self.room_bytes)}" if self.room_bytes else ""
        if self.line is None:
            asked = f"{format_bytes(self.wanted_bytes)} asked for{room}" if self.wanted_bytes else self.said
            return f"{when}: {asked}"
        line = f"{self.line}: predicted {format_bytes(self.line_predicted_bytes)}"
        if self.line_wanted_bytes is not None:
            return f"{when}: {line}, at least {format_bytes(self.line_wanted_bytes)} were needed{room}"
        if self.wanted_bytes is None or self.predicted_bytes is None:
            return f"{when}: the largest line is {line}; {self.said}"
        wanted = f"{format_bytes(self.wanted_bytes)} of the {format_bytes(self.predicted_bytes)} predicted"
        return f"{when}: no line was under-estimated, {wanted} were asked for{room}; the largest is {line}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error`, or what it was raised from, says that memory of card or host ran out."""
    return any(_says_so(each) for each in chain(error))


def _says_so(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _SIGNS)


def shortage(
    error: BaseException,
    plan: Plan,
    candidate: Candidate,
    moment: str | None,
    allocated_bytes: int | None = None,
    held: Mapping[str, int] | None = None,
) -> Shortage:
    """What was too small. `allocated_bytes`: on the card, or taken of RAM, when it ran out. `held`: bytes of
    lines that could be measured then.

    A line that was measured is compared with its own figure. What is left over of the allocated and the
    asked-for bytes belongs to the line that the moment is about, the largest one nobody can measure.
    """
    text = next((str(each) for each in chain(error) if _says_so(each)), str(error))
    said = text.split(". ")[0].splitlines()[0][:140] if text else type(error).__name__
    now = moment or "load"
    lines = lines_at(plan, candidate, now)
    asked = _size(_ASKED, text)
    allocated = _first(_size(_ALLOCATED, text), allocated_bytes)
    wanted = allocated + asked if allocated is not None and asked is not None else None
    room = _room(text)
    if not lines:
        return Shortage(moment=now, wanted_bytes=wanted, room_bytes=room, said=said)
    predicted = sum(lines.values())
    largest = max(lines, key=lambda name: lines[name])
    plain = Shortage(
        moment=now, predicted_bytes=predicted, wanted_bytes=wanted, room_bytes=room,
        line=largest, line_predicted_bytes=lines[largest], said=said,
    )  # fmt: skip
    if wanted is None or wanted <= predicted:
        return plain
    name, needed = _too_small(lines, wanted, {k: v for k, v in (held or {}).items() if k in lines})
    return Shortage(
        moment=now, predicted_bytes=predicted, wanted_bytes=wanted, room_bytes=room,
        line=name, line_predicted_bytes=lines[name], line_wanted_bytes=needed, said=said,
    )  # fmt: skip


def _too_small(lines: dict[str, int], wanted: int, held: dict[str, int]) -> tuple[str, int]:
    """The line with the largest shortfall, and what it needed at least."""
    needed = {name: max(held.get(name, 0), n) for name, n in lines.items()}
    unmeasured = {name: n for name, n in lines.items() if name not in held} or lines
    rest = max(unmeasured, key=lambda name: lines[name])
    needed[rest] += max(0, wanted - sum(needed.values()))
    name = max(lines, key=lambda n: needed[n] - lines[n])
    return name, needed[name]


def _room(text: str) -> int | None:
    """The cap if there is one, else what was free and what the allocator held."""
    allowed = _size(_ALLOWED, text)
    parts = [_size(pattern, text) for pattern in (_FREE, _ALLOCATED, _SPARE)]
    held = sum(n for n in parts if n is not None) if parts[0] is not None else None
    return min((n for n in (allowed, held) if n is not None), default=None)


def _first(*values: int | None) -> int | None:
    return next((value for value in values if value is not None), None)


def _size(pattern: re.Pattern[str], text: str) -> int | None:
    match = pattern.search(text)
    return int(float(match[1]) * _UNITS[match[2]]) if match else None
