"""How long a sweep will still take, and whether a cell fits into the budget: the plan's estimates, corrected by what was measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from cpbench.plan import GROUP_SECONDS, Plan, PlannedCell, timed_passes
from cpbench.scenario import Timing
from cpbench.stats import median


class Pace:
    """Follows the cells of a sweep. Estimates of cells to come are multiplied by measured over estimated time of those that are done."""

    def __init__(self, plan: Plan, timing: Timing, budget: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._plan, self._timing, self._budget, self._clock = plan, timing, budget, clock
        self._begin = self._cell_begin = clock()
        self._measured = self._estimated = 0.0
        self._samples: dict[str, list[float]] = {}

    def started(self) -> None:
        """A cell has started, or two that alternate."""
        self._cell_begin, self._samples = self._clock(), {}

    def sampled(self, planned: PlannedCell, seconds: float) -> list[float]:
        """A timed pass of a running cell is over; returns all its samples of this round."""
        self._samples.setdefault(planned.cell.id, []).append(seconds)
        return list(self._samples[planned.cell.id])

    def finished(self, planned: PlannedCell) -> None:
        """A running cell is done with its round. Of two that alternate, the first to be done has taken all the time and the other none."""
        now = self._clock()
        self._measured += now - self._cell_begin
        self._estimated += planned.seconds
        self._cell_begin = now

    @property
    def ratio(self) -> float:
        """Measured over estimated."""
        return self._measured / self._estimated if self._estimated > 0 else 1.0

    def fits(self, together: Sequence[PlannedCell], *, starting: bool) -> bool:
        """Whether a round of what is measured together ends within the budget, with a group to be started first or not."""
        if self._budget is None:
            return True
        start = GROUP_SECONDS if starting else 0.0
        return self._clock() - self._begin + start + sum(planned.seconds for planned in together) * self.ratio <= self._budget

    def seconds_left(self, running: Sequence[PlannedCell], to_come: Iterable[tuple[PlannedCell, int]]) -> float:
        """Until the end of the sweep. `to_come` has the rounds left of every open cell, those that are running included."""
        open_cells = list(to_come)
        rounds = sum(planned.seconds * left for planned, left in open_cells)
        later = {(planned.cell.world_size, nth) for planned, left in open_cells for nth in range(left)}
        behind = max(0.0, rounds - sum(planned.seconds for planned in running)) * self.ratio
        left = behind + self._running_seconds(running) + GROUP_SECONDS * max(0, len(later) - 1)
        return left if self._budget is None else max(0.0, min(left, self._budget - (self._clock() - self._begin)))

    def _running_seconds(self, running: Sequence[PlannedCell]) -> float:
        if not self._samples:
            return max(0.0, sum(planned.seconds for planned in running) * self.ratio - (self._clock() - self._cell_begin))
        return sum(self._passes_left(planned) for planned in running)

    def _passes_left(self, planned: PlannedCell) -> float:
        """Seconds of the timed passes of a running cell that are to come; while none was timed, as long as those of the other."""
        samples = self._samples.get(planned.cell.id) or next(iter(self._samples.values()))
        once = median(samples)
        return max(0, timed_passes(once, self._timing) - len(samples)) * once
