"""How often a pass is timed: until the median is known well enough, or the time is over. Every rank takes the same decision.

A sample is the maximum over ranks of one pass; the ranks meet before each. All decisions are functions of samples that every rank has,
so nobody has to be told. Two variants that are compared alternate, A B B A, so that what drifts falls on both alike. What a sample means is
the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cpbench.distributed.collectives import Group
from cpbench.measure.device import Device
from cpbench.stats import median, relative_half_width


@dataclass(frozen=True)
class Timing:
    """When a round of a cell has enough samples. `precision` is half the interval of the median over the median."""

    min_samples: int
    max_samples: int
    max_seconds: float
    precision: float

    def stop(self, samples: list[float]) -> str | None:
        """The reason to stop, or None to go on."""
        if len(samples) < self.min_samples:
            return None
        width = relative_half_width(samples)
        if width is not None and width <= self.precision:
            return "precision"
        if sum(samples) >= self.max_seconds:
            return "max_seconds"
        return "max_samples" if len(samples) >= self.max_samples else None


@dataclass
class Samples:
    """Passes of one cell: for each, the seconds of every rank."""

    ranks: list[list[float]] = field(default_factory=list)
    stop: str = ""

    @property
    def slowest(self) -> list[float]:
        """The maximum over ranks of each pass, in seconds."""
        return [max(seconds) for seconds in self.ranks]

    @property
    def skew(self) -> list[float]:
        """Slowest over median rank of each pass."""
        return [max(seconds) / median(seconds) for seconds in self.ranks]

    def of_rank(self, rank: int) -> float:
        return median([seconds[rank] for seconds in self.ranks])


def one_pass(run: Callable[[], Any], prepare: Callable[[], Any], device: Device, world: Group) -> list[float]:
    """Seconds of every rank for one pass that all ranks start together."""
    prepare()
    world.barrier()
    return [seconds for (seconds,) in world.share([device.time(run)])]


@dataclass(frozen=True)
class Variant:
    """What is timed: a pass, what goes before each outside the timed part, and who is told (n, seconds) after each."""

    run: Callable[[], Any]
    prepare: Callable[[], Any]
    seen: Callable[[int, float], None]


def block_order(variants: int) -> tuple[int, ...]:
    """The passes of one block: one pass of a variant that is alone, else each variant and back again, so that a steady drift adds the same to all."""
    there = tuple(range(variants))
    return there + there[::-1] if variants > 1 else there


def sample(variants: Sequence[Variant], timing: Timing, device: Device, world: Group) -> list[Samples]:
    """Time whole blocks of passes until `timing` says stop for every variant; all have the same number of samples."""
    everything = [Samples() for _ in variants]
    while not all(samples.stop for samples in everything):
        for number in block_order(len(variants)):
            variant, samples = variants[number], everything[number]
            samples.ranks.append(one_pass(variant.run, variant.prepare, device, world))
            variant.seen(len(samples.ranks), max(samples.ranks[-1]))
        for samples in everything:
            samples.stop = timing.stop(samples.slowest) or ""
    return everything
