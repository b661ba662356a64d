"""Traces of all ranks become one profile: times by phase and rank, and the operators or kernels that took longest.

Pure functions over the traced steps of timeline.py. Which files there are, and what happens to them, is decided in session.py.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cpbench.tracing.record import KernelTime, PhaseTime, Profile, RankTime
from cpbench.tracing.timeline import Step

TOP_KERNELS = 15
Peaks = Mapping[int, Mapping[str, int]]  # rank -> phase -> bytes


def profile_of(steps: Sequence[Sequence[Step]], seconds: Sequence[Sequence[float]], peaks: Peaks | None = None) -> Profile:
    """The profile of a cell from the traced steps of every rank.

    `seconds`: of every step, those of every rank by the clock of the timed passes. `peaks`: bytes alive by rank and phase, where known.
    """
    peaks = peaks or {}
    ranks = [_rank(rank, mine, [step[rank] for step in seconds]) for rank, mine in enumerate(steps)]
    phases = [_phase(phase, rank, mine, peaks.get(rank, {}).get(phase)) for rank, mine in enumerate(steps) for phase in _names(mine)]
    return Profile(tool="torch", steps=len(seconds), ranks=ranks, phases=phases, kernels=_top(steps))


def _rank(rank: int, steps: Sequence[Step], seconds: Sequence[float]) -> RankTime:
    return RankTime(rank=rank, step_s=_mean(seconds), **_shares(steps))


def _phase(phase: str, rank: int, steps: Sequence[Step], peak: int | None) -> PhaseTime:
    time = _mean(step.seconds(phase=phase) for step in steps)
    return PhaseTime(phase=phase, rank=rank, time_s=time, peak_bytes=peak, **_shares(steps, phase))


def _shares(steps: Sequence[Step], phase: str | None = None) -> dict[str, Any]:
    """What the time of a phase, or of all, was spent on."""
    communication = _mean(step.communication(phase) for step in steps)
    exposed = _mean(step.seconds("exposed", phase) for step in steps)
    return {
        "compute_s": _mean(step.seconds("compute", phase) for step in steps),
        "comm_s": communication,
        "exposed_comm_s": exposed,
        "overlap": max(0.0, 1 - exposed / communication) if communication > 0 else None,
        "idle_s": _mean(step.seconds("idle", phase) for step in steps),
    }


def _names(steps: Iterable[Step]) -> list[str]:
    """Phases in the order in which they first came."""
    return list(dict.fromkeys(piece.phase for step in steps for piece in step.pieces))


def _top(steps: Sequence[Sequence[Step]]) -> list[KernelTime]:
    """Of every name the rank where it took longest; the longest of these."""
    longest: dict[str, KernelTime] = {}
    for rank, mine in enumerate(steps):
        calls: defaultdict[str, int] = defaultdict(int)
        total: defaultdict[str, float] = defaultdict(float)
        for work in (work for step in mine for work in step.work):
            calls[work.name] += work.calls
            total[work.name] += work.seconds
        whole = sum(step.seconds() for step in mine)
        for name, spent in total.items():
            if name not in longest or spent / len(mine) > longest[name].seconds:
                longest[name] = KernelTime(name=name, rank=rank, calls=calls[name] / len(mine), seconds=spent / len(mine), share=spent / whole)
    return sorted(longest.values(), key=lambda kernel: -kernel.seconds)[:TOP_KERNELS]


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return sum(numbers) / len(numbers)
