"""Tables as text, with all of each cell: wider than the terminal rather than cut off."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

__all__ = ["print_table", "say"]

_WIDEST = 1000


def print_table(title: str, table: Table) -> None:
    console = Console()
    say(title, console)
    width = Measurement.get(console, console.options.update(width=_WIDEST), table).maximum
    if width > console.width:
        console = Console(width=width)
    console.print(table)


def say(line: str, console: Console | None = None) -> None:
    """A line as it is, however long."""
    (console or Console()).print(line, markup=False, highlight=False, soft_wrap=True)
