"""From a cell to a projection: scripts of the ranks that differ, all ranks played out at both ends of the band, memory, the speed of light.

Where the scripts come from is one of two: looked up, by running the program on tensors without storage under a clock of prices (pricing.py), or
measured, by a group of processes of this machine (rank.py). Which cells there are, and how results are written, is decided in running.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cpbench.cell import NOT_COMPILED, Cell
from cpbench.distributed.traffic import Transfer
from cpbench.errors import CpbenchError
from cpbench.formulas import flops_of_rank, live_bytes
from cpbench.kernels.base import Kernel
from cpbench.kernels.cpu_flash import CpuFlash
from cpbench.memory_pass import brings_collectives
from cpbench.projection.light import light
from cpbench.projection.limits import limits_of
from cpbench.projection.links import Links, Topology
from cpbench.projection.pricing import PricedClock, PricedKernel
from cpbench.projection.profile import DeviceProfile, load_profile
from cpbench.projection.replay import Outcome, replay
from cpbench.projection.simulated import META, classes, peak_of, simulate, without_storage
from cpbench.projection.tape import Script
from cpbench.records import TIME_METRIC, not_measured
from cpbench.results import CellResult, Metric, Projection

JITTER = 0.01  # of a rank's work, one standard deviation: assumed; sweeps show skews of 1.00 to 1.03 between ranks with equal work
Compute = Literal["lookup", "measured"]
Recorded = dict[int, list[Script]]  # of one process: passes of the ranks that it measured
Passed = Sequence[Script]  # of every rank, in one pass


@dataclass(frozen=True)
class Target:
    """The devices that are projected to. `hardware` is a name or a file; 0 ranks per node: as many as the profile says. `link`: see Links.with_link."""

    hardware: str
    gpus_per_node: int = 0
    link: str | None = None
    compute: Compute = "lookup"

    def profile(self) -> DeviceProfile:
        return load_profile(self.hardware)

    def links(self, profile: DeviceProfile, ranks: int) -> Links:
        """The links of so many ranks."""
        links = Links(profile.links, Topology(ranks, self.per_node(profile)))
        return links.with_link(self.link) if self.link else links

    def pause(self, ranks: int) -> Callable[[Transfer], float]:
        """About how long transfers between so many ranks take, where they are next to each other."""
        links = self.links(self.profile(), ranks)
        return lambda transfer: links.seconds(transfer.operation, range(transfer.size), transfer.travels)

    def per_node(self, profile: DeviceProfile) -> int:
        return self.gpus_per_node or profile.gpus_per_node


def kind_of_device(profile: DeviceProfile) -> str:
    """`cpu`, or `cuda`, whose way programs take on every accelerator."""
    return "cpu" if profile.device == "cpu" else "cuda"


def looked_up(cell: Cell, profile: DeviceProfile, *, detailed: bool = False, clock: PricedClock | None = None) -> tuple[dict[int, Script], list[str]]:
    """The scripts of the ranks that differ, priced by a profile, and what it was not measured at. `detailed`: work is cut where spans are.

    `clock`: another one of that profile, for programs that are not quite ours.
    """
    clock = clock or PricedClock(profile)
    kernel, is_nccl = _kernel(profile, clock), profile.backend != "gloo"
    with without_storage(kind_of_device(profile)), clock:
        scripts = {rank: simulate(cell, rank, kernel, clock, META, is_nccl=is_nccl, detailed=detailed) for rank in classes(cell)}
    return scripts, clock.outside()


def _kernel(profile: DeviceProfile, clock: PricedClock) -> Kernel:
    """What attends: PyTorch's CPU kernel, whose call has a price, or a stand-in for the varlen kernel of an accelerator."""
    return CpuFlash() if profile.device == "cpu" else PricedKernel(clock)


def of_all_ranks(cell: Cell, scripts: Mapping[int, Script]) -> list[Script]:
    """The script of every rank, from those of the ranks that differ."""
    found: dict[int, Script] = {}
    for rank, alike in classes(cell).items():
        found |= dict.fromkeys(alike, scripts[rank])
    return [found[rank] for rank in range(cell.world_size)]


def passes_of(cell: Cell, recorded: Sequence[Recorded]) -> list[Passed]:
    """Passes of all ranks, from those that processes recorded of the ranks that differ.

    Of a rank that stands for others each has a recording of its own, of another process or pass: ranks are not late at the same time.
    """
    kinds = classes(cell)
    passes: list[Passed] = []
    for number in range(min(len(runs) for process in recorded for runs in process.values())):
        found: dict[int, Script] = {}
        for kind, (first, alike) in enumerate(kinds.items()):
            sources = [process[first] for process in recorded if first in process]
            for place, rank in enumerate(alike):
                turn, source = divmod(kind + place, len(sources))
                found[rank] = sources[source][(number + turn) % len(sources[source])]
        passes.append([found[rank] for rank in range(cell.world_size)])
    return passes


