"""Results remembered by the identity of their argument, for arguments that are slow to hash."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
V = TypeVar("V")


def identity_cache(function: Callable[[T], V], entries: int = 512) -> Callable[[T], V]:
    """`function` with its last results kept. The argument must be immutable: equal ones are not told apart
    from different ones, the same object is not looked at again."""
    known: dict[int, tuple[T, V]] = {}

    def cached(argument: T) -> V:
        found = known.get(id(argument))
        if found is None:
            if len(known) >= entries:
                known.clear()
            # The argument is kept beside its result, so its identity cannot pass to another object.
            found = known[id(argument)] = (argument, function(argument))
        return found[1]

    return cached
