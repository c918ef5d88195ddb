"""Tables on screens too narrow for their columns: nothing that a reader decides by is cut away."""

from __future__ import annotations

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text


class TurningTable(Table):
    """A table that shows each row as a block of its own, a line for each column, where it does not fit.

    `names`: how many columns, from the left, name a row; they head its block.
    """

    names = 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._least_width(console, options) <= options.max_width:
            yield from super().__rich_console__(console, options)
            return
        if self.title:
            yield Text(str(self.title), self.title_style or "")
        named = [str(column.header) for column in self.columns[: self.names] if column.header]
        yield Text("  ".join(named), "bold")
        columns = [
            [c if isinstance(c, Text) else Text(str(c)) for c in column.cells] for column in self.columns
        ]
        headings = [str(column.header) for column in self.columns[self.names :]]
        for row in zip(*columns, strict=True):
            yield Text()
            yield Text("  ").join(cell for cell in row[: self.names] if cell)
            block = Table.grid(padding=(0, 2, 0, 0))
            block.add_column(no_wrap=True)
            block.add_column(overflow="fold")
            for heading, cell in zip(headings, row[self.names :], strict=True):
                block.add_row(heading, cell)
            yield Padding(block, (0, 0, 0, 2))

    def _least_width(self, console: Console, options: ConsoleOptions) -> int:
        """Columns of the screen below which a number would be cut or a name broken inside a word."""
        endless = options.update(width=10**6)
        total = 0
        for column in self.columns:
            sizes = [Measurement.get(console, endless, cell) for cell in (column.header, *column.cells)]
            total += max(size.maximum if column.no_wrap else size.minimum for size in sizes) + 1
        return total - 1