def project(cell: Cell, target: Target, measured: Sequence[Passed] | None = None, source: str = "") -> CellResult:
    """The projection of a cell. `measured`: passes of all ranks, where work was measured on a device, which `source` names.

    Of several passes the one in the middle is what is expected, and the band reaches over all of them. Raises CpbenchError where the profile
    lacks what the cell needs.
    """
    profile = target.profile()
    outside: list[str] = []
    if measured is None:
        scripts, outside = looked_up(cell, profile)
        passes = [of_all_ranks(cell, scripts)]
    else:
        passes = [list(everyone) for everyone in measured]
    links, jitter = target.links(profile, cell.world_size), JITTER if measured is None else 0.0
    played = sorted(((replay(cell.layout, everyone, links), everyone) for everyone in passes), key=lambda one: one[0].seconds)
    expected, everyone = played[(len(played) - 1) // 2]
    ends = ((played[0][1], links.at("fast"), 0.0), (played[-1][1], links.at("slow"), jitter))
    band = [replay(cell.layout, scripts, costs, late).seconds for scripts, costs, late in ends]
    outside += _links_outside(cell, everyone, links)
    rank, most, categories = peak(cell, profile)
    reserved = profile.reserved(cell.world_size)
    least = light(cell, limits_of(profile, links, cell.dtype))
    projection = Projection(
        hardware=profile.name,
        title=profile.title,
        compute=f"measured on {source}" if measured is not None else f"looked up in {profile.name}",
        links=f"{profile.links.title}{f', --link {target.link}' if target.link else ''}",
        ranks_simulated=len(classes(cell)),
        gpus_per_node=target.per_node(profile),
        band=(min(band), max(band)),
        band_jitter=jitter,
        slowest_rank=expected.slowest,
        peak_rank=rank,
        by_category={name: size for name, size in categories.items() if size},
        reserved=reserved,
        memory_bytes=profile.memory_bytes,
        fits=most + sum(reserved.values()) <= profile.memory_bytes,
        outside=outside,
        light_binds=least.binds,
    )
    return CellResult(
        id=cell.id,
        key=cell.key,
        status="ok",
        world_size=cell.world_size,
        tokens_per_rank=cell.max_rows,
        cp_active=cell.cp_off is None,
        cp_off_reason=cell.cp_off,
        metrics=_metrics(cell, expected, everyone, most, least.seconds),
        projection=projection,
        warnings=[*([_too_large(projection, most)] if not projection.fits else []), *_assumptions(cell)],
    )


def attempt(data: dict[str, Any], target: Target, measured: Sequence[Passed] | None = None, source: str = "") -> CellResult:
    """The projection of a cell, given as JSON, or why there is none. The rest is as in `project`."""
    cell = Cell.from_dict(data)
    try:
        return project(cell, target, measured, source)
    except CpbenchError as error:
        return not_measured(cell, "unsupported", f"{error.message.rstrip('.')}; {error.hint[:1].lower()}{error.hint[1:].rstrip('.')}")
    except (RuntimeError, ValueError, TypeError) as error:
        return not_measured(cell, "crash", f"{type(error).__name__}: {error}".splitlines()[0])


def _metrics(cell: Cell, outcome: Outcome, scripts: Sequence[Script], peak: int, least_s: float) -> dict[str, Metric]:
    seconds, slowest = outcome.seconds, outcome.ranks[outcome.slowest]
    received = max(sum(transfer.travels * times for transfer, times in script.transfers if transfer.source) for script in set(scripts))
    most = max(flops_of_rank(cell, rank) for rank in range(cell.world_size)) if cell.world_size < 9 else flops_of_rank(cell, outcome.slowest)
    found: dict[str, tuple[str, Literal["lower", "higher"], float]] = {
        TIME_METRIC[cell.target]: ("s", "lower", seconds),
        "tokens_per_s": ("tokens/s", "higher", cell.tokens / seconds),
        "compute_s": ("s", "lower", slowest.work_s),
        "comm_s": ("s", "lower", slowest.comm_s),
        "exposed_comm_s": ("s", "lower", slowest.exposed_s),
        "tflops_per_rank": ("TFLOP/s", "higher", most / seconds / 1e12),
        "light_fraction": ("1", "higher", least_s / seconds),
        "peak_live_bytes": ("B", "lower", float(peak)),
        "comm_bytes": ("B", "lower", float(received)),
    }
    return {f"projected_{name}": Metric(unit=unit, better=better, rounds=[[value]], median=value, n=1) for name, (unit, better, value) in found.items()}


def peak(cell: Cell, profile: DeviceProfile) -> tuple[int, int, dict[str, int]]:
    """The rank whose live tensors need most by the closed form, its peak by its own program, and what that is made of.

    What a library does differently from rank to rank is in no closed form: there the first and the last of those ranks have their programs run.
    """
    needs = {rank: live_bytes(cell, rank) for rank in classes(cell)}
    most = max(needs.values())
    heaviest = [rank for rank, needed in needs.items() if needed == most]
    ends = {heaviest[0], heaviest[-1]} if brings_collectives(cell) else {heaviest[0]}
    with without_storage(kind_of_device(profile)):
        kernel = _kernel(profile, PricedClock(profile))
        found = [(rank, *peak_of(cell, rank, kernel)) for rank in sorted(ends)]
    return max(found, key=lambda one: one[1])


def _links_outside(cell: Cell, scripts: Sequence[Script], links: Links) -> list[str]:
    """What of the transfers was not measured."""
    found: dict[str, None] = {}
    for transfer, _ in scripts[0].transfers:
        ranks = next(ranks for ranks in cell.layout.groups(transfer.axis) if 0 in ranks)[: transfer.size]
        if phrase := links.outside(transfer.operation, ranks, transfer.travels):
            found[phrase] = None
    return list(found)


def _too_large(projection: Projection, peak: int) -> str:
    from cpbench.units import format_bytes

    needs = peak + sum(projection.reserved.values())
    return f"does not fit: {format_bytes(needs)} with what libraries take, of {format_bytes(projection.memory_bytes)}"


def _assumptions(cell: Cell) -> list[str]:
    """What the simulation takes for granted of this cell."""
    even = ["routers are taken to give all experts as many rows"] if cell.has_experts else []
    fused = ["products that are fused with collectives are priced one after the other"] if cell.sp_fused else []
    brought = ["collectives of a library are taken to cost what those of cpbench do"] if brings_collectives(cell) else []
    compiled = ["what would be compiled is priced as it is before"] if cell.compile != NOT_COMPILED else []
    return even + fused + brought + compiled
