"""Results remembered by the identity of their argument, for arguments that are slow to hash."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar, cast

T = TypeVar("T")
V = TypeVar("V")
P = ParamSpec("P")


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


def identities_cache(function: Callable[P, V], entries: int = 8192) -> Callable[P, V]:
    """The same for several arguments; a call that names some of them is not remembered."""
    known: dict[tuple[int, ...], tuple[tuple[Any, ...], V]] = {}

    def cached(*arguments: Any, **named: Any) -> V:
        if named:
            return cast("Callable[..., V]", function)(*arguments, **named)
        key = tuple(map(id, arguments))
        found = known.get(key)
        if found is None:
            if len(known) >= entries:
                known.clear()
            found = known[key] = (arguments, cast("Callable[..., V]", function)(*arguments))
        return found[1]

    return cast("Callable[P, V]", wraps(function)(cached))
