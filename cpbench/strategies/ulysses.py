"""Ulysses: all-to-all from token shards to head shards, dense attention over the whole sequence, all-to-all back (arXiv 2309.14509).

Rows are packed by destination: the query heads of one rank, and the kv heads that those need. With fewer kv heads than ranks, a kv
head is sent to every rank that has one of its query heads, and to no other. With the contiguous partition the received rows are the
packed batch in order, so nothing is reordered; other partitions are restored by one index copy on each side.

    cp=4, 8 query heads, 2 kv heads     rank 0: q 0 1, kv 0     rank 1: q 2 3, kv 0     rank 2: q 4 5, kv 1     rank 3: q 6 7, kv 1

q and K|V travel as two collectives because K|V is what a rank keeps: all tokens of its kv heads, cached ones before the new ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import TYPE_CHECKING

from cpbench.cell import Cell
from cpbench.distributed.traffic import Traffic
from cpbench.layout import nearest_divisor
from cpbench.segments import PlacedBlock, Segment, causal_segments, place
from cpbench.strategies.base import AttentionMemory, Context, Strategy, calls_memory, laid_out, row_index
from cpbench.tracing.spans import moving

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cpbench.distributed.collectives import Group
    from cpbench.strategies.base import OpenRows

TO_HEADS, TO_TOKENS = moving("to_heads"), moving("to_tokens")


@dataclass(frozen=True)
class HeadShards:
    """Heads per rank, and for each rank which kv heads its query heads need, one entry per local kv head."""

    q_heads: int
    kv_heads: int
    kv_sources: tuple[tuple[int, ...], ...]


def head_shards(heads: int, kv_heads: int, degree: int) -> HeadShards:
    """Cut query heads over `degree` ranks. A rank gets one kv head per run of its query heads that shares one, all runs equal."""
    q_heads, group = heads // degree, heads // kv_heads
    run = gcd(q_heads, group)  # query heads that share a kv head on a rank, the same number for each
    sources = tuple(tuple((rank * q_heads + first) // group for first in range(0, q_heads, run)) for rank in range(degree))
    return HeadShards(q_heads, q_heads // run, sources)


def undivided_heads(cell: Cell, axis: str, degree: int) -> str | None:
    """Why the query heads of a tensor-parallel rank cannot be cut over `degree` ranks of an axis, with the nearest degree; None if they can."""
    if cell.heads % degree == 0:
        return None
    near = nearest_divisor(degree, cell.heads)
    return f"{cell.heads} query heads per tensor-parallel rank do not divide over {axis}={degree}; the nearest degree is {axis}={near}"


@lru_cache(maxsize=2)
def _order_index(order: tuple[range, ...], device: torch.device) -> Tensor:
    """The order as an index tensor. Kept, because every layer needs it on the way there and on the way back."""
    return row_index(order, device)


@dataclass(frozen=True)
class Exchange:
    """One all-to-all between token shards and head shards: rows of each rank of the group, heads of each, cached rows before the new."""

    rows: tuple[int, ...]
    shards: HeadShards
    cached_rows: int
    order: tuple[range, ...] | None = None  # place of each received row; None: received in order

    def to_heads(self, q_nHD: Tensor, rows_nW: Tensor, context: Context, group: Group, layer: int) -> tuple[Tensor, Tensor]:
        """q [N, H/c, D] and rows [cached + N, W'] of this rank's heads, for the tokens of all ranks of the group."""
        (n, _, dim), total, shards, shape = q_nHD.shape, sum(self.rows), self.shards, context.shape
        width = shards.kv_heads * shape.part_values
        get = context.buffers.get
        q_send = get("comm_q_send", (group.size, n, shards.q_heads, dim), q_nHD)
        kv_send = get("comm_kv_send", (group.size, n, width), q_nHD)
        for rank, sources in enumerate(shards.kv_sources):
            first = 0
            for columns in shape.columns(sources):
                last = first + columns.stop - columns.start
                kv_send[rank, :, first:last].copy_(rows_nW[:, columns])
                first = last
        kv_all = context.cache.get(layer, (self.cached_rows + total, width), q_nHD)
        kv_new = kv_all[self.cached_rows :] if self.order is None else get("comm_kv", (total, width), q_nHD)
        q_new = get("comm_q", (total, shards.q_heads, dim), q_nHD)
        sends = [n] * group.size
        kv_in_flight = group.all_to_all(kv_new, kv_send.flatten(0, 1), self.rows, sends)
        q_send.copy_(q_nHD.view(n, group.size, shards.q_heads, dim).transpose(0, 1))
        q_in_flight = group.all_to_all(q_new, q_send.flatten(0, 1), self.rows, sends)
        if self.cached_rows:
            context.cache.read(layer, kv_all[: self.cached_rows])
        kv_in_flight.wait()
        q_in_flight.wait()
        if self.order is not None:
            index = _order_index(self.order, q_nHD.device)
            kv_all[self.cached_rows :].index_copy_(0, index, kv_new)
            q_new = get("comm_q_order", tuple(q_new.shape), q_nHD).index_copy_(0, index, q_new)
        context.cache.write(layer, kv_all)
        return q_new, kv_all

    def to_tokens(self, out_NhE: Tensor, context: Context, group: Group) -> Tensor:
        """Every head of this rank's tokens: [n, H, E]. Received by source rank, that is by head shard."""
        if self.order is not None:
            out_NhE = out_NhE.index_select(0, _order_index(self.order, out_NhE.device))
        size, n = group.size, self.rows[group.rank]
        by_source = context.buffers.get("comm_out", (size, n, *out_NhE.shape[1:]), out_NhE)
        group.all_to_all(by_source.flatten(0, 1), out_NhE.contiguous(), [n] * size, self.rows).wait()
        return by_source.transpose(0, 1).flatten(1, 2)

    def heads(self, place_here: int) -> range:
        """The query heads of one rank of the group, among those of its tensor-parallel rank."""
        return range(place_here * self.shards.q_heads, (place_here + 1) * self.shards.q_heads)

    def traffic(self, cell: Cell, place_here: int, axis: str) -> Traffic:
        """What one rank of the group receives: K|V, q, and the output back."""
        traffic, shape, size = Traffic(), cell.shape, cell.element_bytes
        here = self.rows[place_here]
        others = sum(self.rows) - here
        traffic.add(axis, "all_to_all", others * self.shards.kv_heads * shape.part_values * size)
        traffic.add(axis, "all_to_all", others * self.shards.q_heads * shape.qk_dim * size)
        traffic.add(axis, "all_to_all", here * (len(self.rows) - 1) * self.shards.q_heads * shape.v_dim * size)
        return traffic

    def memory(self, cell: Cell, place_here: int) -> tuple[int, int, int, int]:
        """Bytes of the kept rows, of the reused buffers, of the output of all tokens, and of the output of this rank's tokens."""
        shape, size, total, element = cell.shape, len(self.rows), sum(self.rows), cell.element_bytes
        n, q, out, kv = (
            self.rows[place_here],
            self.shards.q_heads * shape.qk_dim * element,
            self.shards.q_heads * shape.v_dim * element,
            self.shards.kv_heads * shape.part_values * element,
        )
        buffers = n * size * (q + kv) + total * q + n * size * out + (total * (q + kv) if self.order is not None else 0)
        own = n * size * out if self.shards.q_heads > 1 else 0  # with one head per rank the received output is used where it lies
        return (self.cached_rows + total) * kv, buffers, total * out, own


@dataclass(frozen=True)
class UlyssesPlan:
    """The exchange, and dense causal attention over the whole batch."""

    exchange: Exchange
    segments: tuple[Segment, ...]


class Ulysses(Strategy):
    name = "ulysses"
    summary = "all-to-all to head shards, dense attention over the whole sequence, all-to-all back"
    partitions = ("contiguous", "zigzag", "interleave")

    def check(self, cell: Cell) -> str | None:
        return undivided_heads(cell, "cp", cell.layout.cp) or super().check(cell)

    def cache_heads(self, cell: Cell, rank: int) -> tuple[tuple[int, ...], ...]:
        return (head_shards(cell.heads, cell.kv_heads, cell.layout.cp).kv_sources[rank],)

    def stored(self, cell: Cell, rank: int) -> list[PlacedBlock]:
        return place(cell.split.whole, sum(block.rows for block in self.cached(cell, rank)))

    def plan(self, cell: Cell, rank: int) -> UlyssesPlan:
        split, cp = cell.split, cell.layout.cp
        cached = self.cached(cell, rank)
        order = None if cell.partition == "contiguous" else tuple(r for source in range(cp) for r in split.tokens(source))
        rows = tuple(split.rows(source) for source in range(cp))
        exchange = Exchange(rows, head_shards(cell.heads, cell.kv_heads, cp), sum(block.rows for block in cached), order)
        return UlyssesPlan(exchange, causal_segments(place(split.whole), laid_out(cached, split.whole)))

    def attend(self, q_THD: Tensor, rows_SW: Tensor, open_rows: OpenRows, plan: UlyssesPlan, context: Context, layer: int) -> Tensor:
        from cpbench.kernels.accumulate import Accumulator

        group, exchange = context.group, plan.exchange
        with TO_HEADS():
            q_all, kv_all = exchange.to_heads(q_THD, rows_SW, context, group, layer)
        result = Accumulator(q_all.shape[0], context.buffers)
        context.attend(q_all, *open_rows(kv_all, exchange.heads(group.rank)), plan.segments, result)
        out_THE = result.result()
        with TO_TOKENS():
            return exchange.to_tokens(out_THE, context, group)

    def traffic(self, cell: Cell, rank: int) -> Traffic:
        return self.plan(cell, rank).exchange.traffic(cell, rank, "cp")

    def attended_heads(self, cell: Cell) -> int:
        return cell.heads // cell.layout.cp

    def score_pairs(self, cell: Cell, rank: int) -> int:
        return sum(block.causal_pairs for block in cell.split.whole) * (cell.heads // cell.layout.cp)

    def memory(self, cell: Cell, rank: int) -> AttentionMemory:
        plan = self.plan(cell, rank)
        shards = plan.exchange.shards
        kept, exchanged, all_tokens, own = plan.exchange.memory(cell, rank)
        merge, attend = calls_memory(cell, cell.tokens, (shards.q_heads, shards.kv_heads), plan.segments)
        reordered = all_tokens if plan.exchange.order is not None else 0
        opened = self.opened_rows(cell, rank) * cell.shape.opened_values(shards.q_heads) * cell.element_bytes
        return AttentionMemory(kept, exchanged, merge, max(attend + opened, all_tokens + reordered + own))

    def opened_rows(self, cell: Cell, rank: int) -> int:
        """Of all tokens, but for this rank's heads only."""
        return sum(block.rows for block in self.cached(cell, rank)) + cell.tokens
