"""Tables that fit the terminal: columns that say how important they are, and rows of anything. What they show is decided by who has the rows.

Texts are printed as they are, without markup and control characters: some come from files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from cpbench.report.console import plain

Row = TypeVar("Row")
MAX_WIDTH = 1000


@dataclass(frozen=True)
class Column(Generic[Row]):
    """One column. Where the table is too wide, the column with the lowest `keep` goes first; None never goes."""

    header: str
    text: Callable[[Row], str]
    keep: int | None = None
    justify: Literal["left", "right"] = "right"


def fitting(
    rows: Sequence[Row],
    columns: Sequence[Column[Row]],
    console: Console,
    style: Callable[[Row], str] = lambda row: "",
    parted: Callable[[Row, Row], bool] = lambda above, below: False,
) -> Table:
    """The rows in the columns that the console has room for; a line between rows that are `parted`."""
    kept, unlimited = list(columns), console.options.update(width=MAX_WIDTH)
    made = _table(rows, kept, style, parted)
    for column in sorted((column for column in columns if column.keep is not None), key=lambda column: column.keep or 0):
        if Measurement.get(console, unlimited, made).maximum <= console.width:
            break
        kept.remove(column)
        made = _table(rows, kept, style, parted)
    return made


def _table(rows: Sequence[Row], columns: Sequence[Column[Row]], style: Callable[[Row], str], parted: Callable[[Row, Row], bool]) -> Table:
    made = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column.header, justify=column.justify, no_wrap=True, vertical="bottom")
    for number, row in enumerate(rows):
        if number and parted(rows[number - 1], row):
            made.add_section()
        made.add_row(*(plain(column.text(row)) for column in columns), style=style(row))
    return made
