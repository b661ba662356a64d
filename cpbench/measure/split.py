"""How a rank spends a pass: its own work, communication, and the part of the communication that no work hides.

One pass is marked where collectives are started and waited for (flight.py). *Exposed* is the time in which the rank does that: starting,
waiting, and waiting for ranks that are late. *Compute* is the rest of the pass. A transfer that nobody waits for yet goes on behind the
rank's own work; how long it does so is not visible from the rank, so it is taken to be what a collective of that size takes alone, timed
once outside of timed passes, and never longer than the work that it could hide behind. *Communication* is exposed and hidden together.

What a mark is, is the device's affair (device.py), and what collectives a pass has is decided by strategies and the communicator.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from cpbench.distributed.collectives import Group
from cpbench.distributed.flight import Flight
from cpbench.distributed.mesh import Groups
from cpbench.distributed.observe import OPERATIONS
from cpbench.intervals import joined
from cpbench.measure.device import Device
from cpbench.stats import median

ELEMENT_BYTES = 4  # of the fp32 values that are sent for timing
LARGEST = {"cpu": 8 << 20, "cuda": 128 << 20}  # bytes from which on a transfer takes time in proportion to its size
REPEATS = 3
Link = tuple[str, int, str]  # axis, ranks, operation


@dataclass(frozen=True)
class Alone:
    """What a collective takes when nothing else happens: (bytes, seconds) of one or two sizes, the smaller first."""

    points: tuple[tuple[int, float], ...]

    def seconds(self, travels: int) -> float:
        """On the line through the points; in proportion to the size where there is one."""
        size, seconds = self.points[-1]
        if len(self.points) == 1:
            return seconds * travels / size
        less, less_seconds = self.points[0]
        return max(0.0, seconds + (seconds - less_seconds) / (size - less) * (travels - size))

    @property
    def bytes_per_s(self) -> float:
        """Bytes that a rank receives per second, in the larger size: what nccl-tests call bus bandwidth."""
        size, seconds = self.points[-1]
        return size / seconds


def time_links(groups: Groups, flights: Sequence[Flight], device: Device) -> dict[Link, Alone]:
    """What the kinds of collectives among the flights take alone. All ranks call; those of a group use the same sizes."""
    cap = LARGEST.get(device.torch_device.type, LARGEST["cuda"])
    links: dict[Link, Alone] = {}
    for group in groups.several():
        sizes: dict[str, list[int]] = defaultdict(list)
        for flight in flights:
            if (flight.axis, flight.size) == (group.axis, group.size) and flight.travels:
                sizes[flight.operation].append(flight.travels)
        limits = [float(limit(sizes[name], default=0)) for name in OPERATIONS for limit in (min, max)]
        shared = list(zip(*group.share(limits), strict=True))
        for index, operation in enumerate(OPERATIONS):
            known = [int(size) for size in (*shared[2 * index], *shared[2 * index + 1]) if size]
            if not known:
                continue
            low, high = min(known), min(max(known), cap)
            tried = [low, high] if low < high / 2 else [high]
            links[group.axis, group.size, operation] = Alone(tuple((size, _time(group, operation, size, device)) for size in tried))
    return links


def _time(group: Group, operation: str, travels: int, device: Device) -> float:
    """Seconds of the slowest rank, the median of a few."""
    call = collective_call(group, operation, max(1, travels // ELEMENT_BYTES), device.torch_device)
    taken = []
    for _ in range(1 + REPEATS):  # the first one makes connections and touches memory
        group.barrier()
        taken.append(device.time(call))
    return median([max(ranks) for ranks in zip(*group.share(taken[1:]), strict=True)])


def collective_call(group: Group, operation: str, elements: int, device: torch.device) -> Callable[[], object]:
    """A call in which each rank receives about so many fp32 values, into fresh space as programs do."""
    share, size = max(1, elements // (group.size - 1)), group.size
    if operation == "send_recv":
        here = torch.rand(elements, device=device)
        return lambda: group.shift(here, torch.empty_like(here)).wait()
    if operation == "all_reduce":
        both = torch.rand(max(1, elements * size // (2 * (size - 1))), device=device)
        return lambda: group.all_reduce(both)
    whole, mine = torch.rand(size * share, device=device), torch.rand(share, device=device)
    if operation == "all_gather":
        return lambda: group.all_gather(torch.empty_like(whole), mine).wait()
    if operation == "reduce_scatter":
        return lambda: group.reduce_scatter_rows(whole, [share] * size)
    return lambda: group.all_to_all(torch.empty_like(whole), whole, [share] * size, [share] * size).wait()


@dataclass(frozen=True)
class RankSplit:
    """Seconds of one rank in the marked pass. `rows`: of each kind of collective calls, bytes, exposed seconds, and seconds alone."""

    step_s: float
    compute_s: float
    comm_s: float
    exposed_comm_s: float
    rows: dict[Link, list[float]]


def split(flights: Sequence[Flight], seconds: float, links: dict[Link, Alone], device: Device) -> RankSplit:
    """How a rank spent a pass that took it so many seconds."""
    rows: dict[Link, list[float]] = {}
    times = [tuple(device.between(flights[0].begin, mark) for mark in (f.begin, f.started, f.waiting, f.done)) for f in flights]
    work = OwnWork([stretch for begin, started, waiting, done in times for stretch in ((begin, started), (waiting, done))])
    hidden = 0.0
    for flight, (begin, started, waiting, done) in zip(flights, times, strict=True):
        link = flight.axis, flight.size, flight.operation
        alone = links[link].seconds(flight.travels) if link in links else 0.0
        hidden += min(work.between(started, waiting), alone)
        known, own = rows.get(link, [0.0] * 4), started - begin + done - waiting
        rows[link] = [old + new for old, new in zip(known, (1, flight.travels, own, alone), strict=True)]
    windows = sum(work.between(*window) for window in joined((started, waiting) for _, started, waiting, _ in times))
    exposed = min(work.exposed, seconds)
    return RankSplit(seconds, seconds - exposed, exposed + min(hidden, windows), exposed, rows)


class OwnWork:
    """The time of a rank without the stretches in which it starts collectives or waits for them; these do not overlap, because it is one thread."""

    def __init__(self, stretches: Sequence[tuple[float, float]]) -> None:
        ordered = sorted(stretches)
        self._starts, self._ends = [start for start, _ in ordered], [end for _, end in ordered]
        self._before = [0.0, *accumulate(end - start for start, end in ordered)]

    @property
    def exposed(self) -> float:
        return self._before[-1]

    def between(self, start: float, end: float) -> float:
        """Seconds of own work."""
        return max(0.0, end - start - (self._until(end) - self._until(start)))

    def _until(self, time: float) -> float:
        """Exposed seconds before a moment."""
        index = bisect_right(self._starts, time)
        return self._before[index] - (max(0.0, self._ends[index - 1] - time) if index else 0.0)


def shared_split(flights: Sequence[Flight], seconds: Sequence[float], groups: Groups, device: Device) -> dict[str, Any]:
    """The fields of `results.Split`, from the flights of this rank in a pass that took the ranks so many seconds. All ranks call.

    The rank with the most work of its own is the one that the others wait for, so the split is that rank's.
    """
    links = time_links(groups, flights, device)
    mine = split(flights, seconds[groups.rank], links, device)
    everyone = groups.world.share([mine.step_s, mine.compute_s, mine.comm_s, mine.exposed_comm_s])
    work = [ranks[1] for ranks in everyone]
    slow = work.index(max(work))
    keys = [(group.axis, group.size, operation) for group in groups.several() for operation in OPERATIONS]
    numbers = [value for key in keys for value in (*mine.rows.get(key, [0.0] * 4), links[key].bytes_per_s if key in links else 0.0)]
    theirs = groups.world.share(numbers)[slow]
    rows = [dict(zip(("calls", "bytes", "exposed_s", "alone_s", "bytes_per_s"), theirs[5 * at : 5 * at + 5], strict=True)) for at in range(len(keys))]
    collectives = [
        {"axis": axis, "ranks": size, "operation": operation, **row, "calls": int(row["calls"]), "bytes": int(row["bytes"])}
        for (axis, size, operation), row in zip(keys, rows, strict=True)
        if row["calls"]
    ]
    names = ("step_s", "compute_s", "comm_s", "exposed_comm_s")
    ranks = [dict(zip(names, values, strict=True)) for values in everyone]
    return {**ranks[slow], "rank": slow, "compute_skew": work[slow] / median(work) if median(work) > 0 else 1.0, "collectives": collectives, "ranks": ranks}
