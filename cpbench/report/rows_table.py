"""The page's table of all cells: its columns, with a text to read and a value to sort by in each, and which columns can be chosen from.

Pure: rows become plain data, in which every text is a number of texts.py. A column in which all rows say the same is left out unless it
is one that people look for. What the numbers are is decided in rows.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from cpbench.report.drawer import drawer, shown
from cpbench.report.packed import packed
from cpbench.report.projection import seconds_of
from cpbench.report.rows import Group, Row
from cpbench.report.sections import Source
from cpbench.report.table import CP_OFF, TIME_NAMES
from cpbench.report.texts import Texts, number
from cpbench.results import Metric
from cpbench.units import format_bytes, format_seconds

One = TypeVar("One")
Kind = Literal["text", "number", "badge"]
MAX_SAMPLES = 20_000  # of all cells together that are drawn one by one
COMMON = ("target", "model", "layers", "dtype", "device", "kernel", "options", "seed")  # parts of a key that may tell groups apart


@dataclass(frozen=True)
class Entry:
    """A row with where it is from."""

    file: str
    group: Group
    row: Row


@dataclass(frozen=True)
class Column(Generic[One]):
    """One column. `value` is what rows are sorted by, and None comes last; `choose`: it can be chosen from a list; `always`: never left out."""

    name: str
    text: Callable[[One], str]
    value: Callable[[One], float | None] | None = None
    kind: Kind = "text"
    choose: bool = False
    always: bool = False


def cells_table(sources: Sequence[Source], texts: Texts) -> tuple[dict[str, Any], list[dict[str, Any]], dict[int, int]]:
    """The table of all cells, the drawers that its rows open, and the drawer of each cell, by the identity of the cell."""
    entries = [Entry(source.name, group, row) for source in sources for group in source.groups for row in group.rows]
    each = MAX_SAMPLES // max(1, len(entries))
    drawers = [drawer(entry.row, texts, entry.file if len(sources) > 1 else None, each) for entry in entries]
    columns = [column for column in _columns(entries) if column.always or len({column.text(entry) for entry in entries}) > 1]
    return searchable(columns, entries, range(len(entries)), texts), drawers, {id(entry.row.cell): index for index, entry in enumerate(entries)}


def searchable(columns: Sequence[Column[One]], entries: Sequence[One], opens: Iterable[int | None], texts: Texts) -> dict[str, Any]:
    """A table as page.js takes it: columns; and rows, packed, as [the drawer that it opens, texts, values]; a text column is sorted by its text."""
    head = [{"name": texts(column.name), "kind": column.kind, "choose": column.choose} for column in columns]
    rows = [
        [
            opened,
            [texts(column.text(entry)) for column in columns],
            [number(column.value(entry)) if column.value else None for column in columns],
        ]
        for entry, opened in zip(entries, opens, strict=True)
    ]
    return {"columns": head, "rows": packed(rows)}


def _columns(entries: Sequence[Entry]) -> list[Column[Entry]]:
    times = {TIME_NAMES.get(str(entry.group.common.get("target")), "time") for entry in entries}
    time = times.pop() if len(times) == 1 else "time"
    return [
        Column("layout", lambda entry: entry.row.layout, choose=True, always=True),
        Column("strategy", lambda entry: entry.row.strategy, choose=True, always=True),
        Column("length", lambda entry: entry.row.batch.name, lambda entry: sum(entry.row.batch.lengths), choose=True, always=True),
        Column("file", lambda entry: entry.file, choose=True),
        *(_common_column(name) for name in COMMON),
        Column("status", lambda entry: entry.row.cell.status, kind="badge", choose=True, always=True),
        _number(time, lambda row: row.time.median if row.time else None, format_seconds, always=True),
        _number("95% CI", lambda row: row.half_width, lambda value: f"±{value:.1%}"),
        _number("n", lambda row: row.time.n if row.time else None, str),
        Column("speed-up", _speed_up, lambda entry: entry.row.speed_up, "number", always=True),
        _number("efficiency", lambda row: row.efficiency, _percent),
        _number("exposed comm", lambda row: row.exposed, _percent),
        _number("work balance", lambda row: row.balance, _two_digits),
        _number("peak mem / rank", lambda row: row.memory_bytes, format_bytes, always=True),
        _number("received / rank", lambda row: row.received_bytes, format_bytes),
        _number("TFLOP/s / rank", lambda row: _median(row.cell.metrics.get("tflops_per_rank")), lambda value: f"{value:.3g}"),
        _number("speed of light", lambda row: row.light, _percent),
        _number(f"projected {time}", lambda row: seconds_of(row.cell), format_seconds),
        _number("projected exposed comm", lambda row: _median(row.cell.metrics.get("projected_exposed_comm_s")), format_seconds),
        _number("projected peak / rank", lambda row: _median(row.cell.metrics.get("projected_peak_live_bytes")), format_bytes),
        _number("projected speed of light", lambda row: _median(row.cell.metrics.get("projected_light_fraction")), _percent),
        Column("partition", lambda entry: str(entry.row.cell.key.get("partition"))),
        _number("error ratio", lambda row: row.cell.numerics.ratio if row.cell.numerics else None, _two_digits),
        Column("notes", _notes),
    ]


def _common_column(name: str) -> Column[Entry]:
    def text(entry: Entry) -> str:
        value = entry.group.common.get(name)
        return ", ".join(f"{key} {shown(one)}" for key, one in value.items()) if isinstance(value, dict) else shown(value)

    return Column(name, text, choose=True)


def _number(name: str, value: Callable[[Row], float | None], text: Callable[[float], str], *, always: bool = False) -> Column[Entry]:
    def shown_text(entry: Entry) -> str:
        found = value(entry.row)
        return "-" if found is None else text(found)

    return Column(name, shown_text, lambda entry: value(entry.row), "number", always=always)


def _speed_up(entry: Entry) -> str:
    row = entry.row
    return "baseline" if row.is_baseline else "-" if row.speed_up is None else f"{row.speed_up:.2f}x"


def _notes(entry: Entry) -> str:
    """Why there is no time, or how much there is to know of it."""
    cell = entry.row.cell
    if cell.status != "ok":
        return cell.reason or "no reason recorded"
    count = len(cell.warnings)
    marks = [*(["oversubscribed"] if cell.oversubscribed else []), *([] if cell.cp_active else [CP_OFF])]
    return ", ".join([*marks, *([f"{count} warning{'s' if count > 1 else ''}"] if count else [])])


def _median(metric: Metric | None) -> float | None:
    return metric.median if metric else None


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _two_digits(value: float) -> str:
    return f"{value:.2f}"
