"""The lines that a result ends with: which layout to take for each batch. What is best is decided in recommend.py.

Only cells that ended well and ran with context parallelism on are candidates: where it is off, every rank does the work of one.
"""

from __future__ import annotations

from collections.abc import Iterator

from cpbench.batch import Batch
from cpbench.recommend import Advice, Candidate, advise
from cpbench.report.rows import Group, Row
from cpbench.units import format_bytes, format_seconds


def advice_lines(group: Group, oversubscribed: str) -> Iterator[str]:
    """One line per batch with two layouts to choose from; `oversubscribed` marks those that are, as in the table."""
    for batch in group.batches:
        advice = advise([candidate for _, candidate in candidates(group, batch, oversubscribed)])
        if advice:
            yield f"{batch.name}: {_sentence(advice)}"


def candidates(group: Group, batch: Batch, oversubscribed: str) -> list[tuple[Row, Candidate]]:
    """The rows of a batch that may be chosen."""
    rows = [row for row in group.by_batch.get(batch, []) if row.cell.status == "ok" and row.cell.cp_active]
    return [(row, candidate) for row in rows if (candidate := _candidate(row, oversubscribed))]


def _candidate(row: Row, oversubscribed: str) -> Candidate | None:
    """A row as a candidate. Under five samples there is no interval of the median, and the range of the samples stands for it."""
    if row.time is None:
        return None
    samples = [sample for one in row.time.rounds for sample in one] or [row.time.median]
    mark = oversubscribed if row.cell.oversubscribed else ""
    return Candidate(row.label + mark, row.time.median, row.time.ci95 or (min(samples), max(samples)), row.memory_bytes)


def _sentence(advice: Advice) -> str:
    """`fastest cp4 ring 2.31 s; least memory cp8 ulysses 1.10 GiB; worth considering (no other is better in both): cp4 ring, cp8 ulysses`."""
    ties = f" (within noise: {_names(advice.ties)})" if advice.ties else ""
    fastest = f"{advice.fastest.name} {format_seconds(advice.fastest.seconds)}{ties}"
    if not advice.leanest:
        return f"fastest {fastest}"
    least = format_bytes(advice.leanest[0].memory)
    if advice.front == (advice.fastest,):
        return f"fastest {fastest}, and least memory, {least}"
    front = f"worth considering (no other is better in both): {_names(advice.front)}"
    return f"fastest {fastest}; least memory {_names(advice.leanest)} {least}; {front}"


def _names(candidates: tuple[Candidate, ...]) -> str:
    return ", ".join(candidate.name for candidate in candidates)
