"""Two results side by side: which cells were compared, how each metric came out, and how much of that may be chance.

Pure: results in, a Comparison out, which also is a data frame. When a difference counts is decided in verdicts.py, which cells meet in
matching.py; how a comparison looks is in report/comparison.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cpbench import profile_difference
from cpbench.errors import NOTHING_COMPARABLE, UNREADABLE, USAGE, CpbenchError, unknown
from cpbench.judging import Row, drafts, judged
from cpbench.matching import Match, by_field, by_key, by_variant, differing
from cpbench.quantities import DEFAULT, PROFILE, chosen
from cpbench.report.rows import layout_of, strategy_of
from cpbench.summary import Comparable
from cpbench.verdicts import NOISE, Verdict

if TYPE_CHECKING:
    import pandas as pd

ACROSS = ("kernel", "kind")
COMPARED: tuple[Verdict, ...] = ("same", "faster", "slower", "better", "worse", "changed", "unsure", "broke", "fixed")
REGRESSIONS: dict[str, tuple[Verdict, ...]] = {"regression": ("slower", "worse", "broke"), "broke": ("broke",)}


@dataclass(frozen=True)
class Geomean:
    """Of the ratios of one metric, over cells that ended well on both sides; `left_out` have no ratio."""

    metric: str
    ratio: float
    cells: int
    left_out: int


@dataclass(frozen=True)
class Comparison:
    """The outcome. `environment` lists (name, old, new) of what differs between the machines and their software."""

    old: Comparable
    new: Comparable
    names: tuple[str, str]
    rows: tuple[Row, ...]
    noise: float
    strict: bool
    environment: tuple[tuple[str, Any, Any], ...] = ()
    profiles: tuple[profile_difference.ProfileRow, ...] = ()
    one_file: bool = False

    @cached_property
    def counts(self) -> Counter[str]:
        """Rows by verdict."""
        return Counter(row.verdict for row in self.rows)

    @property
    def metrics(self) -> list[str]:
        """In the order of their first rows."""
        return list(dict.fromkeys(row.metric for row in self.rows))

    @property
    def is_comparable(self) -> bool:
        """Anything was measured on both sides, or broke, or was fixed."""
        return bool(self.profiles) or any(row.verdict in COMPARED for row in self.rows)

    @property
    def tests(self) -> list[Row]:
        """Rows whose verdict rests on a test."""
        return [row for row in self.rows if row.evidence and row.evidence.p is not None and row.verdict != "n/a"]

    @property
    def false_alarms(self) -> float:
        """How many tests would call a change by chance if nothing had changed: at most, because the band must be left too."""
        from cpbench.evidence import reachable_level

        return sum(reachable_level(*row.evidence.counts) for row in self.tests if row.evidence)

    @cached_property
    def geomeans(self) -> list[Geomean]:
        """One for every metric that has two ratios."""
        import numpy as np

        from cpbench.evidence import geometric_mean

        found = []
        for metric in self.metrics:
            rows = [row for row in self.rows if row.metric == metric]
            ratios = [row.ratio for row in rows if row.ratio and row.verdict in COMPARED]
            if len(ratios) > 1:
                found.append(Geomean(metric, geometric_mean(np.array(ratios)), len(ratios), len(rows) - len(ratios)))
        return found

    def failures(self, fail_on: str) -> list[Row]:
        """Rows for which `--fail-on regression` or `broke` fails. Raises CpbenchError for another word."""
        if fail_on not in REGRESSIONS:
            raise unknown("--fail-on", fail_on, REGRESSIONS)
        return [row for row in self.rows if row.verdict in REGRESSIONS[fail_on]]

    @property
    def reason(self) -> str:
        """Why nothing could be compared: what differs in all keys, or what became of the cells."""
        if any(row.match.old and row.match.new for row in self.rows):
            return f"No cell was measured on both sides: {', '.join(f'{count} {name}' for name, count in self.counts.items())}."
        empty = [name for name, file in zip(self.names, (self.old, self.new), strict=True) if not file.cells]
        if empty:
            return f"{' and '.join(dict.fromkeys(empty))} {'has' if len(set(empty)) == 1 else 'have'} no cells."
        fields = differing(self.old.cells, self.new.cells)
        return f"They differ in {'; '.join(fields)}." if fields else "cpbench show FILE lists the cells of each."

    def require_comparable(self) -> None:
        """Raises CpbenchError (exit code 3) where nothing could be compared, which says why."""
        if not self.is_comparable:
            names = self.names[0] if self.one_file else " and ".join(self.names)
            raise CpbenchError(f"Nothing in {names} can be compared.", self.reason, NOTHING_COMPARABLE)

    def to_frame(self) -> pd.DataFrame:
        """One row per cell and metric. `ratio` is new over old, `low` and `high` its interval; seconds, bytes or 1 as `unit` says."""
        import pandas as pd

        return pd.DataFrame(list(values_of(self.rows)), columns=list(COLUMNS))

    def _repr_html_(self) -> str:
        """What a notebook shows; texts of the files are escaped."""
        from cpbench.report.comparison import comparison_html

        return comparison_html(self)


OF_MATCH: dict[str, Callable[[Match], object]] = {
    "cell": lambda match: match.name,
    "change": lambda match: match.change or None,
    "layout": lambda match: layout_of(match.cell),
    "strategy": lambda match: strategy_of(match.cell),
    "seq": lambda match: max(match.cell.key.get("lengths") or [], default=None),
    "old_status": lambda match: match.old and match.old.status,
    "new_status": lambda match: match.new and match.new.status,
}
OF_ROW: dict[str, Callable[[Row], object]] = {
    "metric": lambda row: row.metric,
    "unit": lambda row: row.unit,
    "old": lambda row: row.evidence.old if row.evidence else row.pair[0] and row.pair[0].median,
    "new": lambda row: row.evidence.new if row.evidence else row.pair[1] and row.pair[1].median,
    "ratio": lambda row: row.ratio,
    "low": lambda row: row.evidence.interval[0] if row.evidence and row.evidence.interval else None,
    "high": lambda row: row.evidence.interval[1] if row.evidence and row.evidence.interval else None,
    "p": lambda row: row.evidence.p if row.evidence else None,
    "verdict": lambda row: row.verdict,
    "evidence": lambda row: row.evidence.basis if row.evidence else None,
    "old_n": lambda row: row.evidence.counts[0] if row.evidence else None,
    "new_n": lambda row: row.evidence.counts[1] if row.evidence else None,
    "old_kind": lambda row: row.pair[0] and row.pair[0].kind,
    "new_kind": lambda row: row.pair[1] and row.pair[1].kind,
    "notes": lambda row: "; ".join(row.notes),
}
_FIRST = ("metric", "unit", "cell", "change", "layout", "strategy", "seq")
COLUMNS = tuple(dict.fromkeys((*_FIRST, *(name for name in OF_ROW if name != "notes"), "old_status", "new_status", "notes")))


def values_of(rows: Iterable[Row]) -> Iterator[dict[str, object]]:
    """Rows as plain values, for frames and files. What they say of their cells is made once for all metrics of these."""
    known: dict[int, dict[str, object]] = {}
    for row in rows:
        values = known.get(id(row.match))
        if values is None:
            values = known[id(row.match)] = {name: value(row.match) for name, value in OF_MATCH.items()}
        values = values | {name: value(row) for name, value in OF_ROW.items()}
        yield {name: values[name] for name in COLUMNS}


def compare(
    old: Comparable,
    new: Comparable | None = None,
    *,
    metrics: Sequence[str] = DEFAULT,
    by: str | None = None,
    noise: float = NOISE,
    strict: bool = False,
    across: Collection[str] = (),
    names: tuple[str, str] = ("old", "new"),
) -> Comparison:
    """Compare two results, or the cells of one: `cpbench.compare(cpbench.load("main.json")[0], cpbench.load("pr.json")[0])`.

    metrics: `time`, `memory`, `profile`, `all`, or names. by: `strategy`, `layout` or `cp`, which then may differ; `strategy=ring` names the
    reference. Without it, one file is compared by its variants (--ab). noise: a change that is none, 0.02 is 2%. strict: p for the whole
    table (Benjamini-Hochberg). across: `kernel`, `kind`: compare what else is `n/a`, values of another one. Raises CpbenchError for unknown names,
    and where one file leaves nothing to compare.
    """
    if unusable := [one for one in across if one not in ACROSS]:
        raise unknown("--across", unusable[0], ACROSS)
    other = old if new is None else new
    wanted = chosen(metrics, [*old.cells, *([] if new is None else new.cells)])
    matches = _matches(old, new, by)
    found = [draft for name in wanted if name != PROFILE for match in matches for draft in drafts(match, name, name == wanted[0], across, bool(by))]
    rows = judged(found, noise, strict)
    profiles = profile_difference.rows(matches) if PROFILE in wanted else []
    return Comparison(old, other, names, tuple(rows), noise, strict, _environment(old, other), tuple(profiles), new is None)


def _matches(old: Comparable, new: Comparable | None, by: str | None) -> list[Match]:
    if by:
        return by_field(by, old.cells, new.cells if new else None)
    if new:
        return by_key(old.cells, new.cells)
    matches = by_variant(old.cells)
    if not matches:
        hint = "Add a second file, or --by strategy, --by layout or --by cp."
        raise CpbenchError("There is one file, its cells are no variants of --ab, and nothing says what to compare.", hint, USAGE)
    return matches


def _environment(old: Comparable, new: Comparable) -> tuple[tuple[str, Any, Any], ...]:
    """What differs, each once: what the ranks of every world size saw is joined where it is the same. Raises CpbenchError for a file that nests too deeply."""
    from cpbench.environment import difference

    try:
        found = difference(old.environment, new.environment)
    except RecursionError as error:
        raise CpbenchError("The environment of a result is nested too deeply.", "The file was edited or damaged.", UNREADABLE) from error
    joined: Iterable[tuple[str, Any, Any]] = ((_without_world(name), before, after) for name, before, after in found)
    return tuple({(name, str(before), str(after)): (name, before, after) for name, before, after in joined}.values())


def _without_world(name: str) -> str:
    """`running.4.nccl` -> `running.nccl`."""
    parts = name.split(".")
    return ".".join([parts[0], *parts[2:]]) if parts[0] == "running" and len(parts) > 2 else name
