"""The stretches of a layer put in order for people: a lane for a rank's work and one for each axis it communicates on, and what of it is exposed.

Work that goes on under one name is one stretch, however often transfers were started meanwhile. A transfer is exposed while its rank does no
work of its own. Pure data; the table of it is in report/timeline.py and the figure in plot/timeline.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from cpbench.intervals import joined
from cpbench.projection.stretch import COMPUTE, Stretch

Intervals = tuple[tuple[float, float], ...]
TOUCHING = 1e-9  # of the whole time: work that goes on after so short a gap did not stop


@dataclass(frozen=True)
class Laid:
    """A stretch, and when it is exposed: transfers only. Seconds."""

    stretch: Stretch
    exposed: Intervals = ()

    @property
    def seconds(self) -> float:
        """How long it lasts."""
        return self.stretch.end - self.stretch.start

    @property
    def exposed_s(self) -> float:
        """How long its rank does nothing else."""
        return sum(end - start for start, end in self.exposed)


def laid_out(stretches: Iterable[Stretch]) -> list[Laid]:
    """By rank, by lane (work first, then axes as they first occur), and by time."""
    found = list(stretches)
    within = TOUCHING * max((stretch.end for stretch in found), default=0.0)
    laid: list[Laid] = []
    for rank in sorted({stretch.rank for stretch in found}):
        mine = sorted((stretch for stretch in found if stretch.rank == rank), key=lambda stretch: stretch.start)
        work = joined((stretch.start, stretch.end) for stretch in mine if stretch.lane == COMPUTE)
        for lane in sorted(dict.fromkeys(stretch.lane for stretch in mine), key=lambda lane: lane != COMPUTE):
            there = [stretch for stretch in mine if stretch.lane == lane]
            laid += map(Laid, _unbroken(there, within)) if lane == COMPUTE else [Laid(stretch, _without(stretch, work)) for stretch in there]
    return laid


def exposed_seconds(laid: Sequence[Laid], rank: int) -> float:
    """How long a rank only communicates, on whatever axes."""
    return sum(end - start for start, end in joined(piece for one in laid if one.stretch.rank == rank for piece in one.exposed))


def _unbroken(stretches: Sequence[Stretch], within: float) -> list[Stretch]:
    """Neighbours of one name as one."""
    found: list[Stretch] = []
    for stretch in stretches:
        if found and found[-1].name == stretch.name and stretch.start - found[-1].end <= within:
            found[-1] = replace(found[-1], end=stretch.end)
        else:
            found.append(stretch)
    return found


def _without(stretch: Stretch, work: Sequence[tuple[float, float]]) -> Intervals:
    """The parts of a stretch outside of these intervals, which are in order."""
    left, start = [], stretch.start
    for begin, end in work:
        if begin >= stretch.end or end <= start:
            continue
        if begin > start:
            left.append((start, begin))
        start = end
    if start < stretch.end:
        left.append((start, stretch.end))
    return tuple(left)
