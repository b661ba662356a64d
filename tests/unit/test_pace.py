"""Time left and the budget, with a clock that the test turns."""

from __future__ import annotations

import pytest

from cpbench.pace import Pace
from cpbench.plan import GROUP_SECONDS, timed_passes
from tests.unit.fakes import made


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_estimates_of_cells_to_come_follow_what_was_measured() -> None:
    scenario, plan = made(seq="4k")
    clock = Clock()
    pace = Pace(plan, scenario.timing, None, clock)
    first, second, third = plan.runnable
    assert pace.ratio == 1.0
    pace.started()
    assert pace.seconds_left([first], [(first, 1), (second, 1), (third, 1)]) == pytest.approx(plan.seconds - GROUP_SECONDS, abs=0.01)
    clock.now += 3 * first.seconds
    pace.finished(first)
    assert pace.ratio == pytest.approx(3.0)
    pace.started()
    assert pace.seconds_left([second], [(second, 1), (third, 1)]) == pytest.approx(3 * (second.seconds + third.seconds))
    assert pace.sampled(second, 0.5) == [0.5] and pace.sampled(second, 0.5) == [0.5, 0.5]
    passes = timed_passes(0.5, scenario.timing) - 2
    assert pace.seconds_left([second], [(second, 1), (third, 1)]) == pytest.approx(0.5 * passes + 3 * third.seconds)
    assert pace.seconds_left([second], [(second, 2), (third, 2)]) > 0.5 * passes + 9 * third.seconds  # another round: another start


def test_the_budget_counts_what_has_passed_and_the_start_of_a_group() -> None:
    scenario, plan = made(seq="4k")
    clock = Clock()
    cell = plan.runnable[0]
    pace = Pace(plan, scenario.timing, cell.seconds + 1.0, clock)
    assert pace.fits([cell], starting=False) and not pace.fits([cell], starting=True)
    assert pace.seconds_left([cell], [(cell, 9)]) == pytest.approx(cell.seconds + 1.0)
    clock.now += 1.5
    assert not pace.fits([cell], starting=False)
    assert Pace(plan, scenario.timing, None, clock).fits([cell], starting=True)


def test_two_cells_that_alternate_are_two_cells_of_work() -> None:
    scenario, plan = made(seq="4k", ab=["strategy=ring", "strategy=allgather"])
    clock = Clock()
    baseline, *pair = plan.runnable
    pace = Pace(plan, scenario.timing, baseline.seconds + sum(planned.seconds for planned in pair), clock)
    assert pace.fits([pair[0]], starting=True) and pace.fits(pair, starting=False) and not pace.fits([*pair, *pair], starting=False)
    pace.started()
    to_come = [(planned, 1) for planned in pair]
    assert pace.sampled(pair[0], 0.5) == [0.5] and pace.sampled(pair[1], 0.4) == [0.4] and pace.sampled(pair[1], 0.4) == [0.4, 0.4]
    passes = 0.5 * (timed_passes(0.5, scenario.timing) - 1) + 0.4 * (timed_passes(0.4, scenario.timing) - 2)
    assert Pace.seconds_left(pace, pair, to_come) == pytest.approx(min(passes, baseline.seconds + sum(planned.seconds for planned in pair)))
    clock.now += 2 * sum(planned.seconds for planned in pair)
    for planned in pair:
        pace.finished(planned)
    assert pace.ratio == pytest.approx(2.0)
