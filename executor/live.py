"""The live view on a terminal: a bar with its figures, and a line of memory; gone when the work is done."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.text import Text

from executor.ui import clock

if TYPE_CHECKING:
    from executor.ui import Steps

_BAR = 30
_GAP = "  "


class Drawing:
    """Draws the state of `steps` whenever `draw` is called; what is printed meanwhile appears above it."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._live = Live(
            self,
            console=Console(stderr=True, highlight=False),
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
        )

    def start(self) -> None:
        """Hide the cursor and draw for the first time."""
        self._live.start(refresh=True)

    def draw(self) -> None:
        """Draw the state as it is now."""
        self._live.refresh()

    def stop(self) -> None:
        """Wipe the view away and give the cursor back."""
        self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        steps, width = self._steps, options.max_width
        done, figures = steps.state()
        if steps.total:
            bar = min(_BAR, max(8, width // 4))
            yield from _line(steps, done, bar, width)
            left = steps.seconds_left(done)
            pieces = [figures, f"{clock(left)} left" if left is not None else ""]
        else:
            pieces = [steps.text, clock(steps.seconds)]
        for text in (*wrapped(pieces, width), *wrapped(steps.memory(), width)):
            yield Text(text, style="dim" if steps.total else "", no_wrap=True, overflow="crop")


def _line(steps: Steps, done: float, bar: int, width: int) -> Iterator[Text | ProgressBar]:
    """The bar between its name and its count, the name cut where there is no room."""
    count = f" {steps.count_of(done)}"
    name = steps.text[: max(0, width - bar - len(count) - 1)]
    yield Text(f"{name} ", no_wrap=True, overflow="crop", end="")
    yield ProgressBar(total=float(steps.total or 1), completed=done, width=bar)
    yield Text(count, no_wrap=True, overflow="crop")


def wrapped(pieces: list[str], width: int) -> list[str]:
    """Pieces put on as few lines as hold them; none is broken, one that is too long is cut."""
    lines: list[str] = []
    for piece in (piece for piece in pieces if piece):
        if lines and len(lines[-1]) + len(_GAP) + len(piece) <= width:
            lines[-1] += _GAP + piece
        else:
            lines.append(piece[:width])
    return lines
