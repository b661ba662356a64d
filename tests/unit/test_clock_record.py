"""Readings made by hand: what is stored of them, and which of them are a warning."""

from __future__ import annotations

from typing import Any

import pytest

from cpbench.clock_record import ClockRound, Clocks, CpuClocks, CpuReading, GpuClocks, GpuReading, Spread, clock_warnings, cpu_clocks, gpu_clocks


def cpu(**changes: Any) -> CpuClocks:
    return CpuClocks(**{"cores": 4, "usable_cores": 4, "own_cores": 2.0, "others_cores": 0.0, "samples": 9, **changes})


def warnings(*, seconds: float = 10.0, cpus: tuple[CpuClocks, ...] = (), gpus: tuple[GpuClocks, ...] = ()) -> list[str]:
    """Of one round for each of `cpus`, or of one with these GPUs."""
    rounds = [ClockRound(seconds=seconds, cpu=one) for one in cpus] + ([ClockRound(seconds=seconds, gpus=list(gpus))] if gpus else [])
    return clock_warnings(Clocks(rounds=rounds))


def spread(low: float, middle: float, high: float) -> Spread:
    return Spread(min=low, median=middle, max=high)


def test_what_others_use_is_the_load_of_the_cores_without_ours() -> None:
    readings = [
        CpuReading(10.0, (100.0, 50.0), (1.0, 2.0), 70.0),
        CpuReading(12.0, (101.9, 51.1), (1.0, 2.2), 72.0),
        CpuReading(14.0, (103.8, 52.6), (1.0, 2.4), 74.4),
    ]
    found = cpu_clocks(readings, 2)
    assert found is not None
    assert (found.own_cores, found.others_cores, found.stolen_cores) == pytest.approx((1.1, 0.5, 0.1))
    assert (found.cores, found.usable_cores, found.samples, found.mhz) == (2, 2, 3, None)


def test_our_own_processes_are_never_a_negative_load_of_others() -> None:
    found = cpu_clocks([CpuReading(0.0, (0.0,), (0.0,), 0.0), CpuReading(1.0, (0.97,), (0.0,), 1.0)], 1)
    assert found is not None and found.others_cores == 0.0


def test_a_window_without_two_readings_says_nothing() -> None:
    reading = CpuReading(1.0, (1.0,), (0.0,), 0.0)
    assert cpu_clocks([reading], 1) is None and cpu_clocks([reading, reading], 1) is None


def test_the_clock_is_that_of_the_cores_that_work() -> None:
    readings = [CpuReading(float(second), (second * 0.9, 0.0), (0.0, 0.0), 0.0, (3000.0 + 100 * second, 800.0)) for second in range(4)]
    found = cpu_clocks(readings, 2)
    assert found is not None and found.mhz == spread(3100.0, 3200.0, 3300.0)
    idle = cpu_clocks([CpuReading(float(second), (0.1 * second,), (0.0,), 0.0, (800.0,)) for second in range(3)], 1)
    assert idle is not None and idle.mhz is None


def test_gpus_stand_in_the_order_of_ranks_with_reasons_by_name() -> None:
    first, second = gpu_clocks(
        [[GpuReading(1980, 400.5, 40, 0x1), GpuReading(1900, None, None)], [GpuReading(1800, 690.5, 60, 0x24), GpuReading(None, None, None)]]
    )
    assert (first.rank, first.sm_mhz, first.power_w, first.temperature_c) == (0, spread(1800, 1890, 1980), spread(400.5, 545.5, 690.5), spread(40, 50, 60))
    assert first.throttled == {"power cap": 0.5, "temperature (software)": 0.5} and first.samples == 2
    assert (second.sm_mhz, second.power_w, second.throttled) == (spread(1900, 1900, 1900), None, {})
    assert gpu_clocks([]) == []


def test_idle_and_clocks_that_somebody_set_are_no_throttling() -> None:
    assert gpu_clocks([[GpuReading(1980, 100, 30, 0x1 | 0x2 | 0x100)]])[0].throttled == {}


@pytest.mark.parametrize(("low", "high", "texts"), [(2990, 3060, []), (2990, 3090, ["CPU clock moved by 3% (2,990 to 3,090 MHz)"])])
def test_a_clock_that_moved_more_than_three_percent(low: float, high: float, texts: list[str]) -> None:
    assert warnings(cpus=(cpu(mhz=spread(low, 3000, high)),)) == texts


def test_a_clock_that_moved_between_rounds_counts_too() -> None:
    rounds = cpu(mhz=spread(3000, 3000, 3000)), cpu(mhz=spread(2500, 2500, 2500))
    assert warnings(cpus=rounds) == ["CPU clock moved by 18% (2,500 to 3,000 MHz)"]


def test_of_several_gpus_the_worst_is_named() -> None:
    gpus = tuple(GpuClocks(rank=rank, sm_mhz=spread(low, 1950, 1980), samples=200) for rank, low in enumerate((1800, 1580, 1975)))
    assert warnings(gpus=gpus) == ["SM clock of rank 1's GPU moved by 21% (1,580 to 1,980 MHz)"]


def test_throttling_is_told_with_its_reason_and_share() -> None:
    gpus = GpuClocks(rank=0, throttled={"power cap": 0.34, "power brake": 0.01}, samples=200), GpuClocks(rank=1, throttled={"power cap": 0.5}, samples=200)
    assert warnings(gpus=gpus) == ["GPU clocks were held down: power cap in 50% of the samples"]


@pytest.mark.parametrize(
    ("changes", "texts"),
    [
        ({"others_cores": 0.19}, []),
        ({"others_cores": 0.72}, ["other processes used 0.7 of 4 cores"]),
        ({"stolen_cores": 0.3}, ["the hypervisor withheld 0.3 of 4 cores"]),
        ({"others_cores": 0.15, "stolen_cores": 0.15}, ["other processes used 0.1 and the hypervisor withheld 0.1 of 4 cores"]),
        ({"others_cores": 1.9, "usable_cores": 2}, []),  # the quota leaves two cores to others
        ({"others_cores": 2.9, "usable_cores": 2}, ["other processes used 2.9 of 4 cores"]),
    ],
)
def test_cores_that_others_used(changes: dict[str, Any], texts: list[str]) -> None:
    assert warnings(cpus=(cpu(**changes),)) == texts


def test_the_worst_round_is_told_and_a_short_window_proves_nothing() -> None:
    assert warnings(cpus=(cpu(others_cores=0.4), cpu(others_cores=1.2))) == ["other processes used 1.2 of 4 cores"]
    assert warnings(seconds=0.5, cpus=(cpu(others_cores=4.0, mhz=spread(800, 3000, 3000)),)) == []
