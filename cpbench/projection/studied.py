"""What a projection makes of a published row: its cell on the machine of its study.

A machine is the profile that is nearest to it with what the study says of it put in. Attention that the study timed on one device runs at that
rate. Products that a study had in eight bits are priced in eight bits, and their operands are quantised by kernels that read what they write from
once, as those of engines do. Nothing here knows what a row says of the time that it took.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from cpbench.cell import Cell
from cpbench.projection.constants import Number
from cpbench.projection.links import Links, Topology
from cpbench.projection.pricing import PricedClock
from cpbench.projection.profile import DeviceProfile, load_profile
from cpbench.projection.projecting import looked_up, of_all_ranks, peak
from cpbench.projection.published import Machine, Row, Study
from cpbench.projection.replay import RankOutcome, replay
from cpbench.quantisation import Matrix, attention_matrices, layer_matrices

EIGHT_BITS = "fp8"
QUANTISED_BYTES = 3  # of each operand in two bytes: read once and written in one


@dataclass(frozen=True)
class Studied:
    """What was projected of a row. `seconds` of a pass and its slowest rank; of a change, also the `baseline_s`, and by how many bytes the peak changes."""

    row: Row
    seconds: float
    slowest: RankOutcome
    baseline_s: float | None = None
    more_bytes: int | None = None

    @property
    def value(self) -> float:
        """In the unit of the row: seconds of a time, as a part of the baseline's time, or bytes."""
        if self.row.unit == "GB":
            return float(self.more_bytes or 0)
        return self.seconds if self.baseline_s is None else self.seconds / self.baseline_s - 1

    @property
    def error(self) -> float | None:
        """By what part the projected time is longer than the published one; None for changes."""
        return None if self.row.seconds is None else self.seconds / self.row.seconds - 1


class EightBits(PricedClock):
    """A clock to which products by some matrices (outputs, inputs) are in eight bits."""

    def __init__(self, profile: DeviceProfile, matrices: Set[Matrix]) -> None:
        super().__init__(profile)
        self._matrices = matrices

    def _gemm(self, m: int, n: int, k: int, dtype: str) -> float:
        if (n, k) not in self._matrices:
            return super()._gemm(m, n, k, dtype)
        return super()._gemm(m, n, k, EIGHT_BITS) + self.profile.moved(QUANTISED_BYTES * m * k)


def studied(study: Study, row: Row) -> Studied:
    """The projection of a row. Raises CpbenchError where the profile of its machine lacks what the cell needs."""
    profile = on_machine(load_profile(study.machine(row).device), study.machine(row), study.dtype)
    rate = study.rate(row)
    if rate is not None and rate.seconds is not None:
        alone, _ = _played(study, rate, study.cell(rate), profile)
        profile = with_attention(profile, study.dtype, alone / rate.seconds, f"{study.source}: {rate.value:g} {rate.unit} on one device")
    seconds, slowest = _played(study, row, study.cell(row), profile)
    baseline = study.baseline(row)
    if baseline is None:
        return Studied(row, seconds, slowest)
    less = peak(study.cell(row), profile)[1] - peak(baseline, profile)[1] if row.unit == "GB" else None
    return Studied(row, seconds, slowest, _played(study, row, baseline, profile)[0], less)


def on_machine(profile: DeviceProfile, machine: Machine, dtype: str) -> DeviceProfile:
    """The profile with the peaks, the memory and its bandwidth that a study says. What the peaks are multiplied by is the same for all dtypes.

    Products in eight bits take half as long as those in `dtype` where the profile does not know better.
    """
    source = f"published: {machine.title}"
    peaks, curves = dict(profile.peaks), dict(profile.gemm_efficiency)
    if EIGHT_BITS not in peaks:
        peaks[EIGHT_BITS] = peaks[dtype].scaled(2.0, "assumed", "twice the rate of two bytes per value")
        curves[EIGHT_BITS] = curves[dtype]
    if machine.flops is not None:
        peaks = _scaled(peaks, machine.flops / profile.peak_flops(dtype), source)
    changed: dict[str, object] = {"peaks": peaks, "gemm_efficiency": curves}
    if machine.memory_bytes_per_s is not None:
        part = machine.memory_bytes_per_s / profile.bandwidth.value
        points = tuple((size, rate * part) for size, rate in profile.moved_rate.points)
        changed["bandwidth"] = profile.bandwidth.scaled(part, "datasheet", source)
        changed["moved_rate"] = profile.moved_rate.model_copy(update={"points": points})
    if machine.memory_bytes is not None:
        changed["memory"] = profile.memory.scaled(machine.memory_bytes / profile.memory.value, "datasheet", source)
    return profile.model_copy(update=changed)


def with_attention(profile: DeviceProfile, dtype: str, factor: float, source: str) -> DeviceProfile:
    """The profile with attention so many times as fast, because `source` measured it."""
    cost = profile.attention_cost[dtype]
    faster = cost.model_copy(update={"efficiency": cost.efficiency.scaled(factor, "measured", source)})
    return profile.model_copy(update={"attention_cost": {**profile.attention_cost, dtype: faster}})


def _scaled(peaks: dict[str, Number], factor: float, source: str) -> dict[str, Number]:
    return {dtype: peak.scaled(factor, "datasheet", source) for dtype, peak in peaks.items()}


def _played(study: Study, row: Row, cell: Cell, profile: DeviceProfile) -> tuple[float, RankOutcome]:
    """Seconds of a pass, and its slowest rank."""
    machine = study.machine(row)
    links = Links(profile.links, Topology(cell.world_size, machine.gpus_per_node))
    if machine.network_bytes_per_s is not None:
        links = links.with_link(f"{machine.network_bytes_per_s / 1e9:g}GB/s")
    scripts, _ = looked_up(cell, profile, clock=EightBits(profile, _in_8_bits(study, cell)))
    outcome = replay(cell.layout, of_all_ranks(cell, scripts), links)
    return outcome.seconds, outcome.ranks[outcome.slowest]


def _in_8_bits(study: Study, cell: Cell) -> Set[Matrix]:
    """The matrices whose products are in eight bits."""
    if study.in_8_bits == "none" or cell.target == "attention":
        return frozenset()
    found = {matrix for layer in cell.config.kinds(cell.layer_range) for matrix in layer_matrices(cell, layer)}
    return found if study.in_8_bits == "all" else found - set(attention_matrices(cell).values())
