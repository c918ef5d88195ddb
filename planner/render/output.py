"""Results on stdout, notes on stderr."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from planner.render.text import one_line


def print_json(value: Any) -> None:
    """One JSON document, indented by two spaces, keys in the order of their types."""
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def note(text: str) -> None:
    """Something the user should know that is no result: one line on stderr."""
    print(f"note: {one_line(text, 1000)}", file=sys.stderr)


def matches(wanted: str, names: Sequence[str]) -> bool:
    """Whether every word of `wanted` is part of a name; letter case and separators do not matter."""
    joined = " ".join(_squeezed(name) for name in names)
    return all(_squeezed(word) in joined for word in wanted.split())


def _squeezed(text: str) -> str:
    return "".join(c for c in text.lower() if c.isalnum() or c == ".")
