"""From two cells to the rows of a comparison: which metrics of them are held against each other, what a reader must know of it, and the verdict.

Pure. How large a difference must be is decided in verdicts.py; which cells meet in matching.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from cpbench.clock_record import clock_warnings
from cpbench.matching import Match
from cpbench.quantities import TIME, TIMES, Pair, Quantity, pairs
from cpbench.records import TIME_METRIC
from cpbench.verdicts import Evidence, Verdict, alternated, clock_guard, enough, verdict, weigh

BAD = ("oom", "timeout", "crash", "wrong", "unsupported")  # a cell that was skipped or interrupted says nothing
WITHIN_RUN = "within-run evidence, use --rounds 5"
ALTERNATED = "passes of both alternated in one process group (--ab)"
OVERSUBSCRIBED = "more threads than cores"


class Row(NamedTuple):
    """One metric of two cells. `ratio` is new over old; `interval` is its own. Numbers are None where they are not known or do not apply."""

    metric: str
    unit: str
    match: Match
    verdict: Verdict
    pair: Pair = (None, None)
    evidence: Evidence | None = None
    notes: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """`cp4 ring 36k`, `cp4 36k: ring -> allgather`."""
        return f"{self.match.name}: {self.match.change}" if self.match.change else self.match.name

    @property
    def ratio(self) -> float | None:
        return self.evidence.ratio if self.evidence else None


class Draft(NamedTuple):
    """A row without its verdict, or with one that needs no evidence."""

    row: Row
    weighed: tuple[Quantity, Quantity] | None = None


def drafts(match: Match, name: str, is_first: bool, across: Collection[str], changing: bool) -> Iterator[Draft]:
    """The rows of one match and metric. What became of the cells stands in the first metric alone."""
    old, new = match.old, match.new
    if not (old and new and old.status == new.status == "ok"):
        if is_first:
            yield Draft(_status_row(match, name))
        return
    for mine, theirs in pairs(name, old, new):
        known = mine or theirs
        assert known is not None, "a pair has a side"
        if reason := _incomparable(match, mine, theirs, across, changing):
            yield Draft(Row(known.name, known.unit, match, "n/a", (mine, theirs), notes=(reason,)))
        elif mine and theirs:
            yield Draft(Row(known.name, known.unit, match, "n/a", (mine, theirs), notes=tuple(_notes(match, mine, theirs))), (mine, theirs))


def _status_row(match: Match, name: str) -> Row:
    """Of a cell that is in one file only, or did not end well on both sides. What the side that did has measured goes along."""
    old, new = match.old, match.new
    alone = pairs(name, match.cell, match.cell)
    metric = alone[0][0].name if alone and alone[0][0] else TIME_METRIC.get(str(match.cell.key.get("target")), name) if name == TIME else name
    if old is None or new is None:
        return Row(metric, "", match, "gone" if old else "new")
    sides = [f"{side}: {cell.status}, {cell.reason or 'no reason recorded'}" for side, cell in (("old", old), ("new", new)) if cell.status != "ok"]
    found: Verdict = "n/a"
    if old.status == "ok" and new.status in BAD:
        found = "broke"
    elif new.status == "ok" and old.status in BAD:
        found = "fixed"
    known = next(iter(pairs(name, old, new)), (None, None))
    pair = (known[0] if old.status == "ok" else None, known[1] if new.status == "ok" else None)
    measured = pair[0] or pair[1]
    return Row(measured.name if measured else metric, measured.unit if measured else "", match, found, pair, notes=tuple(sides))


def _incomparable(match: Match, mine: Quantity | None, theirs: Quantity | None, across: Collection[str], changing: bool) -> str | None:
    """Why two quantities are not held against each other."""
    old, new = match.old, match.new
    if not (mine and theirs and old and new):
        return "not recorded on both sides"
    if mine.kind != theirs.kind and "kind" not in across:
        return f"{mine.kind} against {theirs.kind}: --across kind compares them"
    if mine.unit != theirs.unit:
        return "units differ"
    if mine.is_speed and old.kernel != new.kernel and not changing and not match.alternated and "kernel" not in across:
        return f"kernel {old.kernel} -> {new.kernel}: --across kernel compares them"
    if mine.name in ("peak_fraction", "light_fraction") and old.peak != new.peak:
        return "the peaks that it is a fraction of differ"
    if mine.name == "numerics_ratio" and old.numerics and new.numerics and old.numerics.limit != new.numerics.limit:
        return "verified by other rules"
    return None


def _notes(match: Match, mine: Quantity, theirs: Quantity) -> Iterator[str]:
    """What a reader of the row must know."""
    for side, cell in (("old", match.old), ("new", match.new)):
        if cell and mine.is_speed and cell.clocks.rounds:
            yield from (f"{side}: {text}" for text in clock_warnings(cell.clocks))
    if mine.is_speed and match.old and match.new:
        if match.old.kernel != match.new.kernel:
            yield f"kernel {match.old.kernel} -> {match.new.kernel}"
        if match.old.oversubscribed or match.new.oversubscribed:
            yield OVERSUBSCRIBED
    if mine.kind != theirs.kind:
        yield f"{mine.kind} against {theirs.kind}"


def judged(found: Sequence[Draft], noise: float, strict: bool) -> list[Row]:
    """The rows with their verdicts. With `strict`, p is that for a table of as many tests."""
    evidence = weigh([draft.weighed for draft in found if draft.weighed])
    each = iter(_adjusted(evidence) if strict else evidence)
    return [_with_evidence(draft, next(each), noise) if draft.weighed else draft.row for draft in found]


def _with_evidence(draft: Draft, evidence: Evidence, noise: float) -> Row:
    row, match = draft.row, draft.row.match
    old, new = match.old, match.new
    assert draft.weighed and old and new, "what is weighed is on both sides"
    quantity = draft.weighed[0]
    notes = list(row.notes)
    if match.alternated and quantity.name in TIMES and (paired := alternated(old, new)):
        evidence = paired
        notes.insert(0, ALTERNATED)
    if evidence.basis != "exact" and not enough(evidence):
        notes.insert(0, WITHIN_RUN)
    outcome = verdict(quantity, evidence, noise)
    if guard := clock_guard(old, new, quantity, evidence):
        outcome, notes = "unsure", [guard, *notes]
    return row._replace(verdict=outcome, evidence=evidence, notes=tuple(notes))


def _adjusted(found: Sequence[Evidence]) -> list[Evidence]:
    """With p for a table of that many tests."""
    import numpy as np

    from cpbench.evidence import adjusted

    tested = [one.p for one in found if one.p is not None]
    values = iter(adjusted(np.array(tested)).tolist())
    return [one if one.p is None else one._replace(p=next(values)) for one in found]
