"""Curves through measured times: two lines for collectives, rates for products and copies, and the cost of attention by its shape.

Least squares are relative, since a time of a microsecond must be as right as one of a second, and no coefficient is negative, since no part
of a time is. What is measured is decided in calibration_rank.py. Each fit says how far its points are from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import exp, log, sqrt
from typing import Any

from cpbench.projection.links import Lines, whole_buffer
from cpbench.projection.profile import side

FEWEST = 3  # points of a line
LEAST_SLOPE = 1e-15  # seconds per byte: where noise hides all of it
TILES = (0, 32, 64, 128, 256, 512, 1024)
SHAPES_OF_A_SIDE = 4
Row = Mapping[str, Any]


@dataclass(frozen=True)
class AttentionFit:
    """FLOP/s, and what `profile.Attention` has beside them."""

    flops: float
    half_keys: float
    tile_keys: float
    score_operations: float
    mean_error: float
    worst_error: float


def errors(found: Sequence[float], measured: Sequence[float]) -> tuple[float, float]:
    """The mean and the worst distance of some times from those that were measured, as parts of these."""
    apart = [abs(one / other - 1) for one, other in zip(found, measured, strict=True)]
    return sum(apart) / len(apart), max(apart)


def two_lines(operation: str, ranks: int, points: Sequence[tuple[float, float]]) -> Lines:
    """The best two lines through (bytes received, seconds), in ascending order, over all ways to cut them; one, twice, through fewer than six."""
    best: tuple[float, Lines] | None = None
    cuts = range(FEWEST, len(points) - FEWEST + 1) if len(points) >= 2 * FEWEST else [0]
    for at in cuts:
        small, large = _line(points[:at] or points), _line(points[at:])
        border = sqrt(points[at - 1][0] * points[at][0]) if at else 0.0
        cut = whole_buffer(operation, ranks, border)
        made = Lines(small_s=small[0], small_bytes_per_s=small[1], cut_bytes=cut, large_s=large[0], large_bytes_per_s=large[1], mean_error=0.0, worst_error=0.0)
        mean, worst = errors([made.seconds(whole_buffer(operation, ranks, travels), travels) for travels, _ in points], [s for _, s in points])
        if best is None or mean < best[0]:
            best = mean, made.model_copy(update={"mean_error": mean, "worst_error": worst})
    assert best is not None, "there is one way to cut at least"
    return best[1]


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(seconds of no byte, bytes per second)."""
    first, slope = _relative([[1.0, travels] for travels, _ in points], [seconds for _, seconds in points])[0]
    return first, 1 / max(slope, LEAST_SLOPE)


def _relative(columns: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[list[float], float]:
    """Coefficients, none negative, of the columns whose sum is nearest to the times as parts of these; and how near."""
    import numpy as np
    from scipy.optimize import nnls

    matrix = np.array(columns, dtype=float) / np.array(seconds, dtype=float)[:, None]
    scale = np.maximum(matrix.max(axis=0), 1e-300)
    found, left = nnls(matrix / scale, np.ones(len(seconds)))
    return [float(value) for value in found / scale], float(left)


def rates(rows: Sequence[Row], launch: float) -> tuple[tuple[float, float], ...]:
    """Bytes per second of a kernel without its launch, over its bytes."""
    return tuple((row["bytes"], row["bytes"] / max(row["seconds"] - launch, row["seconds"] / 10)) for row in rows)


def gemm_rates(rows: Sequence[Row], launch: float) -> tuple[tuple[float, float], ...]:
    """FLOP/s over the harmonic mean of the sides: the geometric mean of shapes of about the same one, since no two shapes are alike."""
    known = sorted((side(row["m"], row["n"], row["k"]), flops_of(row) / max(row["seconds"] - launch, row["seconds"] / 10)) for row in rows)
    points = []
    for _, together in groupby(enumerate(known), lambda pair: pair[0] // SHAPES_OF_A_SIDE):
        group = [point for _, point in together]
        points.append(tuple(exp(sum(log(point[at]) for point in group) / len(group)) for at in (0, 1)))
    return tuple((size, rate) for size, rate in points)


def flops_of(row: Row) -> float:
    """Operations of a product."""
    return 2.0 * float(row["m"] * row["n"] * row["k"])


def pairs_of(row: Row) -> int:
    """Scores of each head."""
    rows, keys = int(row["q_rows"]), int(row["k_rows"])
    return rows * (rows + 1) // 2 if row["causal"] else rows * keys


def attention_fit(rows: Sequence[Row], launch: float) -> AttentionFit:
    """The cost that is nearest to measured squares and rectangles; what scores cost is told from products only by several head sizes."""
    seconds = [max(row["seconds"] - launch, row["seconds"] / 10) for row in rows]
    terms = [(0, 1, 2)] if len({row["dim"] for row in rows}) > 1 else []
    for kept in (*terms, (0, 2), (0,)):  # fewer where noise takes all time from the products
        fits = [(*_attention_terms(rows, seconds, tile, kept), tile) for tile in TILES]
        _, (product, score, row_cost), found, tile = min(fits)
        if product:
            break
    mean, worst = errors(found, seconds)
    return AttentionFit(1 / product, row_cost / product, tile, score / product, mean, worst)


def _attention_terms(rows: Sequence[Row], seconds: Sequence[float], tile: int, kept: Sequence[int]) -> tuple[float, list[float], list[float]]:
    """How far from the times, seconds of (an operation, a score, a value of a row), and the times that they make. Terms not kept are zero."""
    columns = []
    for row in rows:
        computed = pairs_of(row) + min(row["q_rows"] * tile // 2, row["q_rows"] * row["k_rows"] - pairs_of(row))
        terms = (4.0 * row["dim"] * row["heads"] * computed, float(row["heads"] * computed), 2.0 * row["dim"] * row["heads"] * row["q_rows"])
        columns.append([terms[at] for at in kept])
    found, left = _relative(columns, seconds)
    coefficients = [dict(zip(kept, found, strict=True)).get(at, 0.0) for at in range(3)]
    return left, coefficients, [sum(a * b for a, b in zip(found, line, strict=True)) for line in columns]
