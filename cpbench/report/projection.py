"""How projections look on a terminal: a table of their own, because nothing in it was measured on the devices that it is about.

What the numbers are is decided in projection/projecting.py. Files are untrusted: every text is printed as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich.console import Console, ConsoleRenderable

from cpbench.records import TIME_METRIC
from cpbench.report.columns import Column, fitting
from cpbench.report.console import plain
from cpbench.report.rows import Group, Row, group_rows
from cpbench.report.table import TIME_NAMES, Notes, title
from cpbench.results import CellResult, ResultFile
from cpbench.units import format_bytes, format_seconds

TIES = 0.15  # projections err on the fast side, and differences up to here are none


def projection_view(result: ResultFile, console: Console, kept: Collection[str] | None = None, top: int | None = None) -> list[ConsoleRenderable]:
    """Tables of projections, those with the shortest times first where only the `top` are shown, and what they rest on."""
    cells = [cell for cell in result.cells if kept is None or cell.id in kept]
    view: list[ConsoleRenderable] = []
    notes = Notes()
    for group in group_rows(cells, None):
        rows = list(group.rows)
        if top is not None:
            rows = sorted((row for row in rows if row.cell.status == "ok"), key=lambda row: (not fits(row.cell), seconds_of(row.cell) or 0.0))[:top]
        view += [plain(f"Projected {title(group)}, to {_hardware(rows)}", "bold"), fitting(rows, _columns(group, rows, notes), console, _style)]
    if not cells:
        view.append(plain("No cell has been projected."))
    view += [plain(f"{number}: {text}") for number, text in enumerate(notes.texts, 1)]
    if top is None:
        failed = [cell for cell in cells if cell.status != "ok"]
        view += [plain(f"{cell.key.get('layout')} {cell.key.get('strategy')}: {cell.status}: {cell.reason or 'no reason recorded'}") for cell in failed]
    view += [plain(line) for line in _rests_on(cells)]
    return view


def seconds_of(cell: CellResult) -> float | None:
    """The time that a projection is about."""
    return next((cell.metrics[name].median for name in (f"projected_{one}" for one in TIME_METRIC.values()) if name in cell.metrics), None)


def fits(cell: CellResult) -> bool:
    """Whether a projection fits into the memory of its devices."""
    return cell.projection is not None and cell.projection.fits


def _columns(group: Group, rows: Sequence[Row], notes: Notes) -> list[Column[Row]]:
    time = TIME_NAMES.get(str(group.common.get("target")), "time")
    columns: list[Column[Row]] = [
        Column("layout", lambda row: row.layout, justify="left"),
        Column("strategy", lambda row: row.strategy, justify="left"),
        Column("partition", lambda row: str(row.cell.key.get("partition")), keep=0, justify="left"),
        Column("tokens\n/rank", lambda row: "-" if row.cell.tokens_per_rank is None else f"{row.cell.tokens_per_rank:,}", keep=1),
        Column(f"projected\n{time}", lambda row: format_seconds(seconds_of(row.cell))),
        Column("band", _band, keep=8),
        Column("exposed\ncomm", lambda row: _part(row.cell, "projected_exposed_comm_s"), keep=9),
        Column("comm", lambda row: _part(row.cell, "projected_comm_s"), keep=3),
        Column("peak mem\n/rank", lambda row: format_bytes(_value(row.cell, "peak_live_bytes")), keep=7),
        Column("of\nmemory", _of_memory, keep=6),
        Column("TFLOP/s\n/rank", lambda row: _number(row.cell, "tflops_per_rank"), keep=4),
        Column("speed\nof light", lambda row: _percent(_value(row.cell, "light_fraction")), keep=5),
    ]
    if len({row.batch.exact for row in rows}) > 1:
        columns.insert(0, Column("seq", lambda row: row.batch.label))
    if len({len(row.batch.lengths) for row in rows}) > 1:
        columns.insert(1, Column("batch", lambda row: str(len(row.batch.lengths))))
    if any(row.cell.status != "ok" for row in rows):
        columns.append(Column("status", lambda row: row.cell.status, justify="left"))
    marks = {row.cell.id: _marks(row, notes) for row in rows}
    if any(marks.values()):
        columns.append(Column("notes", lambda row: marks[row.cell.id], justify="left"))
    return columns


def _marks(row: Row, notes: Notes) -> str:
    """Numbers of warnings, and of what the profile was not measured at."""
    outside = row.cell.projection.outside if row.cell.projection else []
    return notes.marks(row if not outside else _with_warnings(row, outside))


def _with_warnings(row: Row, more: Sequence[str]) -> Row:
    from dataclasses import replace

    return replace(row, cell=row.cell.model_copy(update={"warnings": [*row.cell.warnings, *more]}))


def _style(row: Row) -> str:
    return "dim" if row.cell.status == "unsupported" or not fits(row.cell) else "red" if row.cell.status != "ok" else ""


def _value(cell: CellResult, name: str) -> float | None:
    metric = cell.metrics.get(f"projected_{name}")
    return metric.median if metric else None


def _number(cell: CellResult, name: str) -> str:
    value = _value(cell, name)
    return "-" if value is None else f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _part(cell: CellResult, metric: str) -> str:
    """Of the whole time."""
    seconds, whole = cell.metrics.get(metric), seconds_of(cell)
    return _percent(seconds.median / whole if seconds and whole else None)


def _band(row: Row) -> str:
    known, seconds = row.cell.projection, seconds_of(row.cell)
    if known is None or not seconds:
        return "-"
    low, high = (end / seconds - 1 for end in known.band)
    return f"{low:+.0%} {high:+.0%}"


def _of_memory(row: Row) -> str:
    known, peak = row.cell.projection, _value(row.cell, "peak_live_bytes")
    return "-" if known is None or peak is None else _percent((peak + sum(known.reserved.values())) / known.memory_bytes)


def _hardware(rows: Sequence[Row]) -> str:
    return ", ".join(dict.fromkeys(row.cell.projection.title for row in rows if row.cell.projection)) or "no device"


def _rests_on(cells: Sequence[CellResult]) -> list[str]:
    """The provenance of the numbers, once for each that there is, and how to read differences."""
    known = [cell.projection for cell in cells if cell.projection]
    if not known:
        return []
    sources = dict.fromkeys(f"compute {one.compute}; links {one.links}, {one.gpus_per_node} devices per node" for one in known)
    reading = f"Nothing here was measured on these devices. Projections err on the fast side: treat differences up to {TIES:.0%} as ties."
    return [*(f"Projected: {text}." for text in sources), reading]
