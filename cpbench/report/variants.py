"""The lines that say how the two variants of a sweep compare (--ab), one for each pair. What the numbers are is decided in ab.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from cpbench.report.rows import Group, Row
from cpbench.results import Alternation
from cpbench.stats import MIN_INTERVAL_SAMPLES


def variant_lines(groups: Iterable[Group]) -> Iterator[str]:
    """`ring -> allgather: 0.93 [0.91, 0.95] of the time, 12 blocks`; with several pairs, what each is about stands before it."""
    rows = {row.cell.id: row for group in groups for row in group.rows}
    pairs = [(rows[b.cell.ab.other], b) for b in rows.values() if b.cell.ab and b.cell.ab.variant == "B" and b.cell.ab.other in rows]
    for a, b in pairs:
        if a.cell.ab and b.cell.ab:
            about = [mine for mine, other in zip(_place(a), _place(b), strict=True) if mine == other] if len(pairs) > 1 else []
            names = " -> ".join(_names(a.cell.ab.setting, b.cell.ab.setting))
            yield f"{' '.join(about)}{': ' if about else ''}{names}: {_compared(b.cell.ab) or _why_not([a, b])}"


def _place(row: Row) -> tuple[str, str, str]:
    return row.layout, row.strategy, row.batch.name


def _names(a: str, b: str) -> tuple[str, str]:
    """The settings of both variants; where both set one field, its values."""
    (field_a, _, value_a), (field_b, _, value_b) = a.partition("="), b.partition("=")
    alone = field_a == field_b and not set(" =") & set(value_a + value_b)
    return (value_a, value_b) if alone else (a, b)


def _compared(b: Alternation) -> str | None:
    if b.ratio is None:
        return None
    blocks = "1 block" if b.blocks == 1 else f"{b.blocks} blocks"
    if b.ratio_ci95 is None:
        return f"{b.ratio:.3f} of the time, {blocks} (an interval takes {MIN_INTERVAL_SAMPLES})"
    low, high = b.ratio_ci95
    return f"{b.ratio:.3f} [{low:.3f}, {high:.3f}] of the time, {blocks}"


def _why_not(rows: Sequence[Row]) -> str:
    bad = next((row for row in rows if row.cell.status != "ok"), None)
    return f"not compared: {bad.label} is {bad.cell.status}" if bad else "not compared: their passes never alternated"
