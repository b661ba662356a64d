"""Medians and what may be said about them: the statistics that the timing loop, the tables and the warnings share.

Assumes nothing about the distribution of the samples except that they are independent. Within one process they are not quite: the
interval describes this run, not the next one, which is why rounds exist. Comparing two runs is not done here. Imports nothing heavy,
because the workers use it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

MIN_INTERVAL_SAMPLES = 5
OUTLIER_SCORE = 3.5  # Iglewicz and Hoaglin (1993)


def median(samples: Sequence[float]) -> float:
    """The median of at least one sample."""
    return float(statistics.median(samples))


def median_interval(samples: Sequence[float], confidence: float = 0.95) -> tuple[float, float] | None:
    """Distribution-free interval of the median by order statistics; None under 5 samples.

    The k-th smallest and k-th largest sample enclose the median with probability 1 - 2 P(Bin(n, 1/2) < k) (David and Nagaraja,
    Order Statistics, 7.1); k is the largest that reaches `confidence`. With 5 samples even the full range reaches 93.75% only: it
    is what is returned.
    """
    n = len(samples)
    if n < MIN_INTERVAL_SAMPLES:
        return None
    tail, k = 0.0, 0
    while k < n // 2:
        tail += math.exp(math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2))
        if 2 * tail > 1 - confidence:
            break
        k += 1
    ordered = sorted(samples)
    k = max(k, 1)
    return float(ordered[k - 1]), float(ordered[n - k])


def relative_half_width(samples: Sequence[float]) -> float | None:
    """Half the interval of the median over the median: what `precision` is held against. None where there is no interval."""
    interval = median_interval(samples)
    middle = median(samples) if samples else 0.0
    return None if interval is None or middle <= 0 else (interval[1] - interval[0]) / (2 * middle)


def outliers(samples: Sequence[float]) -> list[int]:
    """Indices of samples that lie far from the others (modified z-score above 3.5). They are flagged, never dropped."""
    if len(samples) < MIN_INTERVAL_SAMPLES:
        return []
    middle = median(samples)
    spread = median([abs(sample - middle) for sample in samples])
    return [index for index, sample in enumerate(samples) if spread > 0 and 0.6745 * abs(sample - middle) > OUTLIER_SCORE * spread]
