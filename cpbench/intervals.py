"""The union of intervals of time. Rows of tokens, which are whole numbers with a meaning of their own, are joined in segments.py."""

from __future__ import annotations

from collections.abc import Iterable


def joined(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same as intervals that do not overlap, in order."""
    found: list[tuple[float, float]] = []
    for start, stop in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], stop)
        else:
            found.append((start, stop))
    return found
