"""Errors a user can cause. Each prints as one `error:` line and, where there is one, a `hint:` line.

FitwrightError            exit 2
├── UnknownModel          no such model; the hint names the nearest
├── UnknownGpu            no such card, or a short form with several meanings
├── BadSize               a size without unit, negative, or not a number
├── BadConfig             config.json malformed, absurd, or of an architecture nobody described
├── BadOption             an option out of range, or two that exclude each other
├── BadPlan               plan.json truncated, edited, or of another version
└── BadMachine            a saved machine that cannot be read
"""

from __future__ import annotations

from profiles.errors import BadConfig, FitwrightError, UnknownGpu, UnknownModel

__all__ = [
    "BadConfig",
    "BadMachine",
    "BadOption",
    "BadPlan",
    "BadSize",
    "FitwrightError",
    "UnknownGpu",
    "UnknownModel",
]


class BadSize(FitwrightError):
    """A size such as `24GiB` that cannot be read."""


class BadOption(FitwrightError):
    """An option out of range, or options that exclude each other."""


class BadPlan(FitwrightError):
    """A plan.json that cannot be trusted or read."""


class BadMachine(FitwrightError):
    """A saved machine description that cannot be read."""
