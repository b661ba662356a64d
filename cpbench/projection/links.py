"""What a collective costs over a group of ranks: seconds by operation, by which nodes its ranks are on, and by bytes on the wire.

Inside of a node, two lines per operation and number of ranks, one for small and one for large messages. They were fitted to measurements
and are within about 5 % of them, which no model from link speeds is. Between nodes, formulas over one network card per device: nobody's
are good to better than 25 %, so their bandwidth is a band. When a collective starts, and what hides it, is the replay's affair; which bytes
travel is counted in distributed/collectives.py, and bytes here are the same: those that one rank receives.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import pairwise
from math import ceil, log2
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cpbench.errors import CpbenchError
from cpbench.projection.constants import Kind, NotNegative, Number, Part, Positive, Source, require_ascending

Operation = Literal["all_gather", "reduce_scatter", "all_to_all", "all_reduce", "send_recv"]
End = Literal["fast", "expected", "slow"]
WIRES = ("pcie4", "pcie5")
PIPELINED = {"broadcast": "all_gather"}  # NCCL's ring broadcast passes a message on in pieces: each rank receives it once, as in a gather
LINK_HINT = "Write the line rate of one network card, as 400G, 200Gb/s or 50GB/s; nvlink (between nodes too); or pcie4 or pcie5 (within a node)."
_RATE = re.compile(r"^(\d{1,6}(?:\.\d{1,3})?)\s*(G|Gb/s|Gbps|Gbit/s|GB/s)$")

NIC_PART = Number(
    value=0.7,
    unit="of the line rate",
    kind="fitted",
    source="35 GB/s of a 400 Gb/s card: microsoft/vidur 7d47513, send_recv of 2 DGX-H100; band: Meta arXiv 2411.01783 (26), nccl-tests #290 (47)",
    low=0.52,
    high=0.94,
)
NETWORK_FIRST = Number(value=20e-6, unit="s", kind="fitted", source="microsoft/vidur 7d47513, send_recv of 2 nodes: 10 to 22 us, rounded up")
NETWORK_STEP = Number(value=14e-6, unit="s", kind="datasheet", source="NCCL src/graph/tuning.cc at 5067397: ring over the network, Simple protocol")


class Lines(Part):
    """Seconds of the bytes that a rank receives: the first line where the whole buffer is below `cut_bytes`, the second from there on."""

    small_s: NotNegative
    small_bytes_per_s: Positive
    cut_bytes: NotNegative
    large_s: NotNegative
    large_bytes_per_s: Positive
    mean_error: NotNegative
    worst_error: NotNegative

    def seconds(self, whole: float, travels: float) -> float:
        """Of `travels` bytes of a buffer of `whole` bytes. Never less than a smaller message takes, which the second line may be."""
        if whole < self.cut_bytes:
            return self.small_s + travels / self.small_bytes_per_s
        at_cut = self.small_s + travels * self.cut_bytes / whole / self.small_bytes_per_s if whole else self.small_s
        return max(at_cut, self.large_s + travels / self.large_bytes_per_s)


class Fit(Part):
    """The lines of one operation by ranks, and the buffers between which they were measured. `points`: (bytes received, seconds), as measured."""

    kind: Kind
    source: Source
    low_bytes: Positive
    high_bytes: Positive
    by_ranks: Annotated[dict[int, Lines], Field(min_length=1)]
    points: dict[int, tuple[tuple[float, float], ...]] | None = None


class Inside(Part):
    """Every operation inside of a node."""

    all_gather: Fit
    reduce_scatter: Fit
    all_to_all: Fit
    all_reduce: Fit
    send_recv: Fit

    def of(self, operation: str) -> Fit:
        """By the name of an operation."""
        fit: Fit = getattr(self, operation)
        return fit


class Between(Part):
    """One device's network card: seconds of a first message, of each further hop between nodes, and bytes per second."""

    first: Number
    hop: Number
    rate: Number


class Contention(Part):
    """Parts by which the rank's own work slows while a transfer inside of a node or between nodes is in flight, and a transfer while it works."""

    work_inside: Number
    work_between: Number
    transfer: Number


