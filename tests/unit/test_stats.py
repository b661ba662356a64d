"""Medians and their intervals: coverage is computed exactly, not believed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpbench.stats import median, median_interval, outliers, relative_half_width


def coverage(n: int, k: int) -> float:
    """Probability that the k-th smallest and k-th largest of n samples enclose the median."""
    return 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n


@pytest.mark.parametrize("n", range(6, 80))
def test_interval_is_the_narrowest_pair_of_order_statistics_that_covers_95_percent(n: int) -> None:
    interval = median_interval([float(i) for i in range(1, n + 1)])
    assert interval is not None
    k = int(interval[0])
    assert interval == (k, n + 1 - k)
    assert coverage(n, k) >= 0.95
    assert coverage(n, k + 1) < 0.95 or n + 1 - (k + 1) < k + 1


def test_interval_of_few_samples() -> None:
    assert median_interval([1.0, 2.0, 3.0, 4.0]) is None
    assert median_interval([5.0, 1.0, 3.0, 2.0, 4.0]) == (1.0, 5.0)


@given(st.lists(st.floats(0.001, 1e3), min_size=5, max_size=60))
def test_interval_holds_the_median_and_ignores_order(samples: list[float]) -> None:
    interval = median_interval(samples)
    assert interval is not None
    assert interval[0] <= median(samples) <= interval[1]
    assert median_interval(samples[::-1]) == interval
    assert min(samples) <= interval[0] and interval[1] <= max(samples)


def test_half_width_is_relative_to_the_median() -> None:
    assert relative_half_width([9.0, 10.0, 10.0, 10.0, 11.0]) == pytest.approx(0.1)
    assert relative_half_width([1.0] * 4) is None
    assert relative_half_width([]) is None


def test_outliers_are_found_and_equal_samples_have_none() -> None:
    assert outliers([1.00, 1.01, 0.99, 1.02, 5.0, 0.98]) == [4]
    assert outliers([1.0] * 9 + [2.0]) == []  # no spread to measure by
    assert outliers([1.0, 9.0, 1.0]) == []
