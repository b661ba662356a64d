"""How a comparison looks on a terminal: where it was measured, a table for each metric, footnotes, and what of it may be chance.

Pure: a comparison becomes renderables. The other formats are in comparison_export.py. Texts from files are printed as they are, without
markup and control characters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console, ConsoleRenderable

from cpbench.comparison import COMPARED, Comparison, Geomean
from cpbench.judging import Row
from cpbench.profile_difference import ProfileRow
from cpbench.quantities import Quantity
from cpbench.report.columns import Column, fitting
from cpbench.report.console import plain
from cpbench.report.table import provenance
from cpbench.units import format_bytes, format_seconds
from cpbench.verdicts import ALPHA, MIN_ROUNDS

STYLES = {"faster": "green", "better": "green", "fixed": "green", "slower": "red", "worse": "red", "broke": "red", "unsure": "yellow", "n/a": "dim"}
KIND_MARKS = {"measured": "", "derived": " d", "projected": " p"}
MAX_ROWS = 60  # of a metric; beyond, rows that say least are counted and not listed
LEAST_TELLING = (("same",), ("unsure", "n/a"))  # left out in this order
MAX_ENVIRONMENT, MAX_VALUE = 20, 60
MAX_PROFILE = 12  # kernels of a cell
PARTS = {"step": "traced step", "phase": "phases of the slowest rank", "range": "ranges", "kernel": "operators and kernels"}


def comparison_view(comparison: Comparison, console: Console, everything: bool = False) -> Iterator[ConsoleRenderable]:
    """All that is said of a comparison, in tables that fit the console's width."""
    yield from (plain(line, "dim") for line in origin_lines(comparison))
    yield from (plain(line) for line in environment_lines(comparison))
    notes = Footnotes()
    for metric in comparison.metrics:
        rows, hidden = shown_rows(comparison, metric, everything)
        if rows:
            yield plain("")
            yield plain(metric_title(metric), "bold")
            yield fitting(rows, _columns(comparison, rows, notes), console, lambda row: STYLES.get(row.verdict, ""))
        if hidden:
            yield plain(hidden_line(hidden))
        yield from (plain(geomean_line(mean)) for mean in comparison.geomeans if mean.metric == metric)
    for title, parts in profile_tables(comparison.profiles):
        yield plain("")
        yield plain(title, "bold")
        yield fitting(parts, _profile_columns(comparison, max(20, console.width - 45)), console)
    yield plain("")
    yield from (plain(line) for line in [*notes.lines(), *closing_lines(comparison, everything)])


