"""How long a sweep will still take, and whether a cell fits into the budget: the plan's estimates, corrected by what was measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from cpbench.plan import GROUP_SECONDS, Plan, PlannedCell, timed_passes
from cpbench.scenario import Timing
from cpbench.stats import median


class Pace:
    """Follows the cells of a sweep. Estimates of cells to come are multiplied by measured over estimated time of those that are done."""

    def __init__(self, plan: Plan, timing: Timing, budget: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._plan, self._timing, self._budget, self._clock = plan, timing, budget, clock
        self._begin = self._cell_begin = clock()
        self._measured = self._estimated = 0.0
        self._samples: list[float] = []

    def started(self) -> None:
        """A cell has started."""
        self._cell_begin, self._samples = self._clock(), []

    def sampled(self, seconds: float) -> list[float]:
        """A timed pass of the running cell is over; returns all its samples of this round."""
        self._samples.append(seconds)
        return list(self._samples)

    def finished(self, planned: PlannedCell) -> None:
        """The running cell is done with its round."""
        self._measured += self._clock() - self._cell_begin
        self._estimated += planned.seconds

    @property
    def ratio(self) -> float:
        """Measured over estimated."""
        return self._measured / self._estimated if self._estimated > 0 else 1.0

    def fits(self, planned: PlannedCell, *, starting: bool) -> bool:
        """Whether a round of this cell ends within the budget, with a group to be started first or not."""
        if self._budget is None:
            return True
        start = GROUP_SECONDS if starting else 0.0
        return self._clock() - self._begin + start + planned.seconds * self.ratio <= self._budget

    def seconds_left(self, running: PlannedCell, to_come: Iterable[tuple[PlannedCell, int]]) -> float:
        """Until the end of the sweep. `to_come` has the rounds left of every open cell, the one that is running included."""
        open_cells = list(to_come)
        rounds = sum(planned.seconds * left for planned, left in open_cells) * self.ratio
        later = {(planned.cell.world_size, nth) for planned, left in open_cells for nth in range(left)}
        left = max(0.0, rounds - running.seconds * self.ratio) + self._running_seconds(running) + GROUP_SECONDS * max(0, len(later) - 1)
        return left if self._budget is None else max(0.0, min(left, self._budget - (self._clock() - self._begin)))

    def _running_seconds(self, running: PlannedCell) -> float:
        if not self._samples:
            return max(0.0, running.seconds * self.ratio - (self._clock() - self._cell_begin))
        once = median(self._samples)
        return max(0, timed_passes(once, self._timing) - len(self._samples)) * once
