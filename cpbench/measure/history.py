"""Memory of one pass over time as plain data: levels, the phases in which they were reached, and who owned the most.

A history is made by a tracker of live tensors or from an allocator's trace, travels as JSON and is drawn later. Nothing is measured
here and torch is not imported. Levels are thinned for storage; peaks by phase are taken before that.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpbench.units import format_bytes

MAX_POINTS = 2000
MAX_PHASES = 4000
NAMED_OWNERS = 3

Level = tuple[float, int]  # seconds, and bytes from then on


@dataclass(frozen=True)
class Phase:
    """A span that was open from `start` to `end`, in seconds since the history began."""

    path: str
    start: float
    end: float

    @property
    def depth(self) -> int:
        """1 for a span that no other one is around."""
        return self.path.count("/") + 1


@dataclass(frozen=True)
class Owner:
    """What memory is for: a category of what is held, or the span, operator and shape that made a tensor."""

    name: str
    bytes: int

    def __str__(self) -> str:
        return f"{self.name} {format_bytes(self.bytes)}"


@dataclass(frozen=True)
class History:
    """Bytes over time. `levels` begin at 0 s; `peaks` are by the path of a phase, `owners` those at the peak, or where memory ran out."""

    source: str
    levels: tuple[Level, ...]
    phases: tuple[Phase, ...] = ()
    peaks: dict[str, int] = field(default_factory=dict)
    owners: tuple[Owner, ...] = ()

    @classmethod
    def of(cls, source: str, levels: Sequence[Level], phases: Iterable[Phase], owners: Iterable[Owner] = ()) -> History:
        """A history from what was recorded, in order of time on one clock: it begins at the first level, and is thinned to be stored."""
        start = levels[0][0]
        begun = [Phase(phase.path, phase.start - start, phase.end - start) for phase in sorted(phases, key=lambda phase: (phase.start, phase.depth))]
        moved = [(seconds - start, size) for seconds, size in levels]
        return cls(source, tuple(thinned(moved)), tuple(_fewer(begun)), _peaks(moved, begun), tuple(owners))

    @property
    def peak(self) -> int:
        return max(size for _, size in self.levels)

    @property
    def peak_phase(self) -> str:
        """The innermost phase in which the peak was first reached; empty outside of all."""
        when = next(seconds for seconds, size in self.levels if size == self.peak)
        around = [phase for phase in self.phases if phase.start <= when <= phase.end]
        return max(around, key=lambda phase: (phase.depth, phase.start)).path if around else ""

    @property
    def seconds(self) -> float:
        """The duration, to the last thing that was seen."""
        return max([self.levels[-1][0], *(phase.end for phase in self.phases)])

    def peak_by_phase(self) -> dict[str, int]:
        """By the path of a phase, in the order in which they first began: the most bytes while one of that path was open."""
        return dict(self.peaks)

    def to_dict(self) -> dict[str, Any]:
        """As JSON: every path once, phases as (number of the path, start, end)."""
        paths = list(dict.fromkeys([*self.peaks, *(phase.path for phase in self.phases)]))
        number = {path: index for index, path in enumerate(paths)}
        return {
            "source": self.source,
            "levels": [[round(seconds, 7), size] for seconds, size in self.levels],
            "paths": paths,
            "phases": [[number[phase.path], round(phase.start, 7), round(phase.end, 7)] for phase in self.phases],
            "peaks": self.peaks,
            "owners": [[owner.name, owner.bytes] for owner in self.owners],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> History:
        """The inverse of `to_dict`. Raises KeyError, IndexError, TypeError or ValueError for anything else."""
        levels = tuple((float(seconds), int(size)) for seconds, size in data["levels"])
        if not levels:
            raise ValueError("no levels")
        paths = [str(path) for path in data["paths"]]
        phases = tuple(Phase(paths[number], float(start), float(end)) for number, start, end in data["phases"])
        peaks = {str(path): int(size) for path, size in data["peaks"].items()}
        return cls(str(data["source"]), levels, phases, peaks, tuple(Owner(str(name), int(size)) for name, size in data["owners"]))


def history_file(folder: Path, rank: int) -> Path:
    """Where a rank leaves its history for the driver."""
    return folder / f"memory.rank{rank}.json"


def largest_first(sizes: dict[str, int]) -> list[Owner]:
    """Owners from bytes by name."""
    return sorted((Owner(name, size) for name, size in sizes.items() if size), key=lambda owner: -owner.bytes)


def named(owners: Sequence[Owner]) -> str:
    """The largest owners in words: `largest: weights 1.20 GiB, K/V cache 600 MiB, layer/mlp aten::mm [36864, 6144] 432 MiB`."""
    return f"largest: {', '.join(map(str, owners[:NAMED_OWNERS]))}" if owners else "nothing is known to be held"


def thinned(levels: Sequence[Level], points: int = MAX_POINTS) -> list[Level]:
    """At most about `points` levels: the first, the last, and of every stretch of time its lowest and its highest."""
    if len(levels) <= points:
        return list(levels)
    stretches, kept = max(1, points // 2 - 1), {0, len(levels) - 1}
    for number in range(stretches):
        stretch = range(number * len(levels) // stretches, (number + 1) * len(levels) // stretches)
        kept |= {min(stretch, key=lambda index: levels[index][1]), max(stretch, key=lambda index: levels[index][1])}
    return [levels[index] for index in sorted(kept)]


def _fewer(phases: Sequence[Phase]) -> list[Phase]:
    """Of too many phases only those on the outside."""
    found, depth = list(phases), max((phase.depth for phase in phases), default=1)
    while len(found) > MAX_PHASES and depth > 1:
        depth -= 1
        found = [phase for phase in found if phase.depth <= depth]
    return found[:MAX_PHASES]


def _peaks(levels: Sequence[Level], phases: Iterable[Phase]) -> dict[str, int]:
    times = [seconds for seconds, _ in levels]
    peaks: dict[str, int] = {}
    for phase in phases:
        first, last = bisect_right(times, phase.start) - 1, bisect_right(times, phase.end)  # the level at its start counts
        peak = max(size for _, size in levels[max(0, first) : max(1, last)])
        peaks[phase.path] = max(peak, peaks.get(phase.path, 0))
    return peaks
