"""Closed forms for the feed-forward block of a layer: what a rank computes and holds there. Pure numbers, without torch.

What surrounds the block (gathers before it, sums after it) follows from sharding.py and is written out in transitions.py; the rest of a cell is
in formulas.py. How many rows an expert gets is the router's choice: where experts lie on several ranks, operations and memory are those of
equal loads.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil, prod

from cpbench.cell import Cell
from cpbench.distributed.traffic import summing_bytes
from cpbench.layout import Coordinates
from cpbench.models.config import Experts
from cpbench.quantisation import dense_matrices, expert_matrices, workspace
from cpbench.sharding import ATTENTION, DENSE_MLP, Spans, TokenRows, Unit, common_spans, dispatch_of, exchange, exchange_over, spans_of, unit_of, unit_rows

INDEX_BYTES = 8


def parameters(cell: Cell, layer: int) -> int:
    """Parameters of the feed-forward block of a layer on one rank."""
    hidden, experts, layout = cell.config.hidden, cell.config.experts, cell.layout
    if experts is None or not cell.config.is_sparse(layer):
        return 3 * hidden * _columns(cell, cell.config.intermediate)
    router = experts.count * hidden + (experts.count if experts.correction else 0)
    routed = experts.count // layout.ep * (experts.intermediate // layout.moe_tp)
    return router + 3 * hidden * (routed + _columns(cell, _shared(experts)))


def flops(cell: Cell, step: TokenRows, place: Coordinates, layer: int) -> int:
    """Operations of the feed-forward block of a layer in one step."""
    hidden, experts, rows = cell.config.hidden, cell.config.experts, _rows(cell, step, place)
    if experts is None or not cell.config.is_sparse(layer):
        return 6 * rows * hidden * _columns(cell, cell.config.intermediate)
    router = 2 * unit_rows(_unit(cell, place), place, step) * hidden * experts.count
    routed = 6 * _replica_rows(cell, step, place) * experts.top_k * hidden * (experts.intermediate // cell.layout.moe_tp) // cell.layout.ep
    return router + routed + 6 * rows * hidden * _columns(cell, _shared(experts))


def whole_flops(cell: Cell, rows: int, copies: int, layer: int) -> int:
    """Operations of the feed-forward block of a layer on all ranks that have some rows; each token is on `copies` context-parallel ranks.

    A token is routed by every rank of a unit. Of the copies of a token, a unit computes one.
    """
    hidden, experts = cell.config.hidden, cell.config.experts
    if experts is None or not cell.config.is_sparse(layer):
        return 6 * rows * hidden * cell.config.intermediate
    unit = _unit(cell, cell.layout.coordinates(0))
    seen = rows // min(copies, dict(unit.spans)["cp"])
    routed = seen * hidden * (2 * unit.ranks * experts.count + 6 * experts.top_k * experts.intermediate)
    return routed + 6 * rows * hidden * _shared(experts)


def live_bytes(cell: Cell, step: TokenRows, place: Coordinates, layer: int, pairs: int | None = None) -> int:
    """Alive at the largest moment of the feed-forward block, beside the residual: gathering, computing, or scattering its sums."""
    experts, size = cell.config.experts, cell.element_bytes
    if experts is None or not cell.config.is_sparse(layer):
        return _dense_bytes(cell, step, place, cell.config.intermediate)
    cell = replace(cell, sp_chunks=1)  # experts take their rows together
    unit, around = _unit(cell, place), 0
    if common_spans(cell.layout, step, unit):  # what follows begins with the rows of the tensor-parallel group
        around, step = surrounding_bytes(cell, step, place, ("tp",)), replace(step, tp=1)
    row, mine = cell.config.hidden * size, len(step.held(place))
    kept = mine * row if experts.shared else 0
    normed = mine * row if exchange(cell.layout, place, step, DENSE_MLP).gathers else 0
    moments = [normed + _dense_bytes(cell, step, place, _shared(experts))] if experts.shared else []
    moments += [kept + moment for moment in _around(cell, step, place, unit.spans)]
    return max(around, *moments, kept + _routed_bytes(cell, step, place, unit, pairs))


def surrounding_bytes(cell: Cell, step: TokenRows, place: Coordinates, weights: tuple[str, ...]) -> int:
    """Alive at the largest moment around a block whose weights are cut over the axes `weights`, beside the residual: gathering rows before it,
    or scattering its sums."""
    if weights == ATTENTION and cell.low_values:
        held, low = len(step.held(place)), cell.low_values * cell.element_bytes
        gather = 2 * held * low + max(held * cell.config.hidden * cell.element_bytes, step.attended(place) * low)
        return max(gather, *_around(cell, replace(step, tp=1), place, ()), *_around(cell, step, place, spans_of(cell.layout, weights))[2:])
    return max(_around(cell, step, place, spans_of(cell.layout, weights)))


def _routed_bytes(cell: Cell, step: TokenRows, place: Coordinates, unit: Unit, pairs: int | None) -> int:
    """Routing rows, computing their pairs with experts, and summing them: beside what a rank keeps for later."""
    experts = cell.config.experts
    assert experts is not None
    hidden, size = cell.config.hidden, cell.element_bytes
    row, wide, narrow = hidden * size, max(size, 4), size < 4
    rows, here = unit_rows(unit, place, step), experts.count // cell.layout.ep
    pairs = _replica_rows(cell, step, place) * experts.top_k // cell.layout.ep if pairs is None else pairs
    asked = rows * experts.top_k
    index = asked * (wide + 3 * INDEX_BYTES)  # weights, experts, and the order of the pairs
    scores = rows * experts.count * wide
    route = (rows + experts.count) * hidden * wide * narrow + scores
    choose = 3 * scores
    columns = experts.intermediate // cell.layout.moe_tp
    grouped = cell.device == "cuda" and cell.dtype == "bfloat16"
    together = pairs if grouped else -(-pairs // here)  # rows that go through a GEMM at once
    compute = index + pairs * row + together * (2 * columns * size + row) + workspace(cell, together, *expert_matrices(cell))
    moved = index + max(asked + pairs, 2 * pairs) * row if unit.alltoall else 0
    summed = index + (asked if unit.alltoall else pairs) * row * (3 if cell.deterministic else 1) + rows * hidden * wide + rows * row
    return rows * row + max(route, choose, compute, moved, summed)


def _dense_bytes(cell: Cell, step: TokenRows, place: Coordinates, width: int) -> int:
    """The largest moment of a dense block of some width."""
    row, rows = cell.config.hidden * cell.element_bytes, _rows(cell, step, place)
    columns = _columns(cell, width) * cell.element_bytes
    if in_pieces(cell, step, place, spans_of(cell.layout, DENSE_MLP)):
        piece, held = piece_rows(cell, rows), len(step.held(place)) * row
        work = workspace(cell, piece, *dense_matrices(cell, width))
        return held + rows * columns + max(2 * piece * (row + columns), piece * (columns + 4 * row)) + work
    compute = rows * row + 2 * rows * columns + workspace(cell, rows, *dense_matrices(cell, width))
    return max(compute, *_around(cell, step, place, spans_of(cell.layout, DENSE_MLP)))


def in_pieces(cell: Cell, step: TokenRows, place: Coordinates, spans: Spans) -> bool:
    """Whether the rows before a block are gathered over tp alone, and in pieces."""
    return cell.chunks_of_rows > 1 and [gather.axis for gather in exchange_over(place, step, spans).gathers] == ["tp"]


def piece_rows(cell: Cell, rows: int) -> int:
    """Rows of all ranks that come together at a time."""
    tp = cell.layout.tp
    return tp * ceil(ceil(rows / tp) / cell.chunks_of_rows)


def _around(cell: Cell, step: TokenRows, place: Coordinates, spans: Spans) -> list[int]:
    """Moments of the gathers before a block and of the sums after it; of its own rows where there are none."""
    row, before = cell.config.hidden * cell.element_bytes, len(step.held(place))
    if in_pieces(cell, step, place, spans):
        return [before * row + 2 * piece_rows(cell, sum(exchange_over(place, step, spans).gathers[0].rows)) * row]
    moments = [before * row]
    for gather in exchange_over(place, step, spans).gathers:
        moments.append((before + sum(gather.rows)) * row)  # normed rows, and those gathered
        moments.append((sum(gather.rows) + before) * row + summing_bytes(gather.rows, row, before))  # partial sums, their sum, what is received
        before = sum(gather.rows)
    if cell.deterministic:
        moments += [2 * before * row + ceil(before / size) * row for _, size in exchange_over(place, step, spans).sums]  # what is sent, and received
    return moments


def _shared(experts: Experts) -> int:
    """Columns of all shared experts together."""
    return experts.shared * experts.intermediate


def _columns(cell: Cell, width: int) -> int:
    """Columns of a dense block on one rank."""
    return width // prod(cell.layout.size(axis) for axis in DENSE_MLP)


def _rows(cell: Cell, step: TokenRows, place: Coordinates) -> int:
    """Tokens that a dense block of a rank sees in a step: its own, or those gathered."""
    gathers = exchange(cell.layout, place, step, DENSE_MLP).gathers
    return sum(gathers[-1].rows) if gathers else step.attended(place)


def _unit(cell: Cell, place: Coordinates) -> Unit:
    return unit_of(cell.layout, place, dispatch_of(cell.layout, cell.dispatch))


def _unit_rows(cell: Cell, step: TokenRows, place: Coordinates) -> list[int]:
    """Rows that each unit of a rank's expert-parallel group is asked for."""
    layout, found = cell.layout, []
    first = layout.rank_of(place.pp) + place.moe_dp * layout.ep * layout.moe_tp + place.moe_tp
    for ep in range(layout.ep):
        there = layout.coordinates(first + ep * layout.moe_tp)
        found.append(unit_rows(_unit(cell, there), there, step))
    return found


def _replica_rows(cell: Cell, step: TokenRows, place: Coordinates) -> int:
    """Rows that come to one copy of all experts: those of its only unit, or those that its units send each other."""
    unit = _unit(cell, place)
    return sum(_unit_rows(cell, step, place)) if unit.alltoall else unit_rows(unit, place, step)


def expected_rows(cell: Cell, step: TokenRows, place: Coordinates) -> int:
    """Rows that travel to a rank, to its experts and back, if all experts have equal loads."""
    assert cell.config.experts is not None
    rows, ep, top_k = _unit_rows(cell, step, place), cell.layout.ep, cell.config.experts.top_k
    return top_k * (sum(rows) - rows[place.ep] + (ep - 1) * rows[place.ep]) // ep
