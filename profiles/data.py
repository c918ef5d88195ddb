"""The tables of this package, wherever it is installed."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent


def read_table(name: str) -> bytes:
    """A JSON file beside this module: `efficiency.json`, `overheads.json`, ... Errors: `OSError`."""
    return (FOLDER / name).read_bytes()
