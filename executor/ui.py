"""What a run says while it works: a live line on a terminal, plain lines elsewhere; always on stderr."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

_PLAIN_EVERY_SECONDS = 10.0


def say(text: str) -> None:
    """One line to the user. The run goes on when nobody can read it any more: a closed pipe or terminal."""
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def restore_terminal() -> None:
    """Show the cursor that a live view hides; for an end that leaves no time to close the view."""
    if is_terminal():
        with suppress(OSError):
            os.write(sys.stderr.fileno(), b"\x1b[?25h\n")


def is_terminal() -> bool:
    """Whether stderr is a terminal that a live line can be drawn on."""
    return sys.stderr.isatty()


@contextmanager
def stage(text: str) -> Iterator[None]:
    """A step without known length: a spinner on a terminal, else one line when it begins."""
    if not is_terminal():
        say(text)
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


class Steps:
    """Progress over a known number of steps with a few figures beside it."""

    def __init__(self, text: str, total: int, done: int = 0) -> None:
        self._text, self._total, self._done = text, total, done
        self._said = 0.0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Steps:
        if is_terminal():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
            )
            self._bar = Progress(
                *columns, TimeRemainingColumn(), console=Console(stderr=True), refresh_per_second=4
            )
            self._bar.start()
            self._task = self._bar.add_task(self._text, total=self._total, completed=self._done, figures="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, figures: str = "") -> None:
        """Say that `done` steps are behind."""
        self._done = done
        if self._bar is not None:
            self._bar.update(self._task, completed=done, figures=figures)
        elif done == self._total or time.monotonic() - self._said >= _PLAIN_EVERY_SECONDS:
            self._said = time.monotonic()
            say(f"{self._text} {done}/{self._total} {figures}".rstrip())
