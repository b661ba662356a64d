"""A parallel layout: how many ranks each axis has, its name, which rank sits where, and which ranks talk on which axis.

Pure data: no torch, no process group. Ranks are numbered with the last axis of AXES varying fastest, so the ranks of one
tensor-parallel group are neighbours (attention order CP > TP, as in SGLang and Megatron). What a *strategy* can do with a layout is
the strategy's business; this module only knows sizes and ranks.

A hybrid cuts the context-parallel axis in two: `cp8u4` is Ulysses over 4 neighbours inside a ring of 2, so context rank 5 is ring
place 1, Ulysses place 1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from math import prod

from cpbench.errors import CpbenchError

AXES = ("cp", "tp")  # outermost first
INNER_AXES = ("ring", "ulysses")  # the two parts of cp in a hybrid, outermost first
NAMES = {"cp": "cp", "u": "ulysses", "tp": "tp"}  # in the name of a layout, in this order
MAX_RANKS = 1024


@dataclass(frozen=True, order=True)
class Layout:
    """Sizes of the parallel axes. `str(layout)` is its canonical name and `Layout.parse` reads it back."""

    cp: int = 1
    tp: int = 1
    ulysses: int = 1  # neighbours of the cp axis that a hybrid exchanges heads over; the rest of cp is its ring

    def __post_init__(self) -> None:
        for name, field in NAMES.items():
            size = getattr(self, field)
            if not 1 <= size <= MAX_RANKS:
                near = min(max(size, 1), MAX_RANKS)
                raise CpbenchError(f"{name}={size} is not a size.", f"Axis sizes go from 1 to {MAX_RANKS}; the nearest is {name}={near}.")
        if self.cp % self.ulysses:
            near = nearest_divisor(self.ulysses, self.cp)
            raise CpbenchError(f"u={self.ulysses} does not divide cp={self.cp}.", f"The nearest valid value is u={near}.")
        if self.world_size > MAX_RANKS:
            raise CpbenchError(f"{self} has {self.world_size} ranks.", f"At most {MAX_RANKS} ranks are supported.")

    @property
    def sizes(self) -> dict[str, int]:
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def world_size(self) -> int:
        return prod(self.sizes.values())

    @property
    def ring(self) -> int:
        """Places of a hybrid's ring."""
        return self.cp // self.ulysses

    def __str__(self) -> str:
        named = [f"{name}{getattr(self, field)}" for name, field in NAMES.items() if getattr(self, field) > 1]
        return "".join(named) or "cp1"

    @classmethod
    def parse(cls, name: str) -> Layout:
        """Read `tp2cp4`: axes in any order, each at most once. Raises CpbenchError."""
        parts = re.findall(r"([a-z]+)(\d{1,6})", name)
        hint = f"Join axis names ({', '.join(NAMES)}) and sizes, for example cp4tp2 or cp8u4."
        if not parts or "".join(axis + size for axis, size in parts) != name:
            raise CpbenchError(f"{name[:40]!r} is not a layout.", hint)
        axes = [axis for axis, _ in parts]
        for axis in axes:
            if axis not in NAMES:
                raise CpbenchError(f"Layout {name!r} names the unknown axis {axis!r}.", hint)
            if axes.count(axis) > 1:
                raise CpbenchError(f"Layout {name!r} names the axis {axis!r} twice.", hint)
        return cls(**{NAMES[axis]: int(size) for axis, size in parts})

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a global rank sits on each axis. The last axis varies fastest."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside the {self.world_size} ranks of {self}")
        place: dict[str, int] = {}
        for axis in reversed(AXES):
            rank, place[axis] = divmod(rank, getattr(self, axis))
        return {axis: place[axis] for axis in AXES}

    def rank_of(self, **place: int) -> int:
        """The global rank at the given coordinates (axes that are not named are at 0)."""
        rank = 0
        for axis in AXES:
            rank = rank * getattr(self, axis) + place.get(axis, 0)
        return rank

    def groups(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """All rank lists of an axis or inner axis: ranks that differ in this coordinate only, in the order of the coordinate."""
        if axis in INNER_AXES:
            return tuple(part for ranks in self.groups("cp") for part in self._inner(axis, ranks))
        others = [range(size) for name, size in self.sizes.items() if name != axis]
        names = [name for name in AXES if name != axis]
        return tuple(
            tuple(self.rank_of(**dict(zip(names, place, strict=True)), **{axis: index}) for index in range(getattr(self, axis))) for place in product(*others)
        )

    def _inner(self, axis: str, ranks: tuple[int, ...]) -> list[tuple[int, ...]]:
        """A context-parallel group cut into its Ulysses groups (neighbours) or its rings (every `ulysses`-th rank)."""
        if axis == "ulysses":
            return [ranks[first : first + self.ulysses] for first in range(0, self.cp, self.ulysses)]
        return [ranks[place :: self.ulysses] for place in range(self.ulysses)]


def nearest_divisor(size: int, of: int) -> int:
    """The divisor of `of` nearest to `size` (the smaller one where two are as near)."""
    return min((n for n in range(1, of + 1) if of % n == 0), key=lambda n: (abs(n - size), n))