class Footnotes:
    """Notes of all rows, numbered once each."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def marks(self, row: Row) -> str:
        """`1 3`."""
        return " ".join(str(self._numbers.setdefault(text, len(self._numbers) + 1)) for text in row.notes)

    def lines(self) -> list[str]:
        return [f"{number}: {text}" for text, number in self._numbers.items()]


def origin_lines(comparison: Comparison) -> list[str]:
    """Which files, from which runs."""
    files = list(zip(comparison.names, (comparison.old, comparison.new), strict=True))
    return [f"{name}: {provenance(file)}" for name, file in (files[:1] if comparison.one_file else files)]


def environment_lines(comparison: Comparison) -> list[str]:
    """What differs between the machines, one line each."""
    if comparison.one_file:
        return []
    lines = [f"environment: {name}  {_short(old)} -> {_short(new)}" for name, old, new in comparison.environment[:MAX_ENVIRONMENT]]
    more = len(comparison.environment) - MAX_ENVIRONMENT
    return [*lines, *([f"environment: and {more} more differences"] if more > 0 else [])] or ["environment: no difference"]


def _short(value: object) -> str:
    text = "(unset)" if value is None else str(value)
    return text if len(text) <= MAX_VALUE else f"{text[: MAX_VALUE - 3]}..."


def shown_rows(comparison: Comparison, metric: str, everything: bool) -> tuple[list[Row], int]:
    """The rows of a metric that are listed, and how many that are the same are not. Cells of one file alone are listed with --all only."""
    rows = [row for row in comparison.rows if row.metric == metric]
    if everything:
        return rows, 0
    rows = [row for row in rows if row.match.old and row.match.new]
    kept = rows
    for verdicts in LEAST_TELLING:
        kept = [row for row in kept if row.verdict not in verdicts] if len(kept) > MAX_ROWS else kept
    if len(kept) > MAX_ROWS:
        kept = sorted(kept, key=lambda row: -abs(math.log(row.ratio)) if row.ratio else -math.inf)[:MAX_ROWS]
    return kept, len(rows) - len(kept)


def hidden_line(hidden: int) -> str:
    """What the table leaves out."""
    return f"{hidden:,} rows are not listed: those that are the same or unsure, or changed less than these (--all lists them)"


def metric_title(metric: str) -> str:
    """What the metric is called in files, and a word for the best known."""
    words = {"ttft_s": "time to first token", "layer_s": "time of a layer", "attention_s": "time of attention"}
    words |= {"peak_live_bytes": "peak memory of a rank, live tensors", "peak_allocator_bytes": "peak memory of a rank, allocator"}
    return f"{metric} ({words[metric]})" if metric in words else metric


def side_text(row: Row, side: int) -> str:
    """`21.4 ms ± 1%`, with the mark of what was not measured; the status of a cell that has no number."""
    cell, quantity = (row.match.old, row.match.new)[side], row.pair[side]
    if quantity is None:
        return "-" if cell is None or cell.status == "ok" else cell.status
    value, half = quantity.median, None
    if row.evidence:
        value, half = (row.evidence.old, row.evidence.new)[side], row.evidence.halves[side]
    return value_text(quantity, value) + (f" ± {half:.0%}" if half is not None else "") + KIND_MARKS[quantity.kind]


def value_text(quantity: Quantity, value: float) -> str:
    """With its unit."""
    if quantity.unit == "s":
        return format_seconds(value)
    if quantity.unit == "B":
        return format_bytes(value)
    return f"{value:.4g}" + ("" if quantity.unit == "1" else f" {quantity.unit}")


def change_text(row: Row) -> str:
    """`+7.1% [+5.4, +8.8]`; of exact bytes their difference."""
    evidence, quantity = row.evidence, row.pair[0]
    if evidence is None or quantity is None:
        return "-"
    if evidence.basis == "exact" and quantity.unit == "B":
        difference = evidence.new - evidence.old
        return "0 B" if difference == 0 else f"{'+' if difference > 0 else '-'}{format_bytes(abs(difference))}"
    if evidence.ratio is None:
        return "-"
    ends = "" if evidence.interval is None else f" [{', '.join(f'{_percent(end)}' for end in evidence.interval)}]"
    return f"{_percent(evidence.ratio)}%{ends}"


def _percent(ratio: float) -> str:
    return f"{(ratio - 1) * 100:+.1f}" if ratio < 100 else f"{(ratio - 1) * 100:+.2g}"


def evidence_text(row: Row) -> str:
    """`p=.008 n=5+5`: rounds with p, samples without."""
    if row.evidence is None or row.evidence.basis == "exact":
        return ""
    p = row.evidence.p
    chance = "" if p is None else f"p={p:.3f} ".replace("0.", ".") if p < 0.9995 else "p=1 "
    old, new = row.evidence.counts
    ab = row.match.new.ab if row.match.new else None
    return f"{chance}n={old}+{new}" if row.evidence.basis != "alternated" or ab is None else f"{ab.blocks} blocks, {old} rounds"


def geomean_line(mean: Geomean) -> str:
    """`geomean of 4 cells: -1.2%`."""
    left = f"; {mean.left_out:,} have no ratio" if mean.left_out else ""
    return f"geomean of {mean.cells:,} cells: {_percent(mean.ratio)}%{left}"


def profile_tables(rows: Sequence[ProfileRow]) -> list[tuple[str, list[ProfileRow]]]:
    """Title and rows of every cell and part; of kernels those that took longest."""
    tables: dict[str, list[ProfileRow]] = {}
    for row in rows:
        tables.setdefault(f"profile of {row.cell}: {PARTS[row.part]}, seconds per step, within-run evidence", []).append(row)
    return [(title, parts if parts[0].part != "kernel" else parts[:MAX_PROFILE]) for title, parts in tables.items()]


def closing_lines(comparison: Comparison, everything: bool) -> Iterator[str]:
    """What the marks and verdicts rest on, and how many of each there are."""
    kinds = {one.kind for row in comparison.rows for one in row.pair if one}
    yield from (f"{mark.strip()}: {kind}, not measured" for kind, mark in KIND_MARKS.items() if mark and kind in kinds)
    yield from test_lines(comparison)
    counts = comparison.counts
    alone = {"new": f"only in {comparison.names[1]}", "gone": f"only in {comparison.names[0]}"}
    parts = [f"{counts[name]:,} {alone.get(name, name)}" for name in (*reversed(COMPARED), "n/a", "gone", "new") if counts[name]]
    listed = "" if everything or not (counts["new"] or counts["gone"]) else " (--all lists them)"
    if parts:
        yield f"{', '.join(parts)}{listed}"


def test_lines(comparison: Comparison) -> Iterator[str]:
    """How many tests there are, and what chance makes of so many."""
    tests = comparison.tests
    if not tests:
        return
    many = f"{len(tests):,} test{'' if len(tests) == 1 else 's'}"
    rule = f"noise band {comparison.noise * 100:g}%"
    if not comparison.strict:
        yield f"{many} at p < {ALPHA:g}, {rule}: had nothing changed, chance would call {_about(comparison.false_alarms)} of them a change at most"
        return
    yield f"{many}, {rule}; p is for the whole table (Benjamini-Hochberg): of what is called a change at most {ALPHA:.0%} is expected to be chance"
    from cpbench.evidence import smallest_p

    fewest = min((row.evidence.counts for row in tests if row.evidence), key=lambda counts: -smallest_p(*counts))
    least = smallest_p(*fewest)
    if least * len(tests) >= ALPHA:
        needed = next(n for n in range(MIN_ROUNDS, 100) if smallest_p(n, n) * len(tests) < ALPHA)
        rows = next(n for n in range(1, len(tests) + 1) if least * n >= ALPHA)
        rounds = f"{fewest[0]} and {fewest[1]} rounds"
        yield f"with {rounds} p is {least:.4f} at least: one change alone cannot be called in a table of {rows} tests and more; use --rounds {needed}"


def _about(number: float) -> str:
    """Two digits: `0.22`, `320`."""
    return f"{float(f'{number:.2g}'):,.10g}"


def failure_line(rows: Sequence[Row]) -> str:
    """`FAIL: slower in ttft_s of cp8 ring 36k (+7.1%), ...`."""
    shown = [f"{row.verdict} in {row.metric}: {row.label} ({change_text(row)})" if row.evidence else f"{row.verdict}: {row.label}" for row in rows[:5]]
    return f"FAIL: {'; '.join(shown)}" + (f"; and {len(rows) - 5} more" if len(rows) > 5 else "")


def _columns(comparison: Comparison, rows: Iterable[Row], notes: Footnotes) -> list[Column[Row]]:
    names = ("old", "new") if comparison.one_file or len(set(comparison.names)) == 1 else comparison.names
    marks = {id(row): notes.marks(row) for row in rows}
    columns: list[Column[Row]] = [
        Column("cell", lambda row: row.label, justify="left"),
        Column(names[0], lambda row: side_text(row, 0)),
        Column(names[1], lambda row: side_text(row, 1)),
        Column("change", change_text, justify="left"),
        Column("verdict", lambda row: row.verdict, justify="left"),
        Column("evidence", evidence_text, keep=0, justify="left"),
    ]
    return [*columns, Column("notes", lambda row: marks[id(row)], justify="left")] if any(marks.values()) else columns


def _profile_columns(comparison: Comparison, width: int) -> list[Column[ProfileRow]]:
    names = ("old", "new") if comparison.one_file or len(set(comparison.names)) == 1 else comparison.names
    return [
        Column("name", lambda row: row.name if len(row.name) <= width else f"{row.name[: width - 3]}...", justify="left"),
        Column(names[0], lambda row: format_seconds(row.old_s)),
        Column(names[1], lambda row: format_seconds(row.new_s)),
        Column("difference", lambda row: f"{'+' if row.difference_s >= 0 else '-'}{format_seconds(abs(row.difference_s))}"),
    ]


def comparison_html(comparison: Comparison) -> str:
    """A table for notebooks, with the lines below it; everything escaped."""
    from html import escape

    from cpbench.report.comparison_export import table_cells

    head, body = table_cells(comparison, everything=False)
    rows = [f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in body]
    means = (f"{mean.metric}: {geomean_line(mean)}" for mean in comparison.geomeans)
    lines = "".join(f"<div>{escape(line)}</div>" for line in [*environment_lines(comparison), *means])
    below = "".join(f"<div>{escape(line)}</div>" for line in closing_lines(comparison, everything=False))
    heads = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f"<div>{lines}<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>{below}</div>"
