"""The attention kernel that transformers runs where another was asked for."""

from __future__ import annotations

from functools import cache

import msgspec
from msgspec.structs import replace

from planner.types import Stack, Strategy
from profiles.data import read_table


@cache
def _refusals() -> dict[str, str]:
    found: dict[str, str] = msgspec.json.decode(read_table("attention.json"))["refuses_sdpa"]
    return found


def refuses_sdpa(model_type: str, transformers: str) -> bool:
    """Does this version's class of `model_type` refuse sdpa? `transformers`: major.minor.

    >>> refuses_sdpa("gemma2", "5.17"), refuses_sdpa("gemma2", "5.23"), refuses_sdpa("llama", "5.23")
    (False, True, False)
    """
    since = _refusals().get(model_type)
    return since is not None and _numbers(transformers) >= _numbers(since)


def as_it_runs(how: Strategy, model_type: str, stack: Stack) -> Strategy:
    """The strategy with eager attention where sdpa was asked for and is refused, as the executor has it."""
    if how.attention == "sdpa" and refuses_sdpa(model_type, stack.transformers):
        return replace(how, attention="eager")
    return how


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
