"""From a layout to the groups that a rank talks in. Which ranks those are is layout.py's decision; this module only makes them.

The axes of a layout are the dimensions of a `torch.distributed` DeviceMesh, and its groups are the mesh's. The mesh is made from groups
that exist: `init_device_mesh` would make all of them anew for every layout, but a process group is made once per distinct rank list here,
however many layouts and axes use it. An axis of one rank is no dimension of the mesh and costs nothing. Expert axes get their groups with
the blocks that talk over them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from cpbench.distributed.collectives import Group, LocalWorld, ProcessGroup, Recorder, device_mesh, new_process_group
from cpbench.layout import AXES, INNER_AXES, Coordinates, Layout

HYBRID_AXES = (*AXES[:2], *INNER_AXES, *AXES[3:])  # cp in its two parts


@dataclass(frozen=True)
class Groups:
    """The groups of one rank under one layout, by axis, and the recorder that they share."""

    layout: Layout
    rank: int
    pp: Group
    dp: Group
    cp: Group
    tp: Group
    ring: Group  # the two parts of cp in a hybrid
    ulysses: Group
    world: Group
    recorder: Recorder

    @property
    def place(self) -> Coordinates:
        return self.layout.coordinates(self.rank)

    def along(self, axis: str) -> Group:
        """The group of an axis by its name."""
        group: Group = getattr(self, axis)
        return group


GROUPED = tuple(field.name for field in fields(Groups) if field.name in (*AXES, *INNER_AXES))


class Mesh:
    """Makes and keeps the process groups of this process. All ranks must ask for layouts in the same order."""

    def __init__(self, rank: int, world_size: int, device_type: str) -> None:
        self.rank = rank
        self.world_size = world_size
        self._device_type = device_type
        self._handles: dict[tuple[int, ...], Any] = {}

    def groups(self, layout: Layout) -> Groups:
        """This rank's groups. The layout must use all ranks."""
        if layout.world_size != self.world_size:
            raise ValueError(f"layout {layout} has {layout.world_size} ranks, the world has {self.world_size}")
        recorder = Recorder()
        handles = {**self._mesh_groups(layout, AXES), **(self._mesh_groups(layout, HYBRID_AXES) if layout.ulysses > 1 else {})}
        mine: dict[str, Group] = {}
        for axis in GROUPED:
            ranks = next(ranks for ranks in layout.groups(axis) if self.rank in ranks)
            mine[axis] = ProcessGroup(axis, ranks, ranks.index(self.rank), recorder, handles.get(axis))
        world = ProcessGroup("world", range(self.world_size), self.rank, recorder, None)
        return Groups(layout, self.rank, **mine, world=world, recorder=recorder)

    def _mesh_groups(self, layout: Layout, axes: tuple[str, ...]) -> dict[str, Any]:
        """This rank's process group of every axis with more than one rank: the groups of a DeviceMesh of these axes."""
        axes = tuple(axis for axis in axes if layout.size(axis) > 1)
        if not axes:
            return {}
        mine = []
        for axis in axes:
            for ranks in layout.groups(axis):
                if ranks not in self._handles:
                    self._handles[ranks] = new_process_group(ranks)
                if self.rank in ranks:
                    mine.append(self._handles[ranks])
        mesh = device_mesh(self._device_type, tuple(layout.size(axis) for axis in axes), axes, mine)
        return {axis: mesh.get_group(axis) for axis in axes}


def local_groups(layout: Layout, world: LocalWorld, rank: int) -> Groups:
    """The same groups on the local backend, where every rank is a thread of this process."""
    recorder = Recorder()
    mine = {axis: world.group(axis, ranks, ranks.index(rank), recorder) for axis in GROUPED for ranks in layout.groups(axis) if rank in ranks}
    everyone = world.group("world", range(layout.world_size), rank, recorder)
    return Groups(layout, rank, **mine, world=everyone, recorder=recorder)
