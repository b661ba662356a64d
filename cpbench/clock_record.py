"""What clocks and load were while a cell was timed: readings become the numbers that a result stores, and warnings where they moved.

Pure functions over plain data. Where readings come from is clocks.py. A warning states what was seen; whether a time can be compared all
the same is the reader's decision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field

from cpbench.stats import median

CLOCK_MOVED = 0.03  # part of the median clock; from there on times are not those of one machine
CORES_LOST = 0.05  # part of the usable cores
THROTTLED = 0.05  # part of the samples: a single one is a moment, not a state
JUDGED_SECONDS = 1.0  # load is counted in ticks of 10 ms per core and process: a shorter window proves nothing
BUSY = 0.5  # a core counts as busy in an interval from this part of it on; the clock of an idle one says nothing
# NVML's bits; what is not here (idle, clocks that somebody has set, a display) slows nothing that was free to be faster
THROTTLE_REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "temperature (software)",
    0x40: "temperature (hardware)",
    0x80: "power brake",
}
Watched = TypeVar("Watched")


@dataclass(frozen=True)
class CpuReading:
    """Counters of one moment. `busy`, `stolen`: seconds of each core since boot, the stolen ones not among the busy ones; `own`: of our processes."""

    time: float
    busy: tuple[float, ...]
    stolen: tuple[float, ...]
    own: float
    mhz: tuple[float, ...] | None = None


@dataclass(frozen=True)
class GpuReading:
    """One GPU at one moment; None where it does not say."""

    sm_mhz: float | None
    power_w: float | None
    temperature_c: float | None
    reasons: int = 0


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, defer_build=True)


class Spread(_Model):
    """The samples of one quantity."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, samples: Iterable[float | None]) -> Spread | None:
        """Of the samples that are there; None without any."""
        known = [sample for sample in samples if sample is not None]
        return cls(min=min(known), median=median(known), max=max(known)) if known else None


class CpuClocks(_Model):
    """The cores that this process may use. Loads are means over the window, in cores."""

    mhz: Spread | None = Field(None, description="mean clock of the busy cores, as the kernel says; virtual machines report none, or a constant")
    cores: int = Field(description="cores of the affinity mask, whose load was read")
    usable_cores: int = Field(description="of these, as many as the CPU quota allows")
    own_cores: float = Field(description="used by the ranks, their launcher and the driver")
    others_cores: float = Field(description="used by other processes")
    stolen_cores: float = Field(0.0, description="withheld by the hypervisor")
    samples: int


class GpuClocks(_Model):
    """The GPU of one rank, from NVML."""

    rank: int
    sm_mhz: Spread | None = None
    power_w: Spread | None = None
    temperature_c: Spread | None = None
    throttled: dict[str, float] = Field(default_factory=dict, description="reasons for which the clock was held down, each with its part of the samples")
    samples: int


class ClockRound(_Model):
    """One round's timed passes."""

    seconds: float = Field(description="from the first timed pass to the end of the last one")
    cpu: CpuClocks | None = None
    gpus: list[GpuClocks] = Field(default_factory=list)


class Clocks(_Model):
    """One entry for each round that was watched."""

    rounds: list[ClockRound] = Field(default_factory=list)


def cpu_clocks(readings: Sequence[CpuReading], usable_cores: int) -> CpuClocks | None:
    """Loads between the first and the last reading, clocks of all. None with less than two, between which nothing has passed."""
    if len(readings) < 2 or readings[-1].time <= readings[0].time:
        return None
    first, last = readings[0], readings[-1]
    seconds = last.time - first.time
    own = (last.own - first.own) / seconds
    return CpuClocks(
        mhz=Spread.of(_busy_mhz(before, after) for before, after in pairwise(readings)),
        cores=len(last.busy),
        usable_cores=usable_cores,
        own_cores=own,
        others_cores=max(0.0, (sum(last.busy) - sum(first.busy)) / seconds - own),
        stolen_cores=max(0.0, (sum(last.stolen) - sum(first.stolen)) / seconds),
        samples=len(readings),
    )