class Behind(Part):
    """(Seconds of work, seconds that a collective behind so much work takes more than those of `inside`): threads that communicate get a core
    later, the longer it was somebody else's."""

    kind: Kind
    source: Source
    points: Annotated[tuple[tuple[NotNegative, float], ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _ascending(self) -> Behind:
        require_ascending(self.points)
        return self


class LinkCosts(Part):
    """The links of a device. `step`: seconds of each rank beyond those measured. `in_model`: the part by which collectives inside a model
    take longer than alone. `most_ranks`: of a group inside of a node, where more depend on the board; None: no limit."""

    title: str
    inside: Inside
    step: Number
    in_model: Number
    between: Between | None = None
    contention: Contention
    behind: Behind | None = None
    most_ranks: int | None = None


@dataclass(frozen=True)
class Topology:
    """So many ranks in order, so many per node."""

    ranks: int
    gpus_per_node: int

    def members(self, ranks: Sequence[int]) -> list[int]:
        """How many of these ranks are on each node that has some."""
        return list(Counter(rank // self.gpus_per_node for rank in ranks).values())


@dataclass(frozen=True)
class Links:
    """The links of a device in a topology. `end`: of the band of what is known."""

    costs: LinkCosts
    topology: Topology
    end: End = "expected"

    def at(self, end: End) -> Links:
        """The same links at an end of the band: transfers that take less or more, and contention of none or twice as much."""
        return replace(self, end=end)

    def with_link(self, text: str) -> Links:
        """Other links: `400G`, `200Gb/s`, `50GB/s` (line rate of a device's card), `nvlink` between nodes too, `pcie4`, `pcie5` inside.

        Raises CpbenchError for anything else.
        """
        if text == "nvlink":
            return replace(self, topology=replace(self.topology, gpus_per_node=max(1, self.topology.ranks)))
        if text in WIRES:
            return replace(self, costs=wire(text).model_copy(update={"between": self.costs.between}))
        found = _RATE.match(text)
        if found is None or not float(found[1]):
            raise CpbenchError(f"{text[:40]!r} is not a link.", LINK_HINT)
        line = float(found[1]) * 1e9 / (1 if found[2] == "GB/s" else 8)
        rate = NIC_PART.scaled(line, "derived", f"--link {text}, of which cards reach a part: {NIC_PART.source}").model_copy(update={"unit": "bytes/s"})
        return replace(self, costs=self.costs.model_copy(update={"between": Between(first=NETWORK_FIRST, hop=NETWORK_STEP, rate=rate)}))

    def seconds(self, operation: str, ranks: Sequence[int], travels: float) -> float:
        """Seconds of a collective of these global ranks in which each receives `travels` bytes; of one rank none.

        `send_recv` is a step of all ranks around their ring, or a message where they are two. Raises CpbenchError for links that are not known.
        """
        if len(ranks) < 2:
            return 0.0
        members = self.topology.members(ranks)
        operation = PIPELINED.get(operation, operation)
        if len(members) == 1:
            return self._slower(self._inside(operation, len(ranks), travels))
        if operation == "send_recv":
            return self._network.first.value + travels / self._rate
        if operation == "all_to_all":
            return self._all_to_all(members, travels)
        return self._hierarchical(operation, members, travels)

    def band(self, operation: str, ranks: Sequence[int], travels: float) -> tuple[float, float]:
        """The fast and the slow end of `seconds`."""
        return self.at("fast").seconds(operation, ranks, travels), self.at("slow").seconds(operation, ranks, travels)

    def kappa(self, ranks: Sequence[int]) -> float:
        """The part by which a rank's own work slows while a transfer of this group is in flight."""
        contention = self.costs.contention
        return self._contended(contention.work_inside if len(self.topology.members(ranks)) == 1 else contention.work_between)

    def drag(self, ranks: Sequence[int]) -> float:
        """The part by which a transfer of this group slows while its ranks work."""
        return self._contended(self.costs.contention.transfer) if len(ranks) > 1 else 0.0

    def late(self, work_s: float) -> float:
        """Seconds that a collective takes more behind so much work, on the line between two that were measured."""
        if self.costs.behind is None:
            return 0.0
        known = self.costs.behind.points
        for (less, before), (more, after) in pairwise(known):
            if work_s <= more:
                return before + (after - before) * max(0.0, work_s - less) / (more - less)
        return known[-1][1]

    def outside(self, operation: str, ranks: Sequence[int], travels: float) -> str | None:
        """A phrase for a collective inside of a node that nothing was measured for; None for one within what was."""
        members = self.topology.members(ranks)
        if len(ranks) < 2 or len(members) > 1:
            return None
        operation = PIPELINED.get(operation, operation)
        fit = self.costs.inside.of(operation)
        size, whole = len(ranks), whole_buffer(operation, len(ranks), travels)
        if operation != "send_recv" and size > max(fit.by_ranks):
            return f"{operation} of {size} ranks is beyond the {max(fit.by_ranks)} that were measured"
        if whole > fit.high_bytes:
            return f"{operation} of {whole:,.0f} bytes is beyond the {fit.high_bytes:,.0f} that were measured"
        return None  # a message below the smallest takes as long as that

    def _inside(self, operation: str, size: int, travels: float) -> float:
        """Inside of a node: between two measured numbers of ranks on the line through both; beyond, with a step of each further rank."""
        if self.costs.most_ranks is not None and size > self.costs.most_ranks:
            board = f"{self.costs.title} between {size} devices depends on the board, so nothing is known of it without a measurement."
            raise CpbenchError(board, f"cpbench calibrate measures it; up to {self.costs.most_ranks} devices are known.")
        lines = self.costs.inside.of(operation).by_ranks

        def at(known: int) -> float:
            seconds = lines[known].seconds(whole_buffer(operation, size, travels), travels)
            return seconds * (1 + {"fast": -1, "expected": 0, "slow": 1}[self.end] * min(lines[known].mean_error, 1))

        above = min((known for known in lines if known >= size), default=None)
        below = max((known for known in lines if known <= size), default=None)
        if above is not None and below is not None and above > below:
            return at(below) + (at(above) - at(below)) * (size - below) / (above - below)
        if above is not None or operation == "send_recv":
            return at(above or max(lines))
        steps = (size - max(lines)) * (2 if operation == "all_reduce" else 1)
        return at(max(lines)) + steps * self.costs.step.value

    def _hierarchical(self, operation: str, members: Sequence[int], travels: float) -> float:
        """A ring with a channel for each card: the longer of what passes inside of a node and what passes its cards, and a hop for each node.

        An all-reduce goes up and down NCCL's tree of nodes.
        """
        nodes, size = len(members), sum(members)
        passes = whole_buffer(operation, size, travels) * (nodes - 1) / nodes * (2 if operation == "all_reduce" else 1)
        across = passes / (min(members) * self._rate)
        first = self._network.first.value - self._network.hop.value
        inside = self._slower(self._inside(operation, max(members), travels)) if max(members) > 1 else 0.0
        hops = 2 * ceil(log2(nodes)) if operation == "all_reduce" else nodes - 1
        return max(inside, first + across) + hops * self._network.hop.value

    def _all_to_all(self, members: Sequence[int], travels: float) -> float:
        """Pairwise messages: those to other nodes pass the device's own card, whatever the others' do (nccl-tests #267)."""
        size, near = sum(members), min(members)
        across = travels * (size - near) / (size - 1) / self._rate
        inside = self._slower(self._inside("all_to_all", max(members), travels * (max(members) - 1) / (size - 1))) if max(members) > 1 else 0.0
        return max(self._network.first.value + across, inside)

    def _slower(self, seconds: float) -> float:
        return seconds * (1 + self.costs.in_model.value) if self.end == "slow" else seconds

    def _contended(self, part: Number) -> float:
        return {"fast": 0.0, "expected": part.value, "slow": 2 * part.value / (1 + part.value)}[self.end]  # twice the time that is lost

    @property
    def _network(self) -> Between:
        if self.costs.between is None:
            raise CpbenchError(f"Of {self.costs.title} nothing is known between nodes.", f"Say what joins them with --link. {LINK_HINT}")
        return self.costs.between

    @property
    def _rate(self) -> float:
        rate = self._network.rate
        return {"fast": rate.high or rate.value, "expected": rate.value, "slow": rate.low or rate.value}[self.end]


def wire(name: str) -> LinkCosts:
    """The links inside of a node that are no device's: `pcie4` or `pcie5`, and nothing between nodes."""
    return LinkCosts.model_validate_json(resources.files(__package__).joinpath("wires", f"{name}.json").read_text(encoding="utf-8"))


def whole_buffer(operation: str, size: int, travels: float) -> float:
    """Bytes of the whole buffer (what nccl-tests call size) of which so many travel to a rank."""
    if operation == "send_recv":
        return travels
    return travels * size / ((2 if operation == "all_reduce" else 1) * (size - 1))
