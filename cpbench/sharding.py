"""Which axes cut the weights of a block, which axes cut the tokens, and what must therefore be gathered before a block and summed after it.

A block whose weights are cut over ranks that hold different tokens must see those tokens gathered, else partial sums of different tokens
are added up. What to gather follows from the axes alone: those that cut both. How many ranks an axis has, or whether two groups happen to
be equally large, decides nothing. Pure data; communicator.py executes it and formulas.py counts it.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpbench.layout import Coordinates, Layout

Axes = tuple[str, ...]

ATTENTION: Axes = ("tp",)  # heads
DENSE_MLP: Axes = ("dp", "tp")  # columns: context-parallel ranks have the same weights, data-parallel ones share one copy, as in serving engines
VOCABULARY: Axes = ("tp",)
TOKEN_AXES: Axes = ("cp", "dp")  # innermost first: the tokens of a DP group come together before the groups do


@dataclass(frozen=True)
class TokenRows:
    """How many rows each rank of a stage has in one step: `rows[dp][cp]`.

    `replicated[dp]`: the context-parallel ranks of this group all hold the same tokens, so that cp does not cut them.
    """

    rows: tuple[tuple[int, ...], ...]
    replicated: tuple[bool, ...]


@dataclass(frozen=True)
class Gather:
    """Rows come together along one axis: `rows` of each rank on it, in rank order."""

    axis: str
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Exchange:
    """What surrounds a block on one rank: gathers before it, in this order; after it, sums that are scattered the same way back, and sums
    over the other axes that cut its weights."""

    gathers: tuple[Gather, ...]
    sums: Axes


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


def exchange(layout: Layout, place: Coordinates, tokens: TokenRows, weights: Axes) -> Exchange:
    """What surrounds a block whose weights are cut over the axes `weights`, for a rank and one step."""
    cut = [axis for axis in weights if layout.size(axis) > 1]
    gathers = []
    for axis in TOKEN_AXES:
        if axis in cut and not (axis == "cp" and tokens.replicated[place.dp]):
            gathers.append(Gather(axis, _rows_along(axis, place, tokens, together="cp" in cut)))
    return Exchange(tuple(gathers), tuple(axis for axis in cut if all(gather.axis != axis for gather in gathers)))


def _rows_along(axis: str, place: Coordinates, tokens: TokenRows, together: bool) -> tuple[int, ...]:
    """Rows of each rank on an axis; with `together` those of a DP group have been gathered when the groups are."""
    if axis == "cp":
        return tokens.rows[place.dp]
    whole = [sum(rows) if together and not same else rows[place.cp] for rows, same in zip(tokens.rows, tokens.replicated, strict=True)]
    return tuple(whole)
