"""Who takes part in a launch: every process says who it is, the first one checks that they fit together and numbers them.

Ranks are numbered node by node, whatever the launcher's numbers are, because layouts put neighbours of the innermost axis, tp, on
neighbouring ranks: so it stays inside a node where it fits. The first process stays rank 0.
"""

from __future__ import annotations

import json
import socket
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

import cpbench
from cpbench.cluster.place import Place
from cpbench.distributed.store import Store
from cpbench.errors import CpbenchError

JOIN_SECONDS = 120.0
POLL_SECONDS = 0.1
SHOWN = 8  # ranks that an error names


@dataclass(frozen=True)
class Seat:
    """A process as it says of itself. `address`: where other hosts reach its own."""

    launch_rank: int
    world_size: int
    node: int
    local_rank: int
    address: str
    version: str = cpbench.__version__


@dataclass(frozen=True)
class Roster:
    """All processes of a launch in the order of their ranks here."""

    seats: tuple[Seat, ...]

    @cached_property
    def nodes(self) -> int:
        return len({seat.node for seat in self.seats})

    @property
    def ranks_per_node(self) -> int:
        return len(self.seats) // self.nodes

    def rank_of(self, launch_rank: int) -> int:
        return next(rank for rank, seat in enumerate(self.seats) if seat.launch_rank == launch_rank)

    def local_world_size(self, rank: int, ranks: int) -> int:
        """How many of the first `ranks` ranks are on the node of this one."""
        return sum(seat.node == self.seats[rank].node for seat in self.seats[:ranks])

    def elsewhere(self, rank: int) -> str | None:
        """The address of another node than that of this rank; None where there is none."""
        return next((seat.address for seat in self.seats if seat.node != self.seats[rank].node), None)

    def to_json(self) -> str:
        return json.dumps([asdict(seat) for seat in self.seats])

    @classmethod
    def from_json(cls, text: str) -> Roster:
        return cls(tuple(Seat(**seat) for seat in json.loads(text)))


def join(store: Store, place: Place, seconds: float = JOIN_SECONDS) -> Roster:
    """Say who this process is, and learn who the others are. Raises CpbenchError where they do not come, or do not fit together."""
    seat = Seat(place.rank, place.world_size, place.node, place.local_rank, own_address(place))
    deadline = time.monotonic() + seconds
    try:
        if store.add(f"claimed/{place.rank}") > 1:
            hint = "Give every job a port of its own (MASTER_PORT, or --rdzv-endpoint), and every node its own number."
            raise CpbenchError(f"Two processes say that they are rank {place.rank}.", hint)
        store.set(f"seat/{place.rank}", json.dumps(asdict(seat)))
        return _found(store, place.world_size, deadline, seconds) if place.rank == 0 else _told(store, place, deadline, seconds)
    except ConnectionError as error:
        raise CpbenchError(f"The processes of the launch lost each other while they met: {error}.", "The first error of another rank says why.") from error


def _found(store: Store, size: int, deadline: float, seconds: float) -> Roster:
    """The first process: await all seats, number them, and tell."""
    seats: dict[int, Seat] = {}
    try:
        while len(seats) < size:
            for rank in [rank for rank in range(size) if rank not in seats]:
                if text := store.get(f"seat/{rank}"):
                    seats[rank] = Seat(**json.loads(text))
            if len(seats) < size and time.monotonic() > deadline:
                missing = [rank for rank in range(size) if rank not in seats]
                hint = f"All nodes must run the same command, {size} processes together: nodes x processes per node (torchrun), or tasks (srun)."
                raise CpbenchError(f"Of {size} ranks {len(seats)} came within {seconds:g} s; missing: {_listed(missing)}.", hint)
            time.sleep(0 if len(seats) == size else POLL_SECONDS)
        roster = numbered(list(seats.values()))
    except CpbenchError as error:
        store.set("refused", error.message)
        raise
    store.set("roster", roster.to_json())
    return roster


def _told(store: Store, place: Place, deadline: float, seconds: float) -> Roster:
    """Every other process: await what the first one says."""
    while (text := store.get("roster")) is None:
        if refused := store.get("refused"):
            raise CpbenchError(refused, "Rank 0 says what can be done.")
        if time.monotonic() > deadline + 2 * POLL_SECONDS:
            hint = "Its log says why; it must run the same command."
            raise CpbenchError(f"Rank {place.rank} waited {seconds:g} s, and rank 0 did not come.", hint)
        time.sleep(POLL_SECONDS)
    return Roster.from_json(text)


def numbered(seats: Sequence[Seat]) -> Roster:
    """Node by node, that of the first process first. Raises CpbenchError where processes do not fit together."""
    first = min(seats, key=lambda seat: seat.launch_rank)
    for seat in seats:
        if seat.world_size != first.world_size:
            hint = "Start all nodes with the same number of nodes and of processes per node."
            raise CpbenchError(f"Rank {seat.launch_rank} was started as one of {seat.world_size} ranks, rank 0 as one of {first.world_size}.", hint)
        if seat.version != first.version:
            hint = f"Install cpbench {first.version} on all nodes."
            raise CpbenchError(f"Rank {seat.launch_rank} has cpbench {seat.version}, rank 0 has {first.version}.", hint)
    sizes = Counter(seat.node for seat in seats)
    if len(set(sizes.values())) > 1:
        counts = ", ".join(str(count) for _, count in sorted(sizes.items()))
        near = min(sizes.values())
        raise CpbenchError(f"The nodes have {counts} ranks, and they must have the same number.", f"Start {near} on each (srun --ntasks-per-node={near}).")
    return Roster(tuple(sorted(seats, key=lambda seat: (seat.node != first.node, seat.node, seat != first, seat.local_rank))))


def own_address(place: Place) -> str:
    """Where other hosts reach this one: the address that leads to the store, or the store's own name where it is on this host."""
    found = source_towards(place.address)
    return place.address if found is None or found.startswith("127.") else found


def source_towards(host: str) -> str | None:
    """This host's address on the way to another one; None where there is no way. Sends nothing."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


def interface_towards(host: str) -> str | None:
    """The name of the network interface that leads to another host, for gloo, which would ask the host's name else."""
    import psutil

    source = source_towards(host)
    return next((name for name, addresses in psutil.net_if_addrs().items() if any(one.address == source for one in addresses)), None)


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:SHOWN])) + (f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else "")
