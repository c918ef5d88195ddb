"""Fields of a config.json: what kind of value each name holds, checked before anything is believed.

A config file comes from anyone. `config_fields.json` lists every name the trait files read by kind: a size is
a positive int below a bound, `true` is no int, a flag is no text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache

import msgspec

from profiles.data import read_table
from profiles.errors import BadConfig

_INTEGERS = {  # kind: (least, largest)
    "size": (1, 10**7),
    "count": (0, 10**7),
    "layers": (1, 10**5),
    "tokens": (1, 10**12),
    "index": (-(10**4), 10**7),
}
_LONGEST_LIST = 10**5
_LARGEST_NUMBER = 1e12
_LONGEST_TEXT = 1000


@lru_cache(maxsize=1)
def _kinds() -> dict[str, str]:
    table = msgspec.json.decode(read_table("config_fields.json"), type=dict[str, list[str]])
    return {name: kind for kind, names in table.items() for name in names}


def kind_of(name: str) -> str:
    """The kind of a field. Errors: `LookupError` for a name a trait file reads and the table lacks."""
    kind = _kinds().get(name)
    if kind is None:
        raise LookupError(f"{name} has no kind in config_fields.json")
    return kind


def shown(value: object) -> str:
    """A hostile value in at most 40 printable characters."""
    text = f"a {type(value).__name__}" if isinstance(value, (list, dict)) else ascii(value)
    return text if len(text) <= 40 else text[:37] + "..."


def rejected(where: str, value: object, wanted: str) -> BadConfig:
    """The error for a field with a value it cannot have."""
    named = json.dumps(value) if value is None or isinstance(value, bool) else shown(value)
    return BadConfig(f"config field {where} is {named}, not {wanted}")


def check_value(where: str, value: object, kind: str) -> None:
    """Hold one value against a kind.

    Kinds: `size`, `count`, `layers`, `tokens`, `index` (whole numbers), `number`, `flag`, `text`, `config`,
    `automatic` (a size or `auto`), `grid` (lists of sizes), `any`; with an `s` a list of them; `a|b` for a
    value or a list; a trailing `?` allows null.

    Errors: `BadConfig` naming the field.
    """
    if kind.endswith("?"):
        if value is None:
            return
        kind = kind[:-1]
    if "|" in kind:
        plain, listed = kind.split("|", 1)
        kind = listed if isinstance(value, list) else plain
    if kind in _INTEGERS:
        _check_integer(where, value, kind)
    elif kind in _CHECKS:
        _CHECKS[kind](where, value)
    elif kind.removesuffix("s") in (*_INTEGERS, *_CHECKS):
        _check_list(where, value, kind.removesuffix("s"))
    else:
        raise LookupError(f"unknown kind {kind!r} of {where}")


def _check_integer(where: str, value: object, kind: str) -> None:
    least, largest = _INTEGERS[kind]
    if type(value) is not int:
        raise rejected(where, value, "a whole number")
    if not least <= value <= largest:
        raise rejected(where, value, f"between {least} and {largest}")


def _check_list(where: str, value: object, kind: str) -> None:
    if not isinstance(value, list) or len(value) > _LONGEST_LIST:
        raise rejected(where, value, "a list")
    for item in value:
        check_value(where, item, kind)


def _check_number(where: str, value: object) -> None:
    whole = type(value) is int and abs(value) <= _LARGEST_NUMBER
    if not whole and not (type(value) is float and math.isfinite(value) and abs(value) <= _LARGEST_NUMBER):
        raise rejected(where, value, "a number")


def _check_flag(where: str, value: object) -> None:
    if type(value) is not bool:
        raise rejected(where, value, "true or false")


def _check_text(where: str, value: object) -> None:
    if not isinstance(value, str) or len(value) > _LONGEST_TEXT or not _encodable(value):
        raise rejected(where, value, "a short text")


def _encodable(text: str) -> bool:
    """JSON may hold half of a surrogate pair, which no file can."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_config(where: str, value: object) -> None:
    if not isinstance(value, Mapping):
        raise rejected(where, value, "an object")


def _check_automatic(where: str, value: object) -> None:
    if value != "auto":
        _check_integer(where, value, "size")


def _check_grid(where: str, value: object) -> None:
    if not isinstance(value, list) or len(value) > _LONGEST_LIST:
        raise rejected(where, value, "a list of lists")
    for row in value:
        _check_list(where, row, "size")


def _check_any(where: str, value: object) -> None:
    """Anything goes: the trait file looks at the value itself."""


_CHECKS = {
    "number": _check_number, "flag": _check_flag, "text": _check_text, "config": _check_config,
    "automatic": _check_automatic, "grid": _check_grid, "any": _check_any,
}  # fmt: skip
