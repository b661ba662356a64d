"""What of a cell can be compared: its metrics by name, the kind of each value, and which of two cells' belong together.

A metric may be there as it was measured, derived or projected: three names of one quantity, which are not compared with each other unless
that is asked for. Peaks and traffic are exact: the same run gives them again. What a difference means is decided in verdicts.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

from cpbench.errors import unknown
from cpbench.frame import MEMORY, ValueKind, metrics_of, value_kind
from cpbench.records import TIME_METRIC
from cpbench.results import ComparedCell

TIME, PEAK, PROFILE, EVERYTHING = "time", "memory", "profile", "all"
DEFAULT = (TIME, PEAK)
KINDS: tuple[ValueKind, ...] = ("measured", "derived", "projected")
EXACT_MEMORY = ("peak_live_bytes", "peak_allocator_bytes", "peak_reserved_bytes")
EXACT = (*EXACT_MEMORY, "comm_bytes")
TIMES = tuple(TIME_METRIC.values())


class Quantity(NamedTuple):
    """One number of one cell. `name` is without the prefix that says its kind; `rounds` leaves out those without samples."""

    name: str
    kind: ValueKind
    unit: str
    better: Literal["lower", "higher", "none"]
    rounds: Sequence[Sequence[float]]
    median: float
    interval: tuple[float, float] | None
    n: int

    @property
    def exact(self) -> bool:
        """Counted and not timed, so that a difference is no chance."""
        return self.name in EXACT

    @property
    def is_speed(self) -> bool:
        """Seconds, or something per second."""
        return self.unit == "s" or self.unit.endswith("/s")


Pair = tuple[Quantity | None, Quantity | None]


@lru_cache(maxsize=256)
def plain_name(metric: str) -> str:
    """`derived_ttft_s` -> `ttft_s`."""
    return metric.removeprefix(f"{value_kind(metric)}_")


def chosen(asked: Sequence[str], cells: Iterable[ComparedCell]) -> tuple[str, ...]:
    """The names that were asked for, `all` spelled out. Raises CpbenchError for one that no cell has."""
    asked = [name for text in asked for name in (part.strip() for part in text.split(",")) if name]
    if set(asked) <= {*DEFAULT, PROFILE}:
        return tuple(dict.fromkeys(asked))
    there = dict.fromkeys(name for cell in cells for metric in metrics_of(cell) for name in (plain_name(metric), metric))
    for name in asked:
        if name not in (*there, *DEFAULT, PROFILE, EVERYTHING):
            raise unknown("metric", name, [*there, *DEFAULT, PROFILE, EVERYTHING])
    every = dict.fromkeys(plain_name(name) for name in there)
    return tuple(dict.fromkeys(name for one in asked for name in (every if one == EVERYTHING else [one])))


def pairs(name: str, old: ComparedCell, new: ComparedCell) -> list[Pair]:
    """The quantities of that name on both sides, kind by kind; where the sides have no kind in common, the first kind of each.

    `time` is what the target is about, `memory` the peak that tables show of the device. A side that does not have it is None; without
    either there is no pair.
    """
    bases = [TIME_METRIC.get(str(old.key.get("target")), "ttft_s")] if name == TIME else _peak_names(old, new) if name == PEAK else [plain_name(name)]
    kinds = KINDS if name in (TIME, PEAK) or name in bases else (value_kind(name),)
    found: list[Pair] = []
    for base in bases:
        mine, theirs = _kinds(old, base, kinds), _kinds(new, base, kinds)
        shared: list[Pair] = [(mine[kind], theirs[kind]) for kind in mine if kind in theirs]
        if not shared and (mine or theirs):
            shared = [(next(iter(mine.values()), None), next(iter(theirs.values()), None))]
        found += shared
    return found


def _kinds(cell: ComparedCell, base: str, kinds: Sequence[ValueKind]) -> dict[ValueKind, Quantity]:
    found = {}
    for kind, name in _full_names(base, tuple(kinds)):
        if (name in cell.metrics or kind == "measured") and (value := quantity(cell, name)):
            found[kind] = value
    return found


@lru_cache(maxsize=256)
def _full_names(base: str, kinds: tuple[ValueKind, ...]) -> tuple[tuple[ValueKind, str], ...]:
    return tuple((kind, base if kind == "measured" else f"{kind}_{base}") for kind in kinds)


def quantity(cell: ComparedCell, metric: str) -> Quantity | None:
    """A metric by its full name; None where the cell does not have it."""
    stored = cell.metrics.get(metric)
    if stored:
        rounds = stored.rounds if all(stored.rounds) else [one for one in stored.rounds if one]
        return Quantity(plain_name(metric), value_kind(metric), stored.unit, stored.better, rounds, stored.median, stored.ci95, stored.n)
    if metric in MEMORY:  # without making all metrics of the cell, of which there may be thousands
        value = getattr(cell.memory, metric) if cell.memory else None
        return None if value is None else Quantity(metric, "measured", "B", "lower", [[value]], value, None, 1)
    once = metrics_of(cell).get(metric) if metric in ("first_call_s", "comm_bytes", "numerics_ratio") else None
    return Quantity(metric, "measured", once.unit, once.better, [[once.median]], once.median, None, 1) if once else None


def _peak_names(old: ComparedCell, new: ComparedCell) -> list[str]:
    """Live tensors on a CPU, the allocator's peak on a GPU; the other one where both cells have only that. And what was derived or projected of it."""
    first, second = EXACT_MEMORY[:2] if old.key.get("device") == "cpu" else EXACT_MEMORY[1::-1]
    return [first if _both_have(first, old, new) or not _both_have(second, old, new) else second]


def _both_have(name: str, old: ComparedCell, new: ComparedCell) -> bool:
    return bool(old.memory and new.memory) and getattr(old.memory, name) is not None and getattr(new.memory, name) is not None
