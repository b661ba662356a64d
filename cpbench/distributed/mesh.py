"""From a layout to the groups that a rank talks in. Which ranks those are is layout.py's decision; this module only makes them.

A group of one rank costs nothing, and a process group is made once per distinct rank list, however many layouts use it.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpbench.distributed.collectives import Group, LocalWorld, ProcessGroup, Recorder, new_process_group
from cpbench.layout import AXES, INNER_AXES, Layout


@dataclass(frozen=True)
class Groups:
    """The groups of one rank under one layout, by axis, and the recorder that they share."""

    layout: Layout
    rank: int
    cp: Group
    tp: Group
    ring: Group  # the two parts of cp in a hybrid
    ulysses: Group
    world: Group
    recorder: Recorder


class Mesh:
    """Makes and keeps the process groups of this process. All ranks must ask for layouts in the same order."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self._handles: dict[tuple[int, ...], object] = {}

    def groups(self, layout: Layout) -> Groups:
        """This rank's groups. The layout must use all ranks."""
        if layout.world_size != self.world_size:
            raise ValueError(f"layout {layout} has {layout.world_size} ranks, the world has {self.world_size}")
        recorder = Recorder()
        mine = {axis: self._join(axis, layout.groups(axis), recorder) for axis in (*AXES, *INNER_AXES)}
        world = ProcessGroup("world", range(self.world_size), self.rank, recorder, None)
        return Groups(layout, self.rank, **mine, world=world, recorder=recorder)

    def _join(self, axis: str, groups: tuple[tuple[int, ...], ...], recorder: Recorder) -> ProcessGroup:
        found = None
        for ranks in groups:
            if len(ranks) > 1 and ranks not in self._handles:
                whole = len(ranks) == self.world_size
                self._handles[ranks] = None if whole else new_process_group(ranks)
            if self.rank in ranks:
                found = ProcessGroup(axis, ranks, ranks.index(self.rank), recorder, self._handles.get(ranks))  # type: ignore[arg-type]
        assert found is not None, "the groups of an axis cover every rank"
        return found


def local_groups(layout: Layout, world: LocalWorld, rank: int) -> Groups:
    """The same groups on the local backend, where every rank is a thread of this process."""
    recorder = Recorder()
    axes = (*AXES, *INNER_AXES)
    mine = {axis: world.group(axis, ranks, ranks.index(rank), recorder) for axis in axes for ranks in layout.groups(axis) if rank in ranks}
    everyone = world.group("world", range(layout.world_size), rank, recorder)
    return Groups(layout, rank, **mine, world=everyone, recorder=recorder)
