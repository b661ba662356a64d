"""A stretch of time of one rank: work in the lane `compute`, a transfer in the lane of its axis. What is drawn of it is the report's affair."""

from __future__ import annotations

from dataclasses import dataclass

COMPUTE = "compute"


@dataclass(frozen=True)
class Stretch:
    """`name`: the span that work was in, or the operation; seconds from the beginning of what is shown."""

    rank: int
    lane: str
    name: str
    start: float
    end: float