def _busy_mhz(before: CpuReading, after: CpuReading) -> float | None:
    """The mean clock of the cores that worked between two readings."""
    enough = BUSY * (after.time - before.time)
    clocks = [mhz for mhz, start, end in zip(after.mhz or (), before.busy, after.busy, strict=False) if end - start >= enough]
    return sum(clocks) / len(clocks) if clocks else None


def gpu_clocks(readings: Sequence[Sequence[GpuReading]]) -> list[GpuClocks]:
    """For each GPU what the readings of all of them say, in the order of the ranks."""
    return [_one_gpu(rank, series) for rank, series in enumerate(zip(*readings, strict=True))]


def _one_gpu(rank: int, series: Sequence[GpuReading]) -> GpuClocks:
    shares = {name: sum(bool(reading.reasons & bit) for reading in series) / len(series) for bit, name in THROTTLE_REASONS.items()}
    return GpuClocks(
        rank=rank,
        sm_mhz=Spread.of(reading.sm_mhz for reading in series),
        power_w=Spread.of(reading.power_w for reading in series),
        temperature_c=Spread.of(reading.temperature_c for reading in series),
        throttled={name: share for name, share in shares.items() if share},
        samples=len(series),
    )


def clock_warnings(clocks: Clocks) -> list[str]:
    """What a reader of the times must know, over all rounds: clocks that moved, clocks held down, cores that others used."""
    gpus = [gpu for one in clocks.rounds for gpu in one.gpus]
    ranks = dict.fromkeys(gpu.rank for gpu in gpus)
    moved = [(_range(lambda gpu: gpu.sm_mhz, [gpu for gpu in gpus if gpu.rank == rank]), f"SM clock of rank {rank}'s GPU") for rank in ranks]
    moved = [max(moved, key=lambda item: item[0][0])] if moved else []  # of the GPUs the worst
    cpus = [one.cpu for one in clocks.rounds if one.cpu and one.seconds >= JUDGED_SECONDS]
    moved.append((_range(lambda cpu: cpu.mhz, cpus), "CPU clock"))
    texts = [f"{name} moved by {part:.0%} ({low:,.0f} to {high:,.0f} MHz)" for (part, low, high), name in moved if part > CLOCK_MOVED]
    return [*texts, *_throttled(gpus), *_lost(cpus)]


def _range(spread_of: Callable[[Watched], Spread | None], found: Iterable[Watched]) -> tuple[float, float, float]:
    """(range over median, lowest, highest) of one quantity over all rounds."""
    spreads = [spread for one in found if (spread := spread_of(one))]
    if not spreads:
        return 0.0, 0.0, 0.0
    low, high, middle = min(s.min for s in spreads), max(s.max for s in spreads), median([s.median for s in spreads])
    return ((high - low) / middle if middle > 0 else 0.0), low, high


def _throttled(gpus: Sequence[GpuClocks]) -> list[str]:
    """Each reason with the largest part of the samples that it held for."""
    worst = {name: max(gpu.throttled.get(name, 0.0) for gpu in gpus) for name in THROTTLE_REASONS.values()} if gpus else {}
    reasons = [f"{name} in {share:.0%} of the samples" for name, share in worst.items() if share >= THROTTLED]
    return [f"GPU clocks were held down: {', '.join(reasons)}"] if reasons else []


def _lost(cpus: Sequence[CpuClocks]) -> list[str]:
    """Cores that others used, in the worst round. Where a quota leaves more cores than may be used, only what those do not cover counts."""
    worst = max(cpus, key=_lost_cores, default=None)
    if worst is None or _lost_cores(worst) <= CORES_LOST * worst.usable_cores:
        return []
    parts = [("other processes used", worst.others_cores), ("the hypervisor withheld", worst.stolen_cores)]
    return [" and ".join(f"{who} {cores:.1f}" for who, cores in parts if cores >= 0.05) + f" of {worst.cores} cores"]


def _lost_cores(cpu: CpuClocks) -> float:
    return cpu.others_cores + cpu.stolen_cores - (cpu.cores - cpu.usable_cores)
