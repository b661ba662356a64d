"""Which axes cut the weights of a block, which axes cut the tokens, and what must therefore be gathered before a block and summed after it.

A block whose weights are cut over ranks that hold different tokens must see those tokens gathered, else partial sums of different tokens
are added up. What to gather follows from the axes alone: those that cut both. How many ranks an axis has, or whether two groups happen to
be equally large, decides nothing. With sequence-parallel norms (`sp` in a layout) tp is such an axis: between blocks its ranks hold
different tokens, so what is an all-reduce without it becomes a gather before a block and a scattered sum after it. Pure data;
communicator.py executes it and formulas.py counts it.

Experts are divided by axes of their own, which cut the same ranks another way. Ranks that must see the same tokens at the experts form a
*unit*: where tokens are gathered, those that hold one copy of all experts together; where they are sent to their experts, those that hold
the same experts and cut their columns. A unit is neighbours on the attention axes, so the rule above holds for it too:

    dp2cp2tp2/ep4tp2, gather      one unit of 8: gather over cp, then dp; sums over tp
    dp2cp2tp2/ep4tp2, all-to-all  units of 2, which are the tensor-parallel groups: nothing is gathered; sums over tp
    cp2tp4/ep8, all-to-all        units of 1, four of which hold the same tokens: each takes a quarter of them
    cp2tp4sp/ep8, all-to-all      units of 1, each with its own tokens: rows stay scattered on their way to the experts
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from cpbench.experts import ALLTOALL, GATHER
from cpbench.layout import Coordinates, Layout
from cpbench.partition import cut

Axes = tuple[str, ...]
Spans = tuple[tuple[str, int], ...]  # axes, and over how many neighbours on each

ATTENTION: Axes = ("tp",)  # heads
DENSE_MLP: Axes = ("dp", "tp")  # columns: context-parallel ranks have the same weights, data-parallel ones share one copy, as in serving engines
VOCABULARY: Axes = ("tp",)
TOKEN_AXES: Axes = ("tp", "cp", "dp")  # innermost first: the tokens of a DP group come together before the groups do


@dataclass(frozen=True)
class TokenRows:
    """How many rows each rank of a stage attends with in one step: `rows[dp][cp]`.

    `replicated[dp]`: the context-parallel ranks of this group all hold the same tokens, so that cp does not cut them. `tp`: over how many
    tensor-parallel ranks these rows are cut between blocks, as evenly as they can be; 1: each holds all of them.
    """

    rows: tuple[tuple[int, ...], ...]
    replicated: tuple[bool, ...]
    tp: int = 1

    def attended(self, place: Coordinates) -> int:
        """Rows that a rank attends with."""
        return self.rows[place.dp][place.cp]

    def held(self, place: Coordinates) -> range:
        """Which of them it holds between blocks."""
        return self.piece(place.dp, place.cp, place.tp)

    def piece(self, dp: int, cp: int, tp: int) -> range:
        """The same of any rank."""
        return range(*cut(self.rows[dp][cp], self.tp)[tp]) if self.tp > 1 else range(self.rows[dp][cp])


@dataclass(frozen=True)
class Gather:
    """Rows come together along one axis: `rows` of each rank on it, or of as many neighbours, in rank order."""

    axis: str
    rows: tuple[int, ...]

    def own(self, place: Coordinates) -> int:
        """Rows of the rank at `place`, one of those that come together."""
        index: int = getattr(place, self.axis) % len(self.rows)
        return self.rows[index]


@dataclass(frozen=True)
class Exchange:
    """What surrounds a block on one rank: gathers before it, in this order; after it, sums that are scattered the same way back, and sums
    over the other axes that cut its weights."""

    gathers: tuple[Gather, ...]
    sums: Spans


@dataclass(frozen=True)
class Shard:
    """Part `rank` of `size` of a block's weights."""

    rank: int
    size: int


def shard_of(layout: Layout, place: Coordinates, weights: Axes) -> Shard:
    """The part of a block's weights that a rank has."""
    rank, size = 0, 1
    for axis in weights:
        rank, size = rank * layout.size(axis) + getattr(place, axis), size * layout.size(axis)
    return Shard(rank, size)


@dataclass(frozen=True)
class Unit:
    """The ranks that see the same tokens at the experts: how many there are, and how far they reach on the attention axes.

    `share`: which part of its tokens a rank's unit takes where several units hold the same ones. The results of all of them are summed
    over tp, so tp is in the spans as a whole.
    """

    ranks: int
    spans: Spans
    share: Shard
    alltoall: bool  # whether tokens travel between units

    def rows(self, count: int) -> range:
        """Of so many rows those that the unit takes."""
        return range(*cut(count, self.share.size)[self.share.rank])


def spans_of(layout: Layout, weights: Axes) -> Spans:
    """The whole axes."""
    return tuple((axis, layout.size(axis)) for axis in weights)


def common_spans(layout: Layout, tokens: TokenRows, unit: Unit) -> Spans:
    """What is gathered once for routed and shared experts, and scattered once: tp, where both start from the rows of a whole group of it."""
    tp = ("tp", layout.tp)
    return (tp,) if tokens.tp > 1 and tp in unit.spans else ()


def without(spans: Spans, common: Spans) -> Spans:
    """What is left to gather for one of them."""
    return tuple(span for span in spans if span not in common)


