"""Which of the measured layouts to take for a batch: the fastest, the one that needs least memory, and the Pareto front of the two.

Pure: candidates in, advice out. A candidate ties with the fastest where their intervals overlap: then this run does not tell them apart.
The front goes by the medians alone. How the advice is worded is decided in report/advice.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """One measured layout. `interval` encloses the median of `seconds` as well as is known; `memory` is the peak of a rank in bytes."""

    name: str
    seconds: float
    interval: tuple[float, float]
    memory: int | None


@dataclass(frozen=True)
class Advice:
    """`ties` are as fast as `fastest` within noise. `leanest` and `front` are empty where no memory is known; `front` is by time."""

    fastest: Candidate
    ties: tuple[Candidate, ...]
    leanest: tuple[Candidate, ...]
    front: tuple[Candidate, ...]


def advise(candidates: Sequence[Candidate]) -> Advice | None:
    """The advice for one batch; None where there are fewer than two layouts to choose from."""
    if len(candidates) < 2:
        return None
    by_time = sorted(candidates, key=lambda candidate: candidate.seconds)  # stable: the earlier of two equals
    fastest, others = by_time[0], by_time[1:]
    known = [candidate for candidate in by_time if candidate.memory is not None]
    least = min((candidate.memory for candidate in known if candidate.memory is not None), default=None)
    return Advice(
        fastest=fastest,
        ties=tuple(other for other in others if other.interval[0] <= fastest.interval[1]),
        leanest=tuple(candidate for candidate in known if candidate.memory == least),
        front=tuple(candidate for candidate in known if not any(_dominates(other, candidate) for other in known)),
    )


def _dominates(one: Candidate, other: Candidate) -> bool:
    """Whether `one` is better in time or memory, and worse in neither."""
    mine, theirs = (one.seconds, one.memory or 0), (other.seconds, other.memory or 0)
    return mine != theirs and mine[0] <= theirs[0] and mine[1] <= theirs[1]
