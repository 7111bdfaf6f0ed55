"""Where commands talk to a person, and tables as they print them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

FILE_WIDTH = 200  # columns, where no terminal would cut a table


def open_console() -> Console:
    """As wide as the terminal, or wide enough for every table if the output is a file or a pipe."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=FILE_WIDTH)


def plain_table(lines: Sequence[Sequence[str]], *, title: str = "") -> Table:
    """Header and lines of text without rules: the first column on the left, numbers on the right."""
    header, *body = lines
    table = Table(title=title or None, title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column(header[0], no_wrap=True)
    for name in header[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    for line in body:
        table.add_row(*line)
    return table
