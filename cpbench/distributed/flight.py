"""A collective in flight, and when a rank started and waited for it: marks on the rank's own clock, in the passes where somebody asks.

Between start and wait a rank does its own work, behind which the transfer hides; while it starts and waits, the transfer is exposed. What a
mark is (a reading of the clock, an event in a stream) is the device's affair, and what follows from the marks is worked out in measure/split.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cpbench.tracing.spans import collective, watched

Mark = Any  # of Device.mark()


@dataclass(frozen=True)
class Flight:
    """One collective of a group of `size` ranks, or one piece of one. `travels`: bytes that this rank receives, or sends to a single other."""

    axis: str
    size: int
    operation: str
    travels: int
    begin: Mark
    started: Mark
    waiting: Mark
    done: Mark


@dataclass
class FlightLog:
    """The flights of one rank in one pass, in the order in which they were over."""

    mark: Callable[[], Mark]
    flights: list[Flight] = field(default_factory=list)


class Handle:
    """A collective in flight. `wait()` returns when its output may be read and its input reused."""

    def __init__(self, wait: Callable[[], object] | None = None) -> None:
        self._wait = wait

    def wait(self) -> None:
        if self._wait is not None:
            self._wait()
            self._wait = None


def started(axis: str, size: int, operation: str, travels: int, begin: Callable[[], Handle], log: FlightLog | None) -> Handle:
    """What `begin` starts; marked and named where somebody looks on."""
    if log is None and not watched():
        return begin()
    mark = log.mark if log else _nothing
    first = mark()
    with collective(axis, operation)(travels):
        handle = begin()
    second = mark()

    def wait() -> None:
        third = mark()
        with collective(axis, operation, "wait")(travels):
            handle.wait()
        if log:
            log.flights.append(Flight(axis, size, operation, travels, first, second, third, mark()))

    return Handle(wait)


def _nothing() -> None:
    """The mark that nobody reads."""
