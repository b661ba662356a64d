"""The speed of light of a cell: the least time in which its devices could do the work, if each did nothing but run at one of its peaks.

Three floors, of which the highest binds. Compute and memory are those of the problem and know no layout: the operations of one device and the
bytes that must be touched once, spread evenly over all ranks. So work that a layout does twice, or unevenly, counts against it. The wire is
that of the layout: what a rank must receive by the formulas of the cell's strategy and of the exchanges between blocks, over perfect links
that all run at once. Pure numbers, without torch. What a device can do is decided by who makes the `Limits`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from cpbench import formulas
from cpbench.cell import Cell
from cpbench.layout import Layout
from cpbench.quantisation import NONE, layer_matrices
from cpbench.strategies import STRATEGIES

Floor = Literal["compute", "memory", "wire"]
MLA = ("expanded", "absorbed")  # two ways to the same result, of which the one with fewer operations counts


@dataclass(frozen=True)
class Limits:
    """The peaks of a rank's device and of its links. What is None is not known, and limits nothing.

    Operations per second of the cell's dtype and of FP8 products; bytes per second of the device's memory, and of its links in one direction:
    to other ranks of the node, and to other nodes. Rank r sits on node r // gpus_per_node; None: all ranks share one.
    """

    flops: float
    fp8_flops: float | None = None
    memory: float | None = None
    link: float | None = None
    network: float | None = None
    gpus_per_node: int | None = None


@dataclass(frozen=True)
class Light:
    """Operations and bytes of all ranks together, bytes that the rank receives which needs longest for them, and the floors in seconds.

    None: not known, for lack of a limit, or because the strategy is a library's, whose traffic has no formula.
    """

    flops: int
    bytes: int
    wire_bytes: int | None
    compute_s: float
    memory_s: float | None
    wire_s: float | None

    @property
    def floors(self) -> dict[Floor, float]:
        """The floors that are known, in seconds."""
        found: dict[Floor, float | None] = {"compute": self.compute_s, "memory": self.memory_s, "wire": self.wire_s}
        return {name: seconds for name, seconds in found.items() if seconds is not None}

    @property
    def binds(self) -> Floor:
        """The highest floor."""
        return max(self.floors, key=lambda name: self.floors[name])

    @property
    def seconds(self) -> float:
        """The least time of one pass."""
        return self.floors[self.binds]


class Wire(NamedTuple):
    """Bytes that a rank receives from ranks of its node, and from other nodes."""

    inside: float
    between: float

    def seconds(self, limits: Limits) -> float:
        """Over both kinds of links at once."""
        return max(self.inside / limits.link if limits.link else 0.0, self.between / limits.network if limits.network else 0.0)


def light(cell: Cell, device: Limits) -> Light:
    """The speed of light of a pass of `cell`, all ranks on devices with these limits."""
    whole = _on_one_device(cell)
    operations, fast, touched = _least_flops(whole), _fp8_flops(whole) if device.fp8_flops else 0, least_bytes(cell)
    seconds = (operations - fast) / device.flops + (fast / device.fp8_flops if device.fp8_flops else 0.0)
    wires = _wires(cell, device) if device.link or device.network else None
    slowest = max(wires, key=lambda wire: wire.seconds(device)) if wires else None
    return Light(
        flops=operations,
        bytes=touched,
        wire_bytes=None if slowest is None else round(sum(slowest)),
        compute_s=seconds / cell.world_size,
        memory_s=touched / cell.world_size / device.memory if device.memory else None,
        wire_s=None if slowest is None else slowest.seconds(device),
    )


def least_flops(cell: Cell) -> int:
    """Operations of a pass on one device that holds every token: two per multiply-add, no masked score, no copy of anything.

    Latent attention is counted the cheaper way, expanded or absorbed, whichever the cell runs; where keys are selected there is only the latter.
    """
    return _least_flops(_on_one_device(cell))


def least_bytes(cell: Cell) -> int:
    """Bytes that must pass through device memory: weights once, K and V of every layer once, cached or new; dropped ones do not count.

    Of a layer alone also its input and output, of attention alone queries and outputs, and what opens latents. No activations else: they may
    stay on the chip.
    """
    whole, config, size = _on_one_device(cell), cell.config, cell.element_bytes
    written = 0 if cell.kv_cache == "drop" and cell.target != "attention" else cell.tokens
    rows = (written + sum(cell.prefixes)) * whole.shape.row_values * size * cell.layers
    if cell.target != "attention":
        return rows + formulas.weights_bytes(whole) + (2 * cell.tokens * config.hidden * size if cell.target == "layer" else 0)
    latent = config.latent
    head = config.head_dim + (latent.v_dim if latent else config.head_dim)
    opens = latent.kv_rank * (latent.nope_dim + latent.v_dim) if latent else 0
    return rows + (cell.tokens * head + opens) * config.heads * size


def _on_one_device(cell: Cell) -> Cell:
    """The same work without any parallelism."""
    return replace(cell, layout=Layout(), strategy="none", partition="contiguous", dispatch=None, sp_chunks=1, sp_gather="hidden", sp_fused=False)


def _least_flops(whole: Cell) -> int:
    ways = MLA if whole.config.latent and not whole.config.indexer else (whole.mla,)
    return min(formulas.flops(replace(whole, mla=way)) for way in ways)


def _fp8_flops(whole: Cell) -> int:
    """Operations of the products that are quantised: of routed experts those that a token gets."""
    if whole.quant == NONE or whole.target == "attention":
        return 0
    values = 0
    for layer, count in whole.config.kinds(whole.layer_range).items():
        values += count * sum(number * outputs * inputs for (outputs, inputs), number in layer_matrices(_with_chosen_experts(whole), layer).items())
    return 2 * whole.tokens * values


def _with_chosen_experts(whole: Cell) -> Cell:
    """With as many experts as a token gets."""
    experts = whole.config.experts
    return whole if experts is None else replace(whole, config=replace(whole.config, experts=replace(experts, count=experts.top_k)))


def _wires(cell: Cell, device: Limits) -> list[Wire] | None:
    """What ranks receive: of each group that has a batch of its own its first rank, in the stages that differ. None where no formula says it."""
    if any(STRATEGIES[part.strategy].brings_collectives for part, _ in cell.distinct_parts) and not cell.cp_off:
        return None
    layout = cell.layout
    groups = {id(part.cell): dp for dp, part in reversed(list(enumerate(cell.parts)))}
    stages = {0, min(1, layout.pp - 1), layout.pp - 1}  # the first ones may have more layers, the others receive hidden states
    return [received(cell, layout.rank_of(pp, dp), device.gpus_per_node) for pp in sorted(stages) for dp in sorted(groups.values())]


def received(cell: Cell, rank: int, gpus_per_node: int | None = None) -> Wire:
    """The least that a global rank receives in a pass: what formulas count, but of a sum that all get no more than the sum itself.

    Links may add up what passes through them, as switches do; gathered rows cross once between two nodes, over the network ports of all ranks
    of the group that a node has. Rows that are gathered for experts are taken to come from the whole axis.
    """
    found = list(_shares(cell, rank, gpus_per_node or cell.world_size))
    return Wire(sum(wire.inside for wire in found), sum(wire.between for wire in found))


def _shares(cell: Cell, rank: int, gpus_per_node: int) -> Iterator[Wire]:
    for (axis, operation), (_, count) in formulas.traffic(cell, rank).counts.items():
        ranks = next(ranks for ranks in cell.layout.groups(axis) if rank in ranks)
        if len(ranks) == 1 or not count:
            continue
        if operation == "send_recv":
            before = ranks[ranks.index(rank) - 1]
            yield Wire(count, 0) if before // gpus_per_node == rank // gpus_per_node else Wire(0, count)
            continue
        others, here = len(ranks) - 1, sum(1 for other in ranks if other // gpus_per_node == rank // gpus_per_node)
        away = (len(ranks) - here) / others
        if operation == "all_reduce":  # counted as 2 S (n - 1) / n
            total = count * len(ranks) / (2 * others)
            between = total / here if away else 0.0
        else:
            total, between = count, count * away / (1 if operation == "all_to_all" else here)
        yield Wire(total - between, between)
