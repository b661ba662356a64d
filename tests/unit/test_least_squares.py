"""Fits find the constants that made the times, and say how far noise put the times from them."""

import random

import pytest

from cpbench.projection.least_squares import attention_fit, errors, gemm_rates, pairs_of, rates, two_lines
from cpbench.projection.links import whole_buffer
from cpbench.projection.profile import side

SIZES = [4096 << power for power in range(14)]
LAUNCH = 2e-6


def made(operation, ranks, small, large, cut):
    points = []
    for travels in SIZES:
        first, rate = small if whole_buffer(operation, ranks, travels) < cut else large
        points.append((travels, first + travels / rate))
    return points


@pytest.mark.parametrize(("operation", "ranks"), [("all_gather", 2), ("all_reduce", 4), ("send_recv", 2)])
def test_two_lines_are_found_again(operation, ranks):
    found = two_lines(operation, ranks, made(operation, ranks, (10e-6, 1e9), (900e-6, 3e9), 1 << 20))
    assert (found.small_s, found.small_bytes_per_s) == pytest.approx((10e-6, 1e9))
    assert (found.large_s, found.large_bytes_per_s) == pytest.approx((900e-6, 3e9))
    assert found.cut_bytes == pytest.approx(1 << 20, rel=0.6)
    assert found.worst_error < 1e-6


def test_noise_is_in_the_error_and_not_in_the_lines():
    rng = random.Random(5)
    points = [(travels, seconds * rng.uniform(0.9, 1.1)) for travels, seconds in made("all_gather", 2, (50e-6, 2e9), (50e-6, 2e9), 1 << 20)]
    found = two_lines("all_gather", 2, points)
    assert found.large_bytes_per_s == pytest.approx(2e9, rel=0.15)
    assert 0 < found.mean_error < 0.1 <= found.worst_error + 0.05


def test_few_points_make_one_line():
    found = two_lines("send_recv", 2, [(1000, 2e-3), (2000, 3e-3), (4000, 5e-3)])
    assert found.cut_bytes == 0
    assert found.seconds(8000, 8000) == pytest.approx(9e-3)


def test_times_that_do_not_grow_have_no_negative_slope():
    found = two_lines("send_recv", 2, [(travels, 1e-3 / (1 + travels / 1e6)) for travels in SIZES])
    assert found.seconds(1 << 30, 1 << 30) >= found.seconds(1 << 20, 1 << 20) > 0


def attention_rows(flops, half, tile, score):
    rows = []
    for dim in (32, 128):
        for q_rows, k_rows, causal in [(n, m, c) for n in (128, 512, 2048) for m, c in ((n, True), (n, False), (3 * n, False))]:
            row = {"q_rows": q_rows, "k_rows": k_rows, "causal": causal, "heads": 4, "dim": dim}
            computed = pairs_of(row) + min(q_rows * tile // 2, q_rows * k_rows - pairs_of(row))
            operations = 4 * (4 * dim * computed + score * computed + 2 * dim * q_rows * half)
            rows.append(row | {"seconds": operations / flops + LAUNCH})
    return rows


@pytest.mark.parametrize("tile", [0, 256])
def test_the_cost_of_attention_is_found_again(tile):
    found = attention_fit(attention_rows(5e10, 40.0, tile, 60.0), LAUNCH)
    assert (found.flops, found.half_keys, found.tile_keys, found.score_operations) == pytest.approx((5e10, 40.0, tile, 60.0), rel=1e-3)
    assert found.worst_error < 1e-3


def test_one_head_size_cannot_tell_scores_from_products():
    rows = [row for row in attention_rows(5e10, 0.0, 0, 0.0) if row["dim"] == 32]
    found = attention_fit(rows, LAUNCH)
    assert (found.flops, found.score_operations) == (pytest.approx(5e10, rel=1e-3), 0.0)


def test_times_that_are_all_noise_still_have_a_rate():
    rows = [{"q_rows": 64 * n, "k_rows": 64, "causal": False, "heads": 1, "dim": dim, "seconds": 1.0 / dim / n} for n in (1, 2) for dim in (32, 64, 4096)]
    found = attention_fit(rows, 0.0)
    assert found.flops > 0
    assert found.worst_error > 0.5


def test_rates_are_without_the_launch_and_shapes_of_a_side_share_a_point():
    rows = [{"m": m, "n": 64, "k": 64, "seconds": 2 * m * 64 * 64 / 1e10 + LAUNCH} for m in (60, 64, 66, 70)]
    rows += [{"m": m, "n": 512, "k": 512, "seconds": 2 * m * 512 * 512 / 4e10 + LAUNCH} for m in (500, 512, 530, 600)]
    (small, low), (large, high) = gemm_rates(rows, LAUNCH)
    assert (low, high) == pytest.approx((1e10, 4e10))
    assert side(60, 64, 64) < small < side(70, 64, 64) < side(500, 512, 512) < large
    assert rates([{"bytes": 1000, "seconds": 1e-6 + LAUNCH}], LAUNCH) == ((1000, pytest.approx(1e9)),)


def test_errors_are_parts_of_what_was_measured():
    assert errors([1.1, 3.0], [1.0, 4.0]) == pytest.approx((0.175, 0.25))
