"""Results as tables, for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import StringIO

WIDTH = 110


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """
    A table of text; all columns but the first and the last hold numbers, and so does the last one if it has a name.

    Args:
        columns: their names; an empty last one is for words.
        rows: what stands in them.
    """
    from rich import box  # here: help and usage do without
    from rich.console import Console
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, name in enumerate(columns):
        words = index == 0 or not name
        made.add_column(name, justify="left" if words else "right", overflow="fold", no_wrap=not words)
    for row in rows:
        made.add_row(*(str(each) for each in row))
    written = StringIO()
    Console(file=written, width=WIDTH, color_system=None, markup=False, highlight=False, emoji=False).print(made)
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines() if line.strip())


def spoken(seconds: float) -> str:
    """A duration in words."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