def exchange(layout: Layout, place: Coordinates, tokens: TokenRows, weights: Axes) -> Exchange:
    """What surrounds a block whose weights are cut over the axes `weights`, for a rank and one step."""
    return exchange_over(place, tokens, spans_of(layout, weights))


def exchange_over(place: Coordinates, tokens: TokenRows, spans: Spans) -> Exchange:
    """What surrounds a block whose weights are cut over some neighbours on each axis."""
    sizes = {axis: size for axis, size in spans if size > 1}
    gathers = []
    for axis in TOKEN_AXES:
        if axis in sizes and _cuts_tokens(axis, place, tokens):
            gathers.append(Gather(axis, _rows_along(axis, neighbours(place, axis, sizes[axis]), place, tokens, together="cp" in sizes)))
    return Exchange(tuple(gathers), tuple(span for span in sizes.items() if all(gather.axis != span[0] for gather in gathers)))


def _cuts_tokens(axis: str, place: Coordinates, tokens: TokenRows) -> bool:
    return tokens.tp > 1 if axis == "tp" else not (axis == "cp" and tokens.replicated[place.dp])


def neighbours(place: Coordinates, axis: str, size: int) -> range:
    """The places on an axis of the `size` neighbours that a rank is one of."""
    first = getattr(place, axis) // size * size
    return range(first, first + size)


def _rows_along(axis: str, along: range, place: Coordinates, tokens: TokenRows, together: bool) -> tuple[int, ...]:
    """Rows of some ranks on an axis; with `together` those of a DP group have been gathered when the groups are."""
    if axis == "tp":
        return tuple(len(tokens.piece(place.dp, place.cp, tp)) for tp in along)
    if axis == "cp":
        return tuple(tokens.rows[place.dp][cp] for cp in along)
    return tuple(sum(tokens.rows[dp]) if together and not tokens.replicated[dp] else tokens.rows[dp][place.cp] for dp in along)


def dispatch_of(layout: Layout, asked: str | None) -> str:
    """How tokens reach their experts: as asked, else sent to them where experts lie on several ranks and that is possible."""
    return asked or (ALLTOALL if layout.ep > 1 and unit_reach(layout, ALLTOALL) else GATHER)


@lru_cache(maxsize=1 << 14)
def unit_reach(layout: Layout, dispatch: str) -> tuple[int, int, int] | None:
    """Of a unit: how many neighbours on dp, cp and tp it has. None where it does not lie on whole groups of the inner axes.

    A unit is consecutive ranks. One that ends inside a tensor-parallel group and goes on in the next would see two kinds of tokens, and so
    would one that ends inside a row of context-parallel ranks.
    """
    ranks = layout.moe_tp * (layout.ep if dispatch == GATHER else 1)
    reach: dict[str, int] = {}
    for axis in ("tp", "cp", "dp"):
        size = layout.size(axis)
        reach[axis] = min(size, ranks)
        if max(size, ranks) % reach[axis]:
            return None
        ranks = max(1, ranks // size)
    return reach["dp"], reach["cp"], reach["tp"]


def unit_of(layout: Layout, place: Coordinates, dispatch: str) -> Unit:
    """The unit of a rank. The layout must have one (see `unit_reach`)."""
    reach = unit_reach(layout, dispatch)
    assert reach is not None, f"the experts of {layout} straddle its attention groups"
    dp, cp, tp = reach
    if layout.sp:  # every rank has tokens of its own
        return Unit(dp * cp * tp, (("dp", dp), ("cp", cp), ("tp", tp)), Shard(0, 1), dispatch == ALLTOALL and layout.ep > 1)
    return Unit(dp * cp * tp, (("dp", dp), ("cp", cp), ("tp", layout.tp)), Shard(place.tp // tp, layout.tp // tp), dispatch == ALLTOALL and layout.ep > 1)


def unit_pieces(unit: Unit, place: Coordinates, tokens: TokenRows) -> list[tuple[int, int, range]]:
    """(dp, cp, which of the rows there) that a unit sees, in the order in which they are gathered."""
    sizes = dict(unit.spans)
    found = []
    for dp in neighbours(place, "dp", sizes["dp"]):
        for cp in [place.cp] if tokens.replicated[dp] else neighbours(place, "cp", sizes["cp"]):
            pieces = [tokens.piece(dp, cp, tp) for tp in (neighbours(place, "tp", sizes["tp"]) if tokens.tp > 1 else [0])]
            found.append((dp, cp, range(pieces[0].start, pieces[-1].stop)))
    return found


def unit_rows(unit: Unit, place: Coordinates, tokens: TokenRows) -> int:
    """Rows that the experts of a unit are asked for, by the unit itself."""
    return len(unit.rows(sum(len(rows) for _, _, rows in unit_pieces(unit, place, tokens))))


def partial_groups(layout: Layout) -> Iterator[tuple[str, int, tuple[tuple[int, ...], ...]]]:
    """Axis, size and rank lists of the groups that are a part of an axis: where a unit reaches over some of its ranks only."""
    reaches = dict.fromkeys(reach for dispatch in (GATHER, ALLTOALL) if (reach := unit_reach(layout, dispatch)))
    for axis, size in dict.fromkeys(span for dp, cp, tp in reaches for span in (("dp", dp), ("cp", cp), *([("tp", tp)] if layout.sp else []))):
        if 1 < size < layout.size(axis):
            yield axis, size, tuple(ranks[first : first + size] for ranks in layout.groups(axis) for first in range(0, len(ranks), size))
