"""Units: bytes are `int` until printed. GiB = 2**30 in print, always labelled."""

from __future__ import annotations

import re

from planner.errors import BadSize

KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40

_FACTORS = {
    "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": KIB, "MIB": MIB, "GIB": GIB, "TIB": TIB,
}  # fmt: skip
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)")
_LARGEST = 2**60


def parse_size(text: str) -> int:
    """Bytes of `24GiB`, `24 GB`, `512MiB`. Decimal units are powers of 1000, binary ones of 1024.

    Errors: `BadSize` for a bare number, another unit, a negative, zero or absurd (over 1 EiB) size.

    >>> parse_size("1.5GiB")
    1610612736
    """
    match = _SIZE.fullmatch(text.strip())
    factor = _FACTORS.get(match[2].upper()) if match else None
    if match is None or factor is None:
        hint = "write a number with KB/MB/GB/TB or KiB/MiB/GiB/TiB, like 24GiB"
        raise BadSize(f"cannot read the size {text[:40]!r}", hint)
    size = float(match[1]) * factor
    if not 1 <= size <= _LARGEST:
        raise BadSize(f"the size {text[:40]!r} is out of range", "give a size between 1 byte and 1 EiB")
    return int(size)


def parse_reserve(text: str) -> int:
    """As `parse_size`; also none at all.

    >>> parse_reserve("0GiB")
    0
    """
    match = _SIZE.fullmatch(text.strip())
    nothing = match is not None and match[2].upper() in _FACTORS and float(match[1]) == 0
    return 0 if nothing else parse_size(text)


def format_gib(n: int | None, digits: int = 2) -> str:
    """`9.22 GiB`; a dash when the number is not known."""
    return "—" if n is None else f"{n / GIB:.{digits}f} GiB"


def format_bytes(n: int) -> str:
    """The largest binary unit that keeps at least one digit before the point: `512 MiB`, `9.2 GiB`."""
    for unit, size in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if n >= size:
            value = n / size
            return f"{value:.0f} {unit}" if value >= 100 or value == int(value) else f"{value:.1f} {unit}"
    return f"{n} B"
