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


_PADDING_ROWS = 1024
"""Most that one family's tables of the same words differ: rows are added up to multiples of 64 to 1024."""


def other_words(draft: Architecture, model: Architecture) -> bool:
    """Whether the two surely number words otherwise, so that the one's drafts mean nothing to the other.

    The sizes of their tables are all that a config tells; the words themselves are compared when the
    tokenizers are loaded (`executor/speculation/draft_model.py`).
    """
    return abs(draft.vocab_size - model.vocab_size) > _PADDING_ROWS
