"""How many rows the routers of all ranks gave to each expert in one pass, put together.

Every rank calls, under process groups or as a thread on the local backend. What follows for traffic is in formulas.py; which experts each
token got, and whether that is right, is decided in choices.py and numerics.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cpbench.cell import Cell
from cpbench.choices import Note
from cpbench.distributed.mesh import Groups
from cpbench.formulas import Sent, sparse_layers
from cpbench.sharding import dispatch_of, unit_of

Loads = tuple[tuple[tuple[int, ...], ...], ...]  # by rank, by step and sparse layer of its stage: rows that its router gave to each expert


def shared_loads(cell: Cell, notes: Sequence[Note], groups: Groups) -> Loads:
    """The loads that every rank noted; nothing without experts."""
    if cell.config.experts is None or not cell.has_experts:
        return ()
    count, layout = cell.config.experts.count, cell.layout
    most = max(len(sparse_layers(cell, layout.coordinates(layout.rank_of(pp=pp)))) for pp in range(layout.pp)) * len(cell.token_rows)
    mine = [float(rows) for note in notes for rows in note.loads]
    everyone = groups.world.share(mine + [-1.0] * (most * count - len(mine)))
    return tuple(tuple(_whole(row[first : first + count]) for first in range(0, len(row), count) if row[first] >= 0) for row in everyone)


def sent_rows(cell: Cell, loads: Loads) -> Sent:
    """How many rows go to each expert-parallel rank."""
    if cell.config.experts is None:
        return ()
    here = cell.config.experts.count // cell.layout.ep
    return tuple(tuple(_whole(sum(one[first : first + here]) for first in range(0, len(one), here)) for one in rank) for rank in loads)


def expert_loads(cell: Cell, loads: Loads) -> dict[str, Any]:
    """What a result says about the experts, over the sparse layers of a pass: rows of each expert and of each rank's experts, and the most
    uneven layer of both. Empty without experts."""
    if cell.config.experts is None or not loads:
        return {}
    layout, count = cell.layout, cell.config.experts.count
    here = count // layout.ep
    dispatch = dispatch_of(layout, cell.dispatch)
    experts, ranks, uneven = [0] * count, [0] * layout.world_size, [1.0, 1.0]
    for stage in layout.groups("stage"):
        firsts = _firsts(cell, stage)
        for number in range(len(loads[stage[0]])):
            layer = [sum(loads[rank][number][expert] for rank in firsts) for expert in range(count)]
            there = [_rows_here(cell, loads, rank, firsts, number, here) for rank in stage]
            experts = [one + more for one, more in zip(experts, layer, strict=True)]
            for rank, rows in zip(stage, there, strict=True):
                ranks[rank] += rows
            uneven = [max(worst, max(rows) * len(rows) / max(1, sum(rows))) for worst, rows in zip(uneven, (layer, there), strict=True)]
    return {"tokens_per_expert": experts, "tokens_per_rank": ranks, "max_over_mean_expert": uneven[0], "max_over_mean_rank": uneven[1], "dispatch": dispatch}


def _rows_here(cell: Cell, loads: Loads, rank: int, firsts: Sequence[int], number: int, here: int) -> int:
    """Rows that the experts of a rank compute in one layer of one step: from every unit of its copy of the experts."""
    place, layout = cell.layout.coordinates(rank), cell.layout
    mine = [first for first in firsts if layout.coordinates(first).moe_dp == place.moe_dp]
    return sum(sum(loads[first][number][place.ep * here : (place.ep + 1) * here]) for first in mine)


def most_pairs(cell: Cell, loads: Loads, rank: int) -> int | None:
    """Rows that the experts of a rank compute in the layer and step where they are most; None without experts."""
    if cell.config.experts is None or not loads or not loads[rank]:
        return None
    here, stage = cell.config.experts.count // cell.layout.ep, next(ranks for ranks in cell.layout.groups("stage") if rank in ranks)
    firsts = _firsts(cell, stage)
    return max(_rows_here(cell, loads, rank, firsts, number, here) for number in range(len(loads[rank])))


def _firsts(cell: Cell, stage: Sequence[int]) -> list[int]:
    """The first rank of every unit: all its ranks route the same rows."""
    layout, dispatch = cell.layout, dispatch_of(cell.layout, cell.dispatch)
    return [rank for rank in stage if rank % unit_of(layout, layout.coordinates(rank), dispatch).ranks == 0]


def _whole(values: object) -> tuple[int, ...]:
    return tuple(int(value) for value in values)  # type: ignore[attr-defined]
