"""Where the time of two profiles differs: phases of the slowest rank of each, and operators or kernels. Seconds per step, no verdict.

A profile is a few traced steps of one run: it says where to look, and the timed passes say what it is worth.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from cpbench.matching import Match
from cpbench.tracing.record import Profile


@dataclass(frozen=True)
class ProfileRow:
    """Seconds of one part of a step on both sides; None where a side does not have it."""

    cell: str
    part: Literal["step", "phase", "kernel", "range"]
    name: str
    old_s: float | None
    new_s: float | None

    @property
    def difference_s(self) -> float:
        """What is not there takes no time."""
        return (self.new_s or 0.0) - (self.old_s or 0.0)


def rows(matches: Iterable[Match]) -> list[ProfileRow]:
    """Of every match that has a profile on both sides, in the order of its parts; kernels by the larger of their times."""
    return [row for match in matches if match.old and match.new and match.old.profile and match.new.profile for row in _rows(match)]


def _rows(match: Match) -> Iterator[ProfileRow]:
    assert match.old and match.new and match.old.profile and match.new.profile, "profiles on both sides"
    label = f"{match.name}: {match.change}" if match.change else match.name
    sides = [_parts(cell.profile) for cell in (match.old, match.new) if cell.profile]
    for part in ("step", "phase", "range", "kernel"):
        old, new = sides[0][part], sides[1][part]
        names = list(dict.fromkeys([*old, *new]))
        if part == "kernel":
            names.sort(key=lambda name: -max(old.get(name, 0.0), new.get(name, 0.0)))
        yield from (ProfileRow(label, part, name, old.get(name), new.get(name)) for name in names)


def _parts(profile: Profile) -> dict[Literal["step", "phase", "kernel", "range"], dict[str, float]]:
    """Seconds by name. Phases are those of the slowest rank, kernels of the rank where they took longest, ranges per step on their slowest rank."""
    slowest = max(profile.ranks, key=lambda rank: rank.step_s, default=None)
    ranges: dict[str, float] = {}
    for one in profile.nvtx:
        ranges[one.range] = max(ranges.get(one.range, 0.0), one.seconds / max(1, profile.steps))
    kernels: dict[str, float] = {}
    for kernel in profile.kernels:
        kernels[kernel.name] = max(kernels.get(kernel.name, 0.0), kernel.seconds)
    return {
        "step": {"step": slowest.step_s} if slowest else {},
        "phase": {phase.phase: phase.time_s for phase in profile.phases if slowest and phase.rank == slowest.rank},
        "range": ranges,
        "kernel": kernels,
    }
