"""Errors of the catalogue. They live here because profiles import nothing of the planner."""

from __future__ import annotations


class FitwrightError(Exception):
    """Shown to the user as `error: <message>` and `hint: <hint>`, never as a traceback.

    Errors: carries the exit code of the process (2 unless a subclass says otherwise).
    """

    exit_code = 2

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class UnknownModel(FitwrightError):
    """No model of that name."""


class UnknownGpu(FitwrightError):
    """No card of that name, or several."""


class BadConfig(FitwrightError):
    """A config.json that is malformed, absurd, or of an architecture nobody described."""
