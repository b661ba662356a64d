"""What two sets of rounds say about a ratio: its interval, a test, and what a whole table of tests is worth. Arrays in, arrays out.

The unit of evidence is the round: passes of one process are not independent, and 20 of them against 20 call identical runs different four
times out of five. Assumes that rounds are independent and nothing about their distribution. What is called faster is decided in
comparison.py; intervals within one run are in stats.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
SIDE = 0.05  # of the bootstrap distribution that is left out on each side of an interval
ALPHA = 0.05
EXACT_ROUNDS = 30  # beyond, the rank test takes the normal approximation, which is as good there
MAX_BLOCK = 2_000_000  # numbers that are held at a time


def medians(samples: Sequence[Sequence[float]]) -> Floats:
    """The median of each of them, [samples]; none is empty. Those of one length are computed together."""
    lengths, found = np.array([len(one) for one in samples]), np.empty(len(samples))
    for length in np.unique(lengths):
        where = np.flatnonzero(lengths == length)
        found[where] = np.median(np.array([samples[index] for index in where.tolist()]), axis=1)
    return found


def ratio_interval(old: Floats, new: Floats, side: float = SIDE) -> tuple[Floats, Floats]:
    """Interval of median(new) / median(old) of every row. Inputs are positive, [rows, rounds of that side]; returns (low, high), [rows] each.

    The bootstrap distribution is computed, not drawn: a resample acts through its median alone, of which n rounds have n values where n is
    odd and n (n + 1) / 2 where it is even, each with a known weight. The ends leave out at most `side` of it each (percentile method,
    Efron and Tibshirani, An Introduction to the Bootstrap, 13.3). Swapping the sides inverts the interval.
    """
    below, above = _medians(old), _medians(new)
    weights = np.outer(above.weights, below.weights).ravel()
    low, high = np.empty(len(old)), np.empty(len(old))
    step = max(1, MAX_BLOCK // weights.size)
    for start in range(0, len(old), step):
        rows = slice(start, start + step)
        ratios = (above.values[rows, :, None] / below.values[rows, None, :]).reshape(-1, weights.size)
        low[rows], high[rows] = _tails(ratios, weights, side)
    return low, high


def median_range(samples: Floats, side: float = SIDE) -> tuple[Floats, Floats]:
    """The same interval of the median of one set of every row, [rows, rounds]."""
    found = _medians(samples)
    return _tails(found.values, found.weights, side)


def rank_sum_p(old: Floats, new: Floats) -> Floats:
    """Two-sided p of Mann and Whitney's test of every row, [rows, rounds of that side] -> [rows]. Exact; with ties it errs to the safe side."""
    m, n = old.shape[1], new.shape[1]
    if max(m, n) > EXACT_ROUNDS:
        from scipy.stats import mannwhitneyu

        return np.asarray(mannwhitneyu(old, new, axis=1, method="asymptotic").pvalue, dtype=np.float64)
    larger = new[:, :, None] > old[:, None, :]
    equal = new[:, :, None] == old[:, None, :]
    wins = larger.sum(axis=(1, 2)) + equal.sum(axis=(1, 2)) / 2
    fewest = np.ceil(np.minimum(wins, m * n - wins)).astype(np.int64)
    return np.asarray(np.minimum(1.0, 2 * _cumulative(m, n)[fewest]))


def smallest_p(old: int, new: int) -> float:
    """What the exact test can reach with so many rounds: 0.0079 with 5 and 5."""
    return 2 / math.comb(old + new, old)


@lru_cache(maxsize=256)
def reachable_level(old: int, new: int) -> float:
    """The largest p below ALPHA that the exact test with so many rounds can give: the part of identical pairs that it calls different."""
    if max(old, new) > EXACT_ROUNDS:
        return ALPHA
    levels = 2 * _cumulative(old, new)
    return float(levels[levels < ALPHA].max(initial=0.0))


@lru_cache(maxsize=256)
def _cumulative(m: int, n: int) -> Floats:
    """P(U <= u) for u in 0..mn where nothing differs: the orders of both sides by U are the coefficients of the Gaussian binomial (m + n over m).

    Done here because scipy.stats takes as long to import as thousands of cells to compare; the tests hold it against scipy.
    """
    counts = [1] + [0] * (m * n)
    for factor in range(1, m + 1):
        for value in range(m * n, n + factor - 1, -1):
            counts[value] -= counts[value - n - factor]
        for value in range(factor, m * n + 1):
            counts[value] += counts[value - factor]
    return np.cumsum([count / math.comb(m + n, m) for count in counts])


def adjusted(p: Floats) -> Floats:
    """p for a table, so that at most that part of what is called different is not: Benjamini and Hochberg (1995)."""
    from scipy.stats import false_discovery_control

    return np.asarray(false_discovery_control(p), dtype=np.float64) if p.size else p


def geometric_mean(ratios: Floats) -> float:
    """Of at least one positive ratio."""
    return float(np.exp(np.mean(np.log(ratios))))


@dataclass(frozen=True)
class _Medians:
    """The medians that resamples of every row can have, [rows, values], and their weights, [values]."""

    values: Floats
    weights: Floats


def _medians(samples: Floats) -> _Medians:
    lower, upper, weights = median_weights(samples.shape[1])
    ordered = np.sort(samples, axis=1)
    return _Medians((ordered[:, lower] + ordered[:, upper]) / 2, weights)


@lru_cache(maxsize=256)
def median_weights(n: int) -> tuple[Ints, Ints, Floats]:
    """Of n ordered samples the pairs (i, j) whose mean a resample's median can be, and the part of the n^n resamples for which it is.

    An order statistic of a resample is at most the i-th sample where enough draws are, which is binomial. For even n the two in the middle
    are i < j where half of the draws are at most i, with i among them, and half at least j, with j among them.
    """
    half, ends = n // 2, np.arange(n + 1) / n
    if n % 2:
        index = np.arange(n)
        return index, index, np.diff(_at_least(half + 1, n, ends))
    lower, upper = np.triu_indices(n)
    at_most, at_least = np.diff(ends**half), np.diff(ends**half)[::-1]
    joint = np.triu(math.comb(n, half) * np.outer(at_most, at_least), 1)
    joint[np.diag_indices(n)] = np.diff(_at_least(half, n, ends)) - joint.sum(axis=1)
    return lower, upper, joint[lower, upper]


def _at_least(count: int, n: int, chance: Floats) -> Floats:
    """P(Bin(n, chance) >= count)."""
    total = np.zeros_like(chance)
    for k in range(count, n + 1):
        total += math.comb(n, k) * chance**k * (1 - chance) ** (n - k)
    return total


def _tails(values: Floats, weights: Floats, side: float) -> tuple[Floats, Floats]:
    """The smallest value with more than `side` of the weight up to it, and the largest with more than `side` from it on; [rows] each."""
    order = np.argsort(values, axis=1)
    ordered, mass = np.take_along_axis(values, order, axis=1), np.cumsum(weights[order], axis=1)
    rounding = 1e-12
    rows = np.arange(len(values))
    first = np.argmax(mass > side + rounding, axis=1)
    last = np.argmax(mass >= mass[:, -1:] - side - rounding, axis=1)
    return ordered[rows, first], ordered[rows, last]
