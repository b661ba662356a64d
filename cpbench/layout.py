"""A parallel layout: how many ranks each axis has, its name, which rank sits where, and which ranks talk on which axis.

Pure data: no torch, no process group. Ranks are numbered with the last axis varying fastest, pipeline stages outermost. The ranks of a
stage are divided twice, each time into all of them: for attention as DP > CP > TP, and for experts as DP > EP > TP (SGLang PR 17213,
whose tp_size is the ranks of a stage here). What a model, a strategy or an engine can do with a layout is not decided here.

    pp2dp2cp4tp2/ep8tp2    2 stages of 16 ranks; attention 2 x 4 x 2; experts over 8, each cut in 2

With `sp` behind tp, as in `cp2tp4sp`, the rows between blocks are cut over the tensor-parallel ranks too (sequence-parallel norms).

A hybrid cuts the context-parallel axis in two: `cp8u4` is Ulysses over 4 neighbours inside a ring of 2, so context rank 5 is ring
place 1, Ulysses place 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from math import log, prod

from cpbench.errors import CpbenchError

AXES = ("pp", "dp", "cp", "tp")  # outermost first
INNER_AXES = ("ring", "ulysses")  # the two parts of cp in a hybrid, outermost first
MOE_AXES = ("moe_dp", "ep", "moe_tp")  # the ranks of a stage once more, outermost first
NAMES = {"pp": "pp", "dp": "dp", "cp": "cp", "u": "ulysses", "tp": "tp"}  # in the name of a layout, in this order
MOE_NAMES = {"dp": "moe_dp", "ep": "ep", "tp": "moe_tp"}  # behind its slash
SP = re.compile(r"(?<=[0-9])sp(?![0-9])")  # behind the size of an axis
MAX_RANKS = 1024
HINT = f"Join axis names ({', '.join(NAMES)}) and sizes, for example cp4tp2, cp8u4, tp4sp or cp2tp4/ep4tp2."


@dataclass(frozen=True)
class Coordinates:
    """Where a rank sits: its pipeline stage, and its place in the stage by attention axes and by expert axes."""

    pp: int
    dp: int
    cp: int
    tp: int
    moe_dp: int
    ep: int
    moe_tp: int


@dataclass(frozen=True, order=True)
class Layout:
    """Sizes of the parallel axes. `str(layout)` is its canonical name and `Layout.parse` reads it back.

    `moe_tp` may be left out: the experts are then cut over all ranks that the other expert axes leave. Raises CpbenchError where the
    sizes do not multiply to the same number of ranks.
    """

    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ulysses: int = 1  # neighbours of the cp axis that a hybrid exchanges heads over; the rest of cp is its ring
    moe_dp: int = 1
    ep: int = 1
    moe_tp: int = 0  # 0: the rest of the stage
    sp: bool = False  # rows between blocks are cut over tp

    def __post_init__(self) -> None:
        for name, field in NAMES.items():
            _require_size(name, getattr(self, field))
        for name, field in MOE_NAMES.items():
            if field != "moe_tp" or self.moe_tp:
                _require_size(f"/{name}", getattr(self, field))
        if self.sp and self.tp == 1:
            plain = replace(self, sp=False)
            raise CpbenchError(
                f"sp in {self._attention_name} cuts rows over tp, and tp is 1.", f"The nearest valid layouts are {plain} and {replace(self, tp=2)}."
            )
        if self.cp % self.ulysses:
            near = nearest_divisor(self.ulysses, self.cp)
            raise CpbenchError(f"u={self.ulysses} does not divide cp={self.cp}.", f"The nearest valid value is u={near}.")
        if self.world_size > MAX_RANKS:
            raise CpbenchError(f"{self._attention_name} has {self.world_size} ranks.", f"At most {MAX_RANKS} ranks are supported.")
        if self.moe_tp == 0 and self.stage_size % (self.moe_dp * self.ep) == 0:
            object.__setattr__(self, "moe_tp", self.stage_size // (self.moe_dp * self.ep))
        if self.moe_dp * self.ep * self.moe_tp != self.stage_size:
            raise self._unequal_products()

    def _unequal_products(self) -> CpbenchError:
        sizes = {name: getattr(self, field) for name, field in MOE_NAMES.items()}
        asked = "".join(f"{name}{size}" for name, size in sizes.items() if size > 1) or "tp1"
        ranks = self.moe_dp * self.ep * max(1, self.moe_tp)
        rest = f"the expert axes /{asked} are {ranks} {_ranks(ranks)}" if self.moe_tp else f"the expert axes /{asked} do not divide them"
        near = min(_splits(self.stage_size, 3), key=lambda found: (_distance(found, (self.moe_dp, self.ep, self.moe_tp)), found))
        stage = "A stage of " if self.pp > 1 else ""
        nearest = replace(self, moe_dp=near[0], ep=near[1], moe_tp=near[2])
        size = self.stage_size
        return CpbenchError(f"{stage}{self._attention_name} has {size} {_ranks(size)}, and {rest}.", f"The nearest valid layout is {nearest}.")

    @property
    def sizes(self) -> dict[str, int]:
        """Of the attention axes, outermost first."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def world_size(self) -> int:
        return self.pp * self.stage_size

    @property
    def stage_size(self) -> int:
        """Ranks of a pipeline stage."""
        return self.dp * self.cp * self.tp

    @property
    def ring(self) -> int:
        """Places of a hybrid's ring."""
        return self.cp // self.ulysses

    @property
    def divides_experts(self) -> bool:
        """Whether experts are divided otherwise than over all ranks of a stage with tensor parallelism, as they are by default."""
        return self.moe_tp != self.stage_size

    @property
    def _attention_name(self) -> str:
        axes = "".join(f"{name}{getattr(self, field)}" for name, field in NAMES.items() if getattr(self, field) > 1)
        return (axes or "cp1") + ("sp" if self.sp else "")

    def __str__(self) -> str:
        if not self.divides_experts:
            return self._attention_name
        return f"{self._attention_name}/" + "".join(f"{name}{getattr(self, field)}" for name, field in MOE_NAMES.items() if getattr(self, field) > 1)

    @classmethod
    def parse(cls, name: str) -> Layout:
        """Read `cp4tp2sp` or `cp2tp4/ep4tp2`: axes in any order, each at most once, sp behind tp. Raises CpbenchError."""
        return _parsed(name)

    def size(self, axis: str) -> int:
        """Ranks along any axis, inner axis or expert axis."""
        found: int = getattr(self, axis)
        return found

    def stride(self, axis: str) -> int:
        """How far apart in global ranks two neighbours on an axis are."""
        order = (*AXES[:2], *INNER_AXES, *AXES[3:]) if axis in INNER_AXES else ("pp", *MOE_AXES) if axis in MOE_AXES else AXES
        return prod(self.size(inner) for inner in order[order.index(axis) + 1 :])

    def axes_between(self, node: int) -> tuple[str, ...]:
        """Attention axes, and ep, that have neighbours on different nodes of `node` ranks each. tp is the innermost, so it is inside where it fits."""
        axes = [axis for axis in (*AXES, "ep") if self.size(axis) > 1]
        return tuple(axis for axis in axes if any(len({rank // node for rank in ranks}) > 1 for ranks in self.groups(axis)))

    def coordinates(self, rank: int) -> Coordinates:
        """Where a global rank sits. Raises ValueError for a rank that the layout does not have."""
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside the {self.world_size} ranks of {self}")
        return Coordinates(**{axis: rank // self.stride(axis) % self.size(axis) for axis in (*AXES, *MOE_AXES)})

    def rank_of(self, pp: int = 0, dp: int = 0, cp: int = 0, tp: int = 0) -> int:
        """The global rank at these coordinates."""
        return ((pp * self.dp + dp) * self.cp + cp) * self.tp + tp

    def groups(self, *axes: str) -> tuple[tuple[int, ...], ...]:
        """All rank lists of an axis, inner axis or expert axis, or of several together: ranks that differ in these coordinates only.

        A list is in the order of the coordinates, the lists are in the order of their first rank. "stage" is a pipeline stage.
        """
        return _groups(self.world_size, tuple((self.stride(axis), self.size(axis)) for axis in (AXES[1:] if axes == ("stage",) else axes)))


@lru_cache(maxsize=1 << 14)
def _parsed(name: str) -> Layout:
    attention, slash, experts = name.partition("/")
    axes = SP.sub("", attention, count=1)
    sizes = _parse(axes, name, NAMES)
    if not slash:
        return Layout(**sizes, sp=axes != attention)
    expert_sizes = {"moe_tp": 1, **_parse(experts, name, MOE_NAMES)}
    _require_size("/tp", expert_sizes["moe_tp"])  # in a name, 0 is not the rest of the stage
    return Layout(**sizes, **expert_sizes, sp=axes != attention)


@lru_cache(maxsize=4096)
def _groups(world_size: int, axes: tuple[tuple[int, int], ...]) -> tuple[tuple[int, ...], ...]:
    """Rank lists of axes given as (stride, size)."""
    offsets = [sum(place * stride for place, (stride, _) in zip(places, axes, strict=True)) for places in product(*(range(size) for _, size in axes))]
    firsts = (rank for rank in range(world_size) if all(rank // stride % size == 0 for stride, size in axes))
    return tuple(tuple(first + offset for offset in offsets) for first in firsts)


def _require_size(name: str, size: int) -> None:
    if not 1 <= size <= MAX_RANKS:
        near = min(max(size, 1), MAX_RANKS)
        raise CpbenchError(f"{name}={size} is not a size.", f"Axis sizes go from 1 to {MAX_RANKS}; the nearest is {name}={near}.")


def _parse(text: str, name: str, axes: dict[str, str]) -> dict[str, int]:
    """Sizes by field from one side of a name. Raises CpbenchError."""
    parts = re.findall(r"([a-z]+)([0-9]{1,6})", text)
    if not parts or "".join(axis + size for axis, size in parts) != text:
        raise CpbenchError(f"{name[:40]!r} is not a layout.", HINT)
    found = [axis for axis, _ in parts]
    for axis in found:
        if axis not in axes:
            where = "in front of" if axes is NAMES else "behind"
            hint = HINT if axis not in (*NAMES, *MOE_NAMES) else f"The axes {where} the slash are {', '.join(axes)}; for example cp2tp4/ep4tp2."
            raise CpbenchError(f"Layout {name[:40]!r} names the unknown axis {axis[:20]!r}.", hint)
        if found.count(axis) > 1:
            raise CpbenchError(f"Layout {name[:40]!r} names the axis {axis!r} twice.", HINT)
    return {axes[axis]: int(size) for axis, size in parts}


def all_layouts(ranks: int, experts: bool = False) -> Iterator[Layout]:
    """Every layout of so many ranks, those that differ only in expert axes too if there are `experts`. The degrees of hybrids are 1."""
    for pp, dp, cp, tp in _splits(ranks, 4):
        for moe_dp, ep, moe_tp in _splits(dp * cp * tp, 3) if experts else [(1, 1, 0)]:
            yield Layout(pp, dp, cp, tp, 1, moe_dp, ep, moe_tp)


def engine_notes(layout: Layout) -> list[str]:
    """What a serving engine forbids for its own reasons, where this layout does it; cpbench runs it all the same. From SGLang's sources."""
    notes = []
    if layout.pp > 1 and layout.cp > 1:
        notes.append("SGLang 0.5.9 needs pp=1 with cp > 1; 0.5.12 and later do not.")
    if layout.pp > 1 and layout.moe_dp > 1:
        notes.append("SGLang needs pp=1 where the experts are data-parallel (/dp > 1).")
    if layout.ep > 1 and layout.moe_tp > 1:
        notes.append("SGLang needs ep x moe_dp to be all ranks of a stage where ep > 1: it does not cut an expert (/tp > 1) then.")
    if layout.moe_dp not in (1, layout.cp):
        notes.append("SGLang 0.5.12 and later need moe_dp = 1 or moe_dp = cp.")
    return notes


def nearest_divisor(size: int, of: int) -> int:
    """The divisor of `of` nearest to `size` (the smaller one where two are as near)."""
    return min(divisors(of), key=lambda n: (abs(n - size), n))


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


@lru_cache(maxsize=1024)
def _splits(number: int, parts: int) -> tuple[tuple[int, ...], ...]:
    """Every way to write a number as an ordered product of so many factors."""
    if parts == 1:
        return ((number,),)
    return tuple((first, *rest) for first in divisors(number) for rest in _splits(number // first, parts - 1))


def _distance(sizes: tuple[int, ...], asked: tuple[int, ...]) -> float:
    """How far sizes are from those asked for, in doublings; a size of 0 was not asked for."""
    return sum(abs(log(size / wanted, 2)) for size, wanted in zip(sizes, asked, strict=True) if wanted)


def _ranks(count: int) -> str:
    return "rank" if count == 1 else "ranks"
