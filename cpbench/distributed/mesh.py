"""From a layout to the groups that a rank talks in. Which ranks those are is layout.py's decision; this module only makes them.

The axes of a layout are the dimensions of a `torch.distributed` DeviceMesh, and its groups are the mesh's. The mesh is made from groups
that exist: `init_device_mesh` would make all of them anew for every layout, but a process group is made once per distinct rank list here,
however many layouts and axes use it. An axis of one rank is no dimension of the mesh and costs nothing. Of the expert axes only ep talks by
itself; for the rest, experts use the attention axes or parts of them (sharding.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from cpbench.distributed.collectives import Group, ProcessGroup, Recorder, device_mesh, new_process_group
from cpbench.distributed.local import LocalWorld
from cpbench.distributed.null import NullGroup, Tape
from cpbench.layout import AXES, INNER_AXES, Coordinates, Layout
from cpbench.sharding import partial_groups

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
    ep: Group
    world: Group
    recorder: Recorder
    parts: dict[tuple[str, int], Group] = field(default_factory=dict)  # of so many neighbours on an axis

    @property
    def place(self) -> Coordinates:
        return self.layout.coordinates(self.rank)

    def along(self, axis: str, size: int | None = None) -> Group:
        """The group of an axis by its name, or of the `size` neighbours on it that this rank is one of."""
        if size is not None and size != self.layout.size(axis):
            return self.parts[axis, size]
        group: Group = getattr(self, axis)
        return group

    def several(self) -> list[Group]:
        """Every group of several ranks but the world, in an order that is the same on all ranks."""
        groups = [*(getattr(self, axis) for axis in GROUPED), *self.parts.values()]
        return [group for group in groups if group.size > 1]


GROUPED = tuple(one.name for one in fields(Groups) if one.name in (*AXES, *INNER_AXES, "ep"))


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
        if layout.ep > 1:
            handles["ep"] = self._handle(layout.groups("ep"))
        mine: dict[str, Group] = {}
        for axis in GROUPED:
            mine[axis] = self._group(axis, layout.groups(axis), recorder, handles.get(axis))
        parts = {(axis, size): self._group(axis, lists, recorder, self._handle(lists)) for axis, size, lists in partial_groups(layout)}
        world = ProcessGroup("world", range(self.world_size), self.rank, recorder, None)
        return Groups(layout, self.rank, **mine, world=world, recorder=recorder, parts=parts)

    def _group(self, axis: str, lists: tuple[tuple[int, ...], ...], recorder: Recorder, handle: Any) -> Group:
        ranks = next(ranks for ranks in lists if self.rank in ranks)
        return ProcessGroup(axis, ranks, ranks.index(self.rank), recorder, handle)

    def _handle(self, lists: tuple[tuple[int, ...], ...]) -> Any:
        """This rank's process group among those of some rank lists, which are made where there are none yet."""
        for ranks in lists:
            if ranks not in self._handles:
                self._handles[ranks] = new_process_group(ranks)
        return next(self._handles[ranks] for ranks in lists if self.rank in ranks)

    def _mesh_groups(self, layout: Layout, axes: tuple[str, ...]) -> dict[str, Any]:
        """This rank's process group of every axis with more than one rank: the groups of a DeviceMesh of these axes."""
        axes = tuple(axis for axis in axes if layout.size(axis) > 1)
        if not axes:
            return {}
        mine = [self._handle(layout.groups(axis)) for axis in axes]
        mesh = device_mesh(self._device_type, tuple(layout.size(axis) for axis in axes), axes, mine)
        return {axis: mesh.get_group(axis) for axis in axes}


def local_groups(layout: Layout, world: LocalWorld, rank: int) -> Groups:
    """The same groups on the local backend, where every rank is a thread of this process."""
    return _groups(layout, rank, world.group)


def null_groups(layout: Layout, rank: int, tape: Tape, is_nccl: bool) -> Groups:
    """The same groups on the null backend, where there is no other rank."""
    return _groups(layout, rank, lambda axis, ranks, place, recorder: NullGroup(axis, ranks, place, recorder, tape, is_nccl, layout.world_size))


def _groups(layout: Layout, rank: int, make: Callable[[str, Sequence[int], int, Recorder], Group]) -> Groups:
    """The groups of a rank, each made from its axis, its ranks, the place of this one among them, and the recorder."""
    recorder = Recorder()
    mine = {axis: make(axis, ranks, ranks.index(rank), recorder) for axis in GROUPED for ranks in layout.groups(axis) if rank in ranks}
    parts: dict[tuple[str, int], Group] = {
        (axis, size): make(axis, ranks, ranks.index(rank), recorder) for axis, size, lists in partial_groups(layout) for ranks in lists if rank in ranks
    }
    return Groups(layout, rank, **mine, world=make("world", range(layout.world_size), rank, recorder), recorder=recorder, parts=parts)
