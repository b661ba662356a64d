"""Ulysses: all-to-all from token shards to head shards, dense attention over the whole sequence, all-to-all back (arXiv 2309.14509).

Rows are packed by destination: the query heads of one rank, and the kv heads that those need. With fewer kv heads than ranks, a kv
head is sent to every rank that has one of its query heads, and to no other. With the contiguous partition the received rows are the
packed batch in order, so nothing is reordered; other partitions are restored by one index copy on each side.

    cp=4, 8 query heads, 2 kv heads     rank 0: q 0 1, kv 0     rank 1: q 2 3, kv 0     rank 2: q 4 5, kv 1     rank 3: q 6 7, kv 1

q and K|V travel as two collectives because K|V is what a rank keeps: all tokens of its kv heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import gcd
from typing import TYPE_CHECKING

from cpbench.cell import Cell
from cpbench.distributed.traffic import Traffic
from cpbench.partition import Split, contiguous
from cpbench.segments import Segment, causal_segments, place
from cpbench.strategies.base import AttentionMemory, Context, Strategy, calls_memory, nearest_divisor, row_index

if TYPE_CHECKING:
    from torch import Tensor

    from cpbench.strategies.base import OpenRows


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


@dataclass(frozen=True)
class UlyssesPlan:
    """Rows per rank, head shards, the dense causal segments, and the row order if received rows are not in the batch's order."""

    rows: tuple[int, ...]
    shards: HeadShards
    segments: tuple[Segment, ...]
    order: tuple[range, ...] | None  # packed batch row of each received row; None: already in order


