"""Closed forms for the feed-forward block of a layer: what a rank computes, holds, gathers and sums there. Pure numbers, without torch.

What surrounds the block (gathers before it, sums after it) follows from sharding.py. The rest of a cell is in formulas.py.
"""

from __future__ import annotations

from math import prod

from cpbench.cell import Cell
from cpbench.distributed.traffic import Traffic
from cpbench.layout import Coordinates
from cpbench.sharding import DENSE_MLP, TokenRows, exchange


def parameters(cell: Cell, layer: int) -> int:
    """Parameters of the feed-forward block of a layer on one rank."""
    return 3 * cell.config.hidden * _columns(cell)


def flops(cell: Cell, step: TokenRows, place: Coordinates, layer: int) -> int:
    """Operations of the feed-forward block of a layer in one step."""
    return 6 * _rows(cell, step, place) * cell.config.hidden * _columns(cell)


def whole_flops(cell: Cell, tokens: int, layer: int) -> int:
    """Operations of the feed-forward block of a layer on all ranks together that share these tokens."""
    return 6 * tokens * cell.config.hidden * cell.config.intermediate


def traffic(cell: Cell, step: TokenRows, place: Coordinates, layer: int) -> Traffic:
    """What the feed-forward block of a layer receives in one step."""
    return block_traffic(cell, step, place, DENSE_MLP)


def block_traffic(cell: Cell, step: TokenRows, place: Coordinates, weights: tuple[str, ...]) -> Traffic:
    """What surrounds a block whose weights are cut over the axes `weights`: gathered rows, and sums."""
    mine, total = step.rows[place.dp][place.cp], Traffic()
    row = cell.config.hidden * cell.element_bytes
    plan = exchange(cell.layout, place, step, weights)
    for gather in plan.gathers:
        own = gather.rows[getattr(place, gather.axis)]
        total.add(gather.axis, "all_gather", (sum(gather.rows) - own) * row)
        total.add(gather.axis, "reduce_scatter", own * (len(gather.rows) - 1) * row)
    for axis, size in plan.sums if mine else ():
        total.add(axis, "all_reduce", 2 * mine * row * (size - 1) // size)
    return total


def live_bytes(cell: Cell, step: TokenRows, place: Coordinates, layer: int) -> int:
    """Alive at the largest moment of the feed-forward block, beside the residual: gathering, computing, or scattering its sums."""
    row, rows = cell.config.hidden * cell.element_bytes, _rows(cell, step, place)
    compute = rows * row + 2 * rows * _columns(cell) * cell.element_bytes
    gathers = exchange(cell.layout, place, step, DENSE_MLP).gathers
    moments, before = [compute], step.rows[place.dp][place.cp]
    for gather in gathers:
        moments.append((before + sum(gather.rows)) * row)  # normed rows, and those gathered
        moments.append((sum(gather.rows) + before * (1 + len(gather.rows))) * row)  # partial sums, what is received, its sum
        before = sum(gather.rows)
    return max(moments)


def _columns(cell: Cell) -> int:
    """Columns of the block on one rank."""
    return cell.config.intermediate // prod(cell.layout.size(axis) for axis in DENSE_MLP)


def _rows(cell: Cell, step: TokenRows, place: Coordinates) -> int:
    """Tokens that the block of a rank sees in a step: its own, or those gathered."""
    gathers = exchange(cell.layout, place, step, DENSE_MLP).gathers
    return sum(gathers[-1].rows) if gathers else step.rows[place.dp][place.cp]
