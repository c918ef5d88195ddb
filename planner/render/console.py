"""The rich console every screen is drawn on. Imported only by code that draws."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap

from rich.console import Console
from rich.padding import Padding

WIDEST = 1000
"""Columns drawn at most, whatever COLUMNS says."""


class _Console(Console):
    """Leaves a closed pipe to the command, as JSON output does."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def make_console(width: int | None = None) -> Console:
    """A console on stdout: plain without a terminal or with NO_COLOR. Width: COLUMNS, the terminal, 80."""
    plain = bool(os.environ.get("NO_COLOR")) or not sys.stdout.isatty()
    columns = shutil.get_terminal_size((80, 24)).columns
    return _Console(
        width=width or min(max(40, columns), WIDEST),
        color_system=None if plain else "auto",
        highlight=False,
        emoji=False,
        markup=False,
        soft_wrap=False,
    )


def print_item(out: Console, text: str, bullet: str = "- ", indent: int = 2) -> None:
    """One item of a list; its further lines stand under its first word."""
    first, *rest = textwrap.wrap(text, max(20, out.width - indent - len(bullet))) or [""]
    lines = [bullet + first, *(" " * len(bullet) + line for line in rest)]
    out.print(Padding("\n".join(lines), (0, 0, 0, indent)))