class Ulysses(Strategy):
    name = "ulysses"
    summary = "all-to-all to head shards, dense attention over the whole sequence, all-to-all back"
    partitions = ("contiguous", "zigzag")

    def check(self, cell: Cell) -> str | None:
        if cell.heads % cell.layout.cp:
            near = nearest_divisor(cell.layout.cp, cell.heads)
            return f"{cell.heads} query heads per tensor-parallel rank do not divide over cp={cell.layout.cp}; the nearest degree is cp={near}"
        return super().check(cell)

    def plan(self, cell: Cell, rank: int) -> UlyssesPlan:
        split, cp = cell.split, cell.layout.cp
        whole = place(contiguous(split.lengths, 1)[0])
        order = None if cell.partition == "contiguous" else tuple(r for source in range(cp) for r in split.tokens(source))
        rows = tuple(split.rows(source) for source in range(cp))
        return UlyssesPlan(rows, head_shards(cell.heads, cell.kv_heads, cp), causal_segments(whole, whole), order)

    def attend(self, q_THD: Tensor, rows_nW: Tensor, open_rows: OpenRows, plan: UlyssesPlan, context: Context, layer: int) -> Tensor:
        from cpbench.kernels.accumulate import Accumulator

        group, total = context.group, sum(plan.rows)
        k_nGD, v_nGE = open_rows(rows_nW)
        q_all, kv_all = self._to_heads(q_THD, k_nGD, v_nGE, plan, context, layer)
        dim = q_THD.shape[2]
        result = Accumulator(total, context.buffers)
        context.kernel.attend(q_all, kv_all[..., :dim], kv_all[..., dim:], plan.segments, context.scale, result)
        out = result.result()
        del q_all, kv_all
        if plan.order is not None:
            out = out.index_select(0, row_index(plan.order, out.device))
        return self._to_tokens(out, plan, context, group.rank)

    def _to_heads(self, q_THD: Tensor, k_nGD: Tensor, v_nGE: Tensor, plan: UlyssesPlan, context: Context, layer: int) -> tuple[Tensor, Tensor]:
        """q [N, H/c, D] and K|V [N, G', D + E] of this rank's heads, for all tokens."""
        group, shards = context.group, plan.shards
        n, total, dim, width = q_THD.shape[0], sum(plan.rows), q_THD.shape[2], k_nGD.shape[2] + v_nGE.shape[2]
        q_send = context.buffers.get("comm_q_send", (group.size, n, shards.q_heads, dim), q_THD)
        kv_send = context.buffers.get("comm_kv_send", (group.size, n, shards.kv_heads, width), q_THD)
        q_send.copy_(q_THD.view(n, group.size, shards.q_heads, dim).transpose(0, 1))
        for rank, sources in enumerate(shards.kv_sources):
            for local, source in enumerate(sources):
                kv_send[rank, :, local, : k_nGD.shape[2]].copy_(k_nGD[:, source])
                kv_send[rank, :, local, k_nGD.shape[2] :].copy_(v_nGE[:, source])
        q_all = context.buffers.get("comm_q", (total, shards.q_heads, dim), q_THD)
        kv_all = context.cache.get(layer, (total, shards.kv_heads, width), q_THD)
        sends = [n] * group.size
        kv_in_flight = group.all_to_all(kv_all, kv_send.flatten(0, 1), plan.rows, sends)
        q_in_flight = group.all_to_all(q_all, q_send.flatten(0, 1), plan.rows, sends)
        kv_in_flight.wait()
        q_in_flight.wait()
        if plan.order is None:
            return q_all, kv_all
        index = row_index(plan.order, q_all.device)
        return q_all.new_empty(q_all.shape).index_copy_(0, index, q_all), kv_all.new_empty(kv_all.shape).index_copy_(0, index, kv_all)

    def _to_tokens(self, out_NhE: Tensor, plan: UlyssesPlan, context: Context, rank: int) -> Tensor:
        """Every head of this rank's tokens: [n, H, E]. Received by source rank, that is by head shard."""
        size, n = context.group.size, plan.rows[rank]
        shape = (size, n, *out_NhE.shape[1:])
        by_source = context.buffers.get("comm_out", shape, out_NhE)
        context.group.all_to_all(by_source.flatten(0, 1), out_NhE, [n] * size, plan.rows).wait()
        return by_source.transpose(0, 1).flatten(1, 2)

    def traffic(self, cell: Cell, rank: int) -> Traffic:
        traffic, split, cp = Traffic(), cell.split, cell.layout.cp
        shards, dim = head_shards(cell.heads, cell.kv_heads, cp), cell.config.head_dim * cell.element_bytes
        others = sum(split.lengths) - split.rows(rank)
        traffic.add("cp", "all_to_all", others * 2 * shards.kv_heads * dim)
        traffic.add("cp", "all_to_all", others * shards.q_heads * dim)
        traffic.add("cp", "all_to_all", split.rows(rank) * (cp - 1) * shards.q_heads * dim)
        return traffic

    def score_pairs(self, cell: Cell, rank: int) -> int:
        whole = Split(cell.lengths, (tuple(contiguous(cell.lengths, 1)[0]),))
        return whole.causal_pairs(0) * (cell.heads // cell.layout.cp)

    def memory(self, cell: Cell, rank: int) -> AttentionMemory:
        cp, dim = cell.layout.cp, cell.config.head_dim * cell.element_bytes
        shards, total, n = head_shards(cell.heads, cell.kv_heads, cp), cell.tokens, cell.split.rows(rank)
        q, kv = shards.q_heads * dim, 2 * shards.kv_heads * dim
        buffers, attend = calls_memory(cell, total, (shards.q_heads, shards.kv_heads), self.plan(cell, rank).segments)
        reordered = total * (q + kv) if cell.partition != "contiguous" else 0
        own = n * cp * q if shards.q_heads > 1 else 0  # with one head per rank the received output is used where it lies
        # sent and received q, sent K|V, received output; the dense output of all tokens, then that of own tokens beside it
        sent = n * cp * (q + kv) + total * q + n * cp * q
        return AttentionMemory(total * kv, sent + buffers, max(attend + reordered, total * q + own))
