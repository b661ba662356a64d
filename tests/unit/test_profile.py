"""Traced steps of two ranks as a profile."""

from __future__ import annotations

import pytest

from cpbench.tracing.profile import TOP_KERNELS, profile_of

from .traces import CLOCK, STEP, kernel, rank, span, steps, trace


def test_a_profile_holds_means_of_the_steps_by_phase_and_rank() -> None:
    profile = profile_of(steps(rank(), rank(attention=40)), CLOCK, {1: {"layer/attention": 77}})
    assert (profile.tool, profile.steps) == ("torch", 2)
    assert [one.step_s for one in profile.ranks] == pytest.approx([101e-6, 103e-6])
    assert [(phase.rank, phase.phase, phase.peak_bytes) for phase in profile.phases] == [
        (0, "layer/attention", None),
        (0, STEP, None),
        (1, "layer/attention", 77),
        (1, STEP, None),
    ]
    attention = profile.phases[2]
    assert (attention.time_s, attention.compute_s, attention.exposed_comm_s, attention.idle_s) == pytest.approx((60e-6, 40e-6, 20e-6, 0))
    assert (attention.overlap, profile.phases[3].overlap) == (0, None)
    for one in profile.ranks:
        mine = [phase for phase in profile.phases if phase.rank == one.rank]
        assert sum(phase.time_s for phase in mine) == pytest.approx(100e-6)
        assert one.compute_s + one.exposed_comm_s + one.idle_s == pytest.approx(100e-6)


def test_a_kernel_is_listed_once_for_the_rank_where_it_took_longest() -> None:
    first, second = trace(span(STEP, 0, 50), kernel("gemm", 1, 0, 20)), trace(span(STEP, 0, 50), kernel("gemm", 1, 0, 10), kernel("gemm", 2, 10, 30))
    (top,) = profile_of(steps(first, second), [[50e-6, 50e-6]]).kernels
    assert (top.name, top.rank, top.calls) == ("gemm", 1, 2)
    assert (top.seconds, top.share) == pytest.approx((30e-6, 0.6))
    many = trace(span(STEP, 0, 1000), *(kernel(f"k{i}", i, 20 * i, 20 * i + i + 1) for i in range(30)))
    assert [one.name for one in profile_of(steps(many), [[1e-3]]).kernels] == [f"k{29 - i}" for i in range(TOP_KERNELS)]
