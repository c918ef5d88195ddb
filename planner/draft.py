"""The draft model of speculative decoding, found by the name that a strategy holds."""

from __future__ import annotations

from functools import lru_cache

from planner.errors import FitwrightError
from profiles.architecture import loaded_architecture
from profiles.schema import Architecture


@lru_cache(maxsize=32)
def draft_architecture(name: str | None) -> Architecture | None:
    """Structure of the model called `name`; None where nothing on this machine tells. The network is left
    alone: who asks for an estimate has looked the name up before."""
    from planner.resolve import resolve

    if name is None:
        return None
    try:
        return loaded_architecture(resolve(name, offline=True).profile.config)
    except FitwrightError:
        return None
