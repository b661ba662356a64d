"""When a difference counts: from two quantities to a ratio with its evidence, and from that to a verdict.

With MIN_ROUNDS rounds on both sides the round medians are the evidence: the interval of the ratio must leave the noise band, and the rank
test must agree. With fewer, the samples of a run say how this run scattered and nothing of the next one: the band is at least
WITHIN_RUN_BAND. Exact quantities are compared as they are. Which quantities meet is decided in matching.py and quantities.py.

On 5 rounds that scatter by 1% the interval encloses the ratio 19 times out of 20 although 10% of the bootstrap distribution lie outside of
it: medians of 5 have few values. A change is called where 5% at most lie on the wrong side of the band, and two quantities are the same
where both ends are inside: two one-sided tests at 5% (Schuirmann 1987). benchmarks/verdicts.py prints what this finds and what it invents.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from cpbench.ab import block_ratios
from cpbench.clock_record import CLOCK_MOVED
from cpbench.quantities import EXACT_MEMORY, Quantity
from cpbench.records import time_of
from cpbench.results import ComparedCell
from cpbench.stats import median

if TYPE_CHECKING:
    from cpbench.evidence import Floats

Basis = Literal["rounds", "run", "exact", "alternated"]
Verdict = Literal["same", "faster", "slower", "better", "worse", "changed", "unsure", "broke", "fixed", "new", "gone", "n/a"]
Direction = Literal["same", "up", "down", "unsure"]
NOISE = 0.02
MIN_ROUNDS = 4
WITHIN_RUN_BAND = 0.05
ALPHA = 0.05
POSSIBLE = (1e-30, 1e30)  # what lies outside was not measured, and its ratio may not be a number
MEMORY_STEP = 1 << 20  # bytes: below, an allocator's rounding


class Evidence(NamedTuple):
    """What two quantities say. `old` and `new` are the values compared, `halves` half their intervals over them; ratio = new / old."""

    basis: Basis
    old: float
    new: float
    ratio: float | None
    interval: tuple[float, float] | None = None
    halves: tuple[float | None, float | None] = (None, None)
    p: float | None = None
    counts: tuple[int, int] = (1, 1)  # rounds or samples


def weigh(pairs: Sequence[tuple[Quantity, Quantity]]) -> list[Evidence]:
    """The evidence of every pair, in order. Pairs with as many rounds are computed together."""
    found: list[Evidence | None] = [None] * len(pairs)
    together: dict[tuple[int, int], list[int]] = {}
    for index, (old, new) in enumerate(pairs):
        if not old.exact and min(len(old.rounds), len(new.rounds)) >= MIN_ROUNDS:
            together.setdefault((len(old.rounds), len(new.rounds)), []).append(index)
    for counts, indices in together.items():
        for index, one in zip(indices, _by_rounds([pairs[index] for index in indices], counts), strict=True):
            found[index] = one
    return [one or (_exact(*pair) if pair[0].exact else _within(*pair)) for one, pair in zip(found, pairs, strict=True)]


def direction(ratio: float, interval: tuple[float, float] | None, p: float | None, band: float) -> Direction:
    """Where the ratio lies against 1 and a band around it, which is as wide in both directions: 1 / (1 + band) to 1 + band."""
    limit = 1 + band
    low, high = interval or (ratio, ratio)
    if p is None or p < ALPHA:
        if low > limit:
            return "up"
        if high < 1 / limit:
            return "down"
    return "same" if low >= 1 / limit and high <= limit else "unsure"


def verdict(quantity: Quantity, evidence: Evidence, noise: float) -> Verdict:
    """What the evidence is called, for a quantity that is better high or low."""
    if evidence.basis == "exact":
        step = MEMORY_STEP if quantity.name in EXACT_MEMORY else 0
        difference = evidence.new - evidence.old
        found: Direction = "same" if abs(difference) <= step else "up" if difference > 0 else "down"
    elif evidence.ratio is None:
        return "same" if evidence.old == evidence.new else "n/a"
    else:
        band = noise if evidence.basis == "rounds" or enough(evidence) else max(noise, WITHIN_RUN_BAND)
        found = direction(evidence.ratio, evidence.interval, evidence.p, band)
    if found in ("same", "unsure"):
        return found
    if quantity.better == "none":
        return "changed"
    good = (found == "up") == (quantity.better == "higher")
    return ("faster" if good else "slower") if quantity.is_speed else ("better" if good else "worse")


def enough(evidence: Evidence) -> bool:
    """Rounds, and not passes of a run, are the evidence."""
    return evidence.basis in ("rounds", "alternated") and min(evidence.counts) >= MIN_ROUNDS


def sm_clock(cell: ComparedCell) -> float | None:
    """SM clock in MHz of the GPU that was slowest, the median of the rounds; None where it is not known."""
    slowest = [min(clocks) for one in cell.clocks.rounds if (clocks := [gpu.sm_mhz.median for gpu in one.gpus if gpu.sm_mhz])]
    return median(slowest) if slowest else None


def clock_guard(old: ComparedCell, new: ComparedCell, quantity: Quantity, evidence: Evidence) -> str | None:
    """Where the SM clocks of both sides are not alike, that in words and the change in cycles; None where they are."""
    if not (quantity.is_speed and evidence.ratio and old.clocks.rounds and new.clocks.rounds):
        return None
    before, after = sm_clock(old), sm_clock(new)
    if not (before and after) or abs(after / before - 1) <= CLOCK_MOVED:
        return None
    by_cycles = evidence.ratio * (after / before if quantity.unit == "s" else before / after)
    return f"SM clocks differ, {before:,.0f} and {after:,.0f} MHz ({after / before - 1:+.1%}): by cycles the change is {by_cycles - 1:+.1%}"


def alternated(a: ComparedCell, b: ComparedCell) -> Evidence | None:
    """B against A from the blocks A B B A in which their passes alternated; by rounds where there are MIN_ROUNDS. None without blocks."""
    mine, theirs = time_of(a), time_of(b)
    if not (a.ab and b.ab and b.ab.ratio and mine and theirs and a.status == b.status == "ok"):
        return None
    samples = [dict(zip(cell.ab.rounds, time.rounds, strict=False)) for cell, time in ((a, mine), (b, theirs)) if cell.ab]
    blocks = [block_ratios(one, samples[1][number]) for number, one in samples[0].items() if number is not None and number in samples[1]]
    medians = [median(ratios) for ratios in blocks if ratios]
    known = Evidence("alternated", mine.median, theirs.median, b.ab.ratio, b.ab.ratio_ci95, counts=(len(medians), len(medians)))
    if len(medians) < MIN_ROUNDS:
        return known
    import numpy as np

    from cpbench.evidence import median_range

    low, high = median_range(np.array([medians]))
    return known._replace(ratio=median(medians), interval=(float(low[0]), float(high[0])))


def _by_rounds(pairs: Sequence[tuple[Quantity, Quantity]], counts: tuple[int, int]) -> Iterator[Evidence | None]:
    """Of pairs with as many rounds, in order; None where a median has no ratio."""
    import numpy as np

    from cpbench.evidence import median_range, medians, rank_sum_p, ratio_interval

    sides = [medians([one for pair in pairs for one in pair[side].rounds]).reshape(-1, counts[side]) for side in (0, 1)]
    possible = np.logical_and.reduce([((side > POSSIBLE[0]) & (side < POSSIBLE[1])).all(axis=1) for side in sides])
    sides = [side[possible] for side in sides]
    low, high = ratio_interval(sides[0], sides[1])
    p, middles = rank_sum_p(sides[0], sides[1]), [np.median(side, axis=1) for side in sides]
    halves = [_halves(*median_range(side), middle) for side, middle in zip(sides, middles, strict=True)]
    each = zip(*(column.tolist() for column in (*middles, low, high, p, *halves)), strict=True)
    for known in possible.tolist():
        if not known:
            yield None
            continue
        old, new, lowest, highest, chance, half, other = next(each)
        yield Evidence("rounds", old, new, new / old, (lowest, highest), (half, other), chance, counts)


def _halves(low: Floats, high: Floats, middle: Floats) -> Floats:
    return (high - low) / (2 * middle)


def _within(old: Quantity, new: Quantity) -> Evidence:
    """From the medians of all samples, and their intervals where both are known: MOVER on logarithms (Zou and Donner 2008)."""
    ratio = new.median / old.median if old.median > 0 and new.median > 0 else None
    halves = tuple(_half(one) for one in (old, new))
    found = Evidence("run", old.median, new.median, ratio, halves=(halves[0], halves[1]), counts=(old.n, new.n))
    if ratio is None or not POSSIBLE[0] < ratio < POSSIBLE[1]:
        return found._replace(ratio=None)
    if None in halves or old.interval is None or new.interval is None:
        return found
    (below, above), (lower, upper) = (tuple(abs(math.log(end / one.median)) for end in one.interval or ()) for one in (old, new))
    return found._replace(interval=(ratio * math.exp(-math.hypot(lower, above)), ratio * math.exp(math.hypot(upper, below))))


def _half(one: Quantity) -> float | None:
    """None where there is no interval, or a file says something that is none."""
    if one.interval is None or not POSSIBLE[0] < one.interval[0] <= one.median <= one.interval[1] < POSSIBLE[1]:
        return None
    return (one.interval[1] - one.interval[0]) / (2 * one.median)


def _exact(old: Quantity, new: Quantity) -> Evidence:
    ratio = new.median / old.median if old.median > 0 and new.median >= 0 else math.inf
    return Evidence("exact", old.median, new.median, ratio if math.isfinite(ratio) else None)
