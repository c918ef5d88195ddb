"""What a run says while it works, always on stderr: a live view on a terminal, a line now and then elsewhere.

The figures are read where they lie by a thread of the view, four times a second. The work itself never
waits for them: nothing here synchronizes with the card.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from planner.streams import tell

if TYPE_CHECKING:
    from executor.gauges import Gauges
    from executor.live import Drawing

_REDRAW_SECONDS = 0.25
_PLAIN_EVERY_SECONDS = 10.0
_PLAIN_AT_LEAST_SECONDS = 1.0
_watched: Gauges | None = None

Now = Callable[[], tuple[float, str]]
"""Steps done, in parts of one too, and figures to show beside them."""


def say(text: str) -> None:
    """One line to the user. The run goes on when nobody can read it any more: a closed pipe or terminal."""
    with suppress(ValueError):
        tell(text)


def is_terminal() -> bool:
    """Whether stderr is a terminal that a live view can be drawn on."""
    try:
        return sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
    except (AttributeError, ValueError):
        return False


def restore_terminal() -> None:
    """Show the cursor that a live view hides; for an end that leaves no time to close the view."""
    if is_terminal():
        with suppress(OSError):
            os.write(sys.stderr.fileno(), b"\x1b[?25h\n")


@contextmanager
def watching(gauges: Gauges) -> Iterator[None]:
    """Until the end of the block every view shows what these say of card and RAM."""
    global _watched
    before, _watched = _watched, gauges
    try:
        yield
    finally:
        _watched = before


@contextmanager
def stage(text: str) -> Iterator[None]:
    """A step without known length: a view of time and memory on a terminal, else one line when it begins."""
    with Steps(text):
        yield


class Steps:
    """Progress over steps, with a few figures beside it.

    `total` None: not known, or not yet (`count` gives it later). `now`: asked by the view's own thread for
    what `update` has not said yet, so that it costs the work nothing.
    """

    def __init__(self, text: str, total: int | None = None, done: int = 0, now: Now | None = None) -> None:
        self.text, self.total = text, total
        self._first, self._done, self._figures, self._now = float(done), float(done), "", now
        self._began = self._paced = self._said_at = time.monotonic()
        self._said_tenth = 0
        self._unit = ""
        self._drawing: Drawing | None = None
        self._thread: threading.Thread | None = None
        self._over = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> Steps:
        self._began = self._paced = self._said_at = time.monotonic()
        if is_terminal():
            from executor.live import Drawing

            self._drawing = Drawing(self)
            self._drawing.start()
        elif self.total is None:
            say(self.text)
        if self._drawing is not None or self._now is not None:
            self._thread = threading.Thread(target=self._watch, name="view", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        if self._drawing is not None:
            self._drawing.stop()
            if self.total is not None and kind is None:
                counted, figures = self.counted(self._done), self.state()[1]
                say("  ".join(piece for piece in (counted, figures, f"in {clock(self.seconds)}") if piece))

    def count(self, total: int, unit: str) -> None:
        """The number of steps and what they are, known only now; the pace is taken from here."""
        self.total, self._unit, self._paced = total, f" {unit}", time.monotonic()

    def update(self, done: float, figures: str = "") -> None:
        """Say that `done` steps are behind."""
        self._done, self._figures = float(done), figures
        if self._drawing is None:
            self._say_sometimes(done == self.total)

    @property
    def seconds(self) -> float:
        """Since the view was opened."""
        return time.monotonic() - self._began

    def state(self) -> tuple[float, str]:
        """Steps done and figures, the speed against the predicted one."""
        done, figures = self._done, self._figures
        if self._now is not None:
            with suppress(Exception):  # a figure that cannot be read is no reason to end a run
                later, text = self._now()
                end = float("inf") if self.total is None else self.total - 0.01
                done, figures = max(done, min(later, end)), text or figures  # `update` says the end
        predicted = _watched.tokens_per_s if _watched is not None else None
        if predicted and figures.endswith("tokens/s"):
            figures += f" of {predicted:,.0f} predicted"
        return done, figures

    def memory(self) -> list[str]:
        """Card and RAM now, in pieces."""
        return _watched.pieces() if _watched is not None else []

    def seconds_left(self, done: float) -> float | None:
        """At the pace of this process; None before there is one."""
        if self.total is None or done <= self._first:
            return None
        return (time.monotonic() - self._paced) * (self.total - done) / (done - self._first)

    def plain(self) -> list[str]:
        """Pieces of one line."""
        done, figures = self.state()
        pieces = [self.counted(done), figures, *self.memory()]
        left = self.seconds_left(done)
        if left is not None and self.total is not None and done < self.total:
            pieces.append(f"{clock(left)} left")
        return [piece for piece in pieces if piece]

    def counted(self, done: float) -> str:
        """`training 12/400`, `loading qwen2.5-7b 120/339 tensors`."""
        return self.text if self.total is None else f"{self.text} {self.count_of(done)}"

    def count_of(self, done: float) -> str:
        """`12/400`."""
        return f"{int(min(done, self.total or 0))}/{self.total}{self._unit}"

    def _watch(self) -> None:
        while not self._over.wait(_REDRAW_SECONDS):
            if self._drawing is not None:
                self._drawing.draw()
            else:
                self._say_sometimes(last=False)

    def _say_sometimes(self, last: bool) -> None:
        """Every ten seconds, or with each tenth of the way."""
        with self._lock:
            since = time.monotonic() - self._said_at
            tenth = int(10 * self.state()[0] / self.total) if self.total else -1
            passed = tenth > self._said_tenth and since >= _PLAIN_AT_LEAST_SECONDS
            if last or passed or since >= _PLAIN_EVERY_SECONDS:
                self._said_at, self._said_tenth = time.monotonic(), tenth
                say("  ".join(self.plain()))


def clock(seconds: float) -> str:
    """`3:07`, `1:02:03`."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
