"""How much a rank communicates: calls and wire bytes per axis and operation, predicted by formula or counted by the recorder.

Wire bytes are the bytes a rank *receives from other ranks*. Pure data: the formulas of a strategy are in its file, the recorder is in
collectives.py, and a test holds one against the other for every strategy.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SUMMED_BYTES = 1 << 20  # of a rank's rows that are summed at a time: smaller pieces cost gloo more calls than they save


def summed_parts(received: int) -> int:
    """In how many pieces so many bytes from each rank are summed by a reduce-scatter."""
    return max(1, -(-received // SUMMED_BYTES))


def summing_bytes(rows: tuple[int, ...], row_bytes: int, mine: int) -> int:
    """Space for what arrives in a reduce-scatter over ranks that keep so many rows, on one that keeps `mine`: two pieces, or the only one."""
    parts = summed_parts(max(rows) * row_bytes)
    return min(parts, 2) * len(rows) * -(-mine // parts) * row_bytes


@dataclass
class Traffic:
    """{(axis, operation): [calls, bytes received]} of one rank."""

    counts: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)

    def add(self, axis: str, operation: str, received: int, calls: int = 1) -> None:
        """Count `calls` collectives that together receive `received` bytes."""
        old_calls, old_bytes = self.counts.get((axis, operation), (0, 0))
        self.counts[axis, operation] = (old_calls + calls, old_bytes + received)

    def __add__(self, other: Traffic) -> Traffic:
        total = Traffic(dict(self.counts))
        for (axis, operation), (calls, received) in other.counts.items():
            total.add(axis, operation, received, calls)
        return total

    def times(self, factor: int) -> Traffic:
        """The traffic of `factor` equal layers."""
        return Traffic({key: (calls * factor, received * factor) for key, (calls, received) in self.counts.items()})

    def nonzero(self) -> Traffic:
        """Without the operations that were not called."""
        return Traffic({key: counts for key, counts in self.counts.items() if counts[0]})

    @property
    def bytes(self) -> int:
        return sum(received for _, received in self.counts.values())

    @property
    def calls(self) -> int:
        return sum(calls for calls, _ in self.counts.values())

    def to_dict(self) -> dict[str, Any]:
        """{axis: {operation: {calls, bytes}}}, sorted."""
        nested: dict[str, Any] = {}
        for (axis, operation), (calls, received) in sorted(self.counts.items()):
            nested.setdefault(axis, {})[operation] = {"calls": calls, "bytes": received}
        return nested


@dataclass(frozen=True)
class Transfer:
    """One collective, or one piece of one, as one of the `size` ranks of a group sees it. `travels`: bytes that it receives, or sends to a single other.

    `to` and `source`: whom it sends to and receives from, as steps from its own place in the group, so that the same is true of every place.
    """

    axis: str
    size: int
    operation: str
    travels: int
    to: tuple[int, ...]
    source: tuple[int, ...]

    @property
    def is_whole(self) -> bool:
        """Whether everybody meets everybody."""
        return len(self.to) == len(self.source) == self.size - 1
