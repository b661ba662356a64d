"""The command of a process inside a launch: the first one runs it, the others are its ranks until it has ended."""

from __future__ import annotations

from collections.abc import Callable

from cpbench import launch
from cpbench.cluster.inside import Launch
from cpbench.cluster.member import Member
from cpbench.cluster.place import Place
from cpbench.cluster.roster import JOIN_SECONDS, join
from cpbench.distributed.store import connect


def take_part(place: Place, command: Callable[[], int]) -> int:
    """Run `command` on rank 0, and serve it on all others. Returns the exit code of this process. Raises CpbenchError."""
    store = connect(place.address, place.port, serve=place.serves, seconds=JOIN_SECONDS)
    roster = join(store, place)
    rank = roster.rank_of(place.rank)
    if rank:
        return Member(store, roster, rank).serve()
    mine = Launch(store, roster)
    token = launch.LAUNCH.set(mine)
    try:
        return command()
    finally:
        launch.LAUNCH.reset(token)
        mine.close()
