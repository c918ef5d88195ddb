"""Numbers and names as short text. No rich here: errors and JSON paths use it too."""

from __future__ import annotations

from planner.types import Range, Verdict
from planner.units import GIB, TIB

UNKNOWN = "–"
SYMBOLS: dict[str, str] = {"fits": "✓", "tight": "~", "does_not_fit": "✗", "unknown": "?"}
WORDS: dict[str, str] = {"fits": "fits", "tight": "tight", "does_not_fit": "too big", "unknown": "unknown"}
STYLES: dict[str, str] = {"fits": "green", "tight": "yellow", "does_not_fit": "red", "unknown": "magenta"}


def one_line(text: str, limit: int = 400) -> str:
    """`text` with everything that is not printable escaped, cut to `limit` characters."""
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: 2 * limit])
    return plain if len(plain) <= limit else plain[: limit - 1] + "…"


def short(text: str, limit: int = 60) -> str:
    """A name a user gave, fit for a message."""
    return one_line(text, limit)


def gib(n: int | None, *, digits: int = 1) -> str:
    """Bytes in GiB without the unit (the column names it): `9.2`, `141`; from 10,000 on in TiB: `22.1Ti`."""
    if n is None:
        return UNKNOWN
    value = n / GIB
    if value >= 9999.5:
        return f"{value / 1024:.1f}Ti"
    return f"{value:.0f}" if value >= 99.95 else f"{value:.{digits}f}"


def parameters(n: int | None) -> str:
    """`7.62 B`, `494 M`."""
    if n is None:
        return "unknown"
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "K")):
        if n >= size:
            return f"{n / size:.3g} {unit}" if n < 1000 * size else f"{n / size:.0f} {unit}"
    return str(n)


def rate(n: float | None) -> str:
    """Tokens per second with as many digits as the number deserves: `1.5`, `46`, `1170`."""
    if n is None:
        return UNKNOWN
    if n >= 100:
        return f"{float(f'{n:.3g}'):.0f}"
    if n < 0.01:
        return "<0.01"
    return f"{n:.2g}" if n < 10 else f"{n:.0f}"


def tokens_per_s(speed: Range | None) -> str:
    """`46 tok/s`, or a dash when the speed is not known."""
    return UNKNOWN if speed is None else f"{rate(speed.typical)} tok/s"


def tokens(n: int | None) -> str:
    """A number of tokens: exact up to 9999, then in thousands: `512`, `131k`, `1.05M`."""
    if n is None:
        return UNKNOWN
    if n < 10_000:
        return str(n)
    return f"{n / 1000:.0f}k" if n < 1_000_000 else f"{n / 1e6:.3g}M"


def verdict(value: Verdict) -> str:
    """`✓ fits`: readable without colour."""
    return f"{SYMBOLS[value]} {WORDS[value]}"


def interval(low: int, high: int) -> str:
    """Bounds in GiB: `9.9-10.6`."""
    return f"{gib(low)}–{gib(high)}"


def with_interval(n: int, low: int, high: int) -> str:
    """Bytes in GiB with their bounds: `9.9 (9.3-10.9)`; from 10,000 GiB on all three in TiB."""
    if not gib(n).endswith("Ti"):
        return f"{gib(n)} ({interval(low, high)})"
    return f"{gib(n)} ({low / TIB:.1f}–{high / TIB:.1f})"


def size(n: int | None) -> str:
    """Bytes with their unit: `9.2 GiB`, `22.7 TiB`."""
    text = gib(n)
    return f"{text[:-2]} TiB" if text.endswith("Ti") else f"{text} GiB"


def duration(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`, `4 days`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 96 * 3600 else f"{seconds / 86400:.0f} days"
