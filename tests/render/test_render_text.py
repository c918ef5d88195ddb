"""Numbers and names as text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.render import text
from planner.types import Range
from planner.units import GIB


@pytest.mark.parametrize(
    ("n", "shown"),
    [
        (None, "–"),
        (0, "0.0"),
        (GIB, "1.0"),
        (int(9.22 * GIB), "9.2"),
        (141 * GIB, "141"),
        (22733 * GIB, "22.2Ti"),
    ],
)
def test_gib(n: int | None, shown: str) -> None:
    assert text.gib(n) == shown


@pytest.mark.parametrize(
    ("n", "shown"),
    [
        (None, "unknown"),
        (494_032_768, "494 M"),
        (7_615_616_512, "7.62 B"),
        (671_000_000_000, "671 B"),
        (12, "12"),
    ],
)
def test_parameters(n: int | None, shown: str) -> None:
    assert text.parameters(n) == shown


@pytest.mark.parametrize(
    ("n", "shown"),
    [
        (None, "–"),
        (0.41, "0.41"),
        (0.0016, "<0.01"),
        (1.5, "1.5"),
        (9.96, "10"),
        (46.2, "46"),
        (149, "149"),
        (1167, "1170"),
        (99.7, "100"),
    ],
)
def test_rate(n: float | None, shown: str) -> None:
    assert text.rate(n) == shown


def test_tokens_per_s_shows_the_typical_speed() -> None:
    assert text.tokens_per_s(Range(1, 46.4, 90)) == "46 tok/s"
    assert text.tokens_per_s(None) == text.UNKNOWN


@pytest.mark.parametrize(
    ("n", "shown"), [(None, "–"), (512, "512"), (9999, "9999"), (131072, "131k"), (1048576, "1.05M")]
)
def test_tokens(n: int | None, shown: str) -> None:
    assert text.tokens(n) == shown


@pytest.mark.parametrize(
    ("s", "shown"), [(40, "40 s"), (720, "12 min"), (12600, "3.5 h"), (400000, "5 days")]
)
def test_duration(s: float, shown: str) -> None:
    assert text.duration(s) == shown


def test_verdicts_differ_without_colour() -> None:
    shown = {text.verdict(v) for v in ("fits", "tight", "does_not_fit", "unknown")}
    assert len(shown) == 4 and len({s[0] for s in shown}) == 4


def test_a_hostile_name_is_escaped_and_cut() -> None:
    assert text.one_line("a\u202eb\n\x1b[31m") == "a\\u202eb\\n\\x1b[31m"
    assert text.one_line("x" * 5000, 10) == "x" * 9 + "…"


@given(st.text())
def test_one_line_is_printable_and_short(value: str) -> None:
    shown = text.one_line(value, 80)
    assert len(shown) <= 80 and (shown == "" or shown.isprintable())
