"""What the page says of two results: where they were measured differently, every verdict with its evidence, and what that rests on.

Pure: a comparison becomes plain data, in which every text is a number of texts.py. Verdicts are those of comparison.py, and their words
those of report/comparison.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from cpbench.comparison import Comparison
from cpbench.judging import Row
from cpbench.report.comparison import change_text, closing_lines, evidence_text, geomean_line, side_text
from cpbench.report.drawer import shown
from cpbench.report.rows_table import Column, searchable
from cpbench.report.texts import Texts

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def changes(comparison: Comparison, opens: Mapping[int, int], texts: Texts) -> dict[str, Any]:
    """The section. `opens`: the drawer of each cell, by the identity of the cell."""
    rows = comparison.rows
    drawers = [opens.get(id(row.match.new), opens.get(id(row.match.old))) for row in rows]
    lines = [*(f"{mean.metric}: {geomean_line(mean)}" for mean in comparison.geomeans), *closing_lines(comparison, everything=True)]
    counts = ", ".join(f"{count:,} {verdict}" for verdict, count in comparison.counts.most_common())
    summary = counts if comparison.is_comparable else f"Nothing could be compared. {comparison.reason}"
    environment = [(name, *("not there" if value is None else shown(value) for value in values)) for name, *values in comparison.environment]
    return {
        "summary": texts(summary),
        "environment": texts.table(["environment", *comparison.names], environment, left=3),
        "rows": searchable(_columns(comparison), rows, drawers, texts),
        "notes": texts.line(lines if comparison.is_comparable else []),
    }


def forest(comparison: Comparison) -> Figure | None:
    """The changes with their intervals, drawn; None where no ratio is known."""
    from cpbench.plot.forest import draw

    return draw(comparison)


def _columns(comparison: Comparison) -> list[Column[Row]]:
    old, new = comparison.names
    columns: list[Column[Row]] = [
        Column("cell", lambda row: row.label),
        Column("metric", lambda row: row.metric, choose=True),
        Column(f"old: {old}", lambda row: side_text(row, 0), _side(0), "number"),
        Column(f"new: {new}", lambda row: side_text(row, 1), _side(1), "number"),
        Column("change", change_text, lambda row: row.ratio, "number"),
        Column("verdict", lambda row: row.verdict, kind="badge", choose=True),
        Column("evidence", evidence_text),
        Column("notes", lambda row: "; ".join(row.notes)),
    ]
    return columns


def _side(side: int) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        quantity = row.pair[side]
        return None if quantity is None else quantity.median

    return value
