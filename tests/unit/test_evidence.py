"""The exact bootstrap, the exact rank test, and what tables of tests are worth, held against enumeration and scipy."""

from __future__ import annotations

from collections import Counter
from itertools import combinations_with_replacement
from math import factorial, prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from cpbench.evidence import (
    adjusted,
    geometric_mean,
    median_range,
    median_weights,
    rank_sum_p,
    ratio_interval,
    reachable_level,
    smallest_p,
)

times = st.lists(st.floats(0.5, 2.0), min_size=4, max_size=8)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 7])
def test_weights_are_those_of_all_multisets(n: int) -> None:
    samples = np.arange(1, n + 1) ** 1.7
    enumerated: Counter[float] = Counter()
    for draws in combinations_with_replacement(range(n), n):
        orders = factorial(n) / prod(factorial(count) for count in Counter(draws).values())
        enumerated[round(float(np.median(samples[list(draws)])), 9)] += orders / n**n
    lower, upper, weights = median_weights(n)
    computed: Counter[float] = Counter()
    for value, weight in zip((samples[lower] + samples[upper]) / 2, weights, strict=True):
        computed[round(float(value), 9)] += float(weight)
    assert dict(computed) == pytest.approx(dict(enumerated))


def test_the_interval_is_that_of_all_pairs_of_resamples() -> None:
    rng = np.random.default_rng(0)
    old, new = rng.uniform(1, 2, (3, 4)), rng.uniform(1, 2, (3, 3))
    low, high = ratio_interval(old, new)
    for row in range(3):
        medians = [[np.median(side[row][list(np.unravel_index(i, (n,) * n))]) for i in range(n**n)] for side, n in ((old, 4), (new, 3))]
        ratios = np.sort(np.divide.outer(medians[1], medians[0]).ravel())
        edge = round(0.05 * ratios.size)
        assert ratios[edge - 1] <= low[row] <= ratios[edge + 1]
        assert ratios[-edge - 2] <= high[row] <= ratios[-edge]


@given(times, times)
def test_swapping_the_sides_inverts_the_interval_and_keeps_p(old: list[float], new: list[float]) -> None:
    one, other = np.array([old]), np.array([new])
    (low, high), (back, forth) = ratio_interval(one, other), ratio_interval(other, one)
    assert (low[0], high[0]) == pytest.approx((1 / forth[0], 1 / back[0]))
    assert low[0] <= np.median(new) / np.median(old) <= high[0]
    assert rank_sum_p(one, other)[0] == pytest.approx(rank_sum_p(other, one)[0])


@pytest.mark.parametrize(("m", "n"), [(4, 4), (5, 5), (5, 4), (7, 12), (30, 3), (31, 31)])
def test_p_is_scipys(m: int, n: int) -> None:
    rng = np.random.default_rng(1)
    old, new = rng.random((200, m)), rng.random((200, n))
    expected = mannwhitneyu(old, new, axis=1, method="exact" if max(m, n) <= 30 else "asymptotic").pvalue
    assert rank_sum_p(old, new) == pytest.approx(expected)


def test_ties_err_to_the_safe_side() -> None:
    assert rank_sum_p(np.array([[1.0] * 5]), np.array([[1.0] * 5]))[0] == 1
    assert rank_sum_p(np.array([[1.0, 1, 1, 1, 2]]), np.array([[2.0, 3, 3, 3, 3]]))[0] > smallest_p(5, 5)


@pytest.mark.parametrize(("m", "n", "least", "level"), [(3, 3, 0.1, 0.0), (4, 4, 0.0286, 0.0286), (5, 5, 0.0079, 0.0317), (31, 31, 0.0, 0.05)])
def test_what_the_test_can_reach(m: int, n: int, least: float, level: float) -> None:
    assert smallest_p(m, n) == pytest.approx(least, abs=5e-5)
    assert reachable_level(m, n) == pytest.approx(level, abs=5e-5)


def test_five_rounds_cannot_be_called_in_a_table_of_seven() -> None:
    assert adjusted(np.array([smallest_p(5, 5)] + [0.9] * 5))[0] < 0.05 < adjusted(np.array([smallest_p(5, 5)] + [0.9] * 6))[0]
    assert adjusted(np.array([])).size == 0


def test_the_median_of_one_side_and_the_mean_of_ratios() -> None:
    low, high = median_range(np.array([[1.0, 2, 3, 4, 5]]))
    assert (low[0], high[0]) == (1, 5)  # each end has 5.8% of the resamples
    assert geometric_mean(np.array([0.5, 2.0, 1.0])) == pytest.approx(1.0)


def test_many_rows_are_computed_in_blocks() -> None:
    rng = np.random.default_rng(2)
    old, new = rng.uniform(1, 2, (40, 24)), rng.uniform(1, 2, (40, 24))  # 300 x 300 values a row
    low, high = ratio_interval(old, new)
    alone = ratio_interval(old[39:], new[39:])
    assert (low[39], high[39]) == (alone[0][0], alone[1][0])
