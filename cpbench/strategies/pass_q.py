"""Pass-Q ring: queries travel around the ring, and partial results come back in one all-to-all (arXiv 2411.01783).

For few new tokens on a long cached prefix the queries are the smaller load: K and V stay where they are cached. The next queries are
posted before the attention call and awaited after it. Each partial output travels with its log-sum-exp, packed by row; rows that saw
nothing do not travel.

    cp=2, prefix P on both ranks        step 0                      step 1                      all-to-all
        rank 0 has P first half, new 0 3   q 0,3 x its K/V             q 1,2 x its K/V             rows of 1,2 -> rank 1
        rank 1 has P second half, new 1 2  q 1,2 x its K/V             q 0,3 x its K/V             rows of 0,3 -> rank 0

Received per rank: about 2 H t d e (P - 1) bytes for t new tokens, where a ring that passes K and V needs 2 G (t + prefix / P) d e (P - 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpbench.cell import Cell
from cpbench.distributed.traffic import Traffic
from cpbench.partition import Blocks
from cpbench.segments import Segment, Span, causal_segments, joined, place
from cpbench.strategies.base import AttentionMemory, Context, Strategy, calls_memory, laid_out, spread_cache
from cpbench.tracing.spans import moving

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cpbench.kernels.accumulate import Accumulator
    from cpbench.strategies.base import OpenRows

PASS_Q, RETURN_PARTIALS = moving("pass_q"), moving("return_partials")


@dataclass(frozen=True)
class Visit:
    """Queries of one rank at another's K and V: what is computed, and which query rows get a partial result from it."""

    segments: tuple[Segment, ...]
    rows: int

    @property
    def covered(self) -> tuple[Span, ...]:
        return joined({segment.queries for segment in self.segments})

    @property
    def covered_rows(self) -> int:
        return sum(span.rows for span in self.covered)


@dataclass(frozen=True)
class PassQPlan:
    """`here[s]`: rank s's queries at this rank's K and V. `away[h]`: this rank's queries at rank h's."""

    here: tuple[Visit, ...]
    away: tuple[Visit, ...]


class PassQ(Strategy):
    name = "pass-q"
    summary = "queries travel around the ring, K and V stay; for few new tokens on a long cached prefix"
    partitions = ("zigzag", "contiguous", "interleave")
    keeps_local_rows = True

    def cached(self, cell: Cell, rank: int) -> Blocks:
        return spread_cache(cell, cell.layout.cp, rank)

    def plan(self, cell: Cell, rank: int) -> PassQPlan:
        everyone = range(cell.layout.cp)
        return PassQPlan(tuple(self._visit(cell, source, rank) for source in everyone), tuple(self._visit(cell, rank, holder) for holder in everyone))

    def _visit(self, cell: Cell, source: int, holder: int) -> Visit:
        blocks = cell.split.ranks
        return Visit(causal_segments(place(blocks[source]), laid_out(self.cached(cell, holder), blocks[holder])), cell.split.rows(source))

    def attend(self, q_THD: Tensor, rows_SW: Tensor, open_rows: OpenRows, plan: PassQPlan, context: Context, layer: int) -> Tensor:
        from cpbench.kernels.accumulate import Accumulator

        group, size = context.group, context.group.size
        k_SGD, v_SGE = open_rows(rows_SW)
        own = Accumulator(q_THD.shape[0], context.buffers, "merge_own")
        leaving = _Partials([visit.covered_rows if source != group.rank else 0 for source, visit in enumerate(plan.here)], "comm_leaving")
        here = q_THD
        for step in range(size):
            source = (group.rank - step) % size
            if step + 1 < size:
                arriving = context.buffers.get(f"comm_q{step % 2}", (plan.here[(source - 1) % size].rows, *q_THD.shape[1:]), q_THD)
                with PASS_Q():
                    in_flight = group.shift(here.contiguous(), arriving)
            visit = plan.here[source]
            result = Accumulator(visit.rows, context.buffers) if step else own
            if visit.segments:
                context.attend(here, k_SGD, v_SGE, visit.segments, result)
                if step:
                    leaving.put(source, visit.covered, *result.running(), q_THD, context)
            if step + 1 < size:
                with PASS_Q():
                    in_flight.wait()
                here = arriving
        self._collect(own, leaving, plan, v_SGE.shape[2], q_THD, context)
        return own.result()

    def _collect(self, own: Accumulator, leaving: _Partials, plan: PassQPlan, dim_v: int, q_THD: Tensor, context: Context) -> None:
        """Send every partial result home and merge those that arrive."""
        group = context.group
        arriving = _Partials([visit.covered_rows if holder != group.rank else 0 for holder, visit in enumerate(plan.away)], "comm_arriving")
        received, sent = (partials.buffer(q_THD, dim_v, context) for partials in (arriving, leaving))
        with RETURN_PARTIALS():
            group.all_to_all(received, sent, arriving.rows, leaving.rows).wait()
        for holder, visit in enumerate(plan.away):
            if holder != group.rank:
                for span, out_THE, lse_HT in arriving.parts(holder, visit.covered, q_THD, dim_v, context):
                    own.add(span, out_THE, lse_HT)

    def traffic(self, cell: Cell, rank: int) -> Traffic:
        traffic, cp, plan = Traffic(), cell.layout.cp, self.plan(cell, rank)
        queries = sum(visit.rows for source, visit in enumerate(plan.here) if source != rank)
        traffic.add("cp", "send_recv", queries * cell.heads * cell.shape.qk_dim * cell.element_bytes, cp - 1)
        partials = sum(visit.covered_rows for holder, visit in enumerate(plan.away) if holder != rank)
        traffic.add("cp", "all_to_all", partials * _partial_bytes(cell))
        return traffic

    def score_pairs(self, cell: Cell, rank: int) -> int:
        return sum(segment.pairs for visit in self.plan(cell, rank).here for segment in visit.segments) * cell.heads

    def memory(self, cell: Cell, rank: int) -> AttentionMemory:
        cp, plan, heads = cell.layout.cp, self.plan(cell, rank), (cell.heads, cell.kv_heads)
        narrow, n, row = cell.element_bytes < 4, cell.split.rows(rank), cell.heads * cell.shape.v_dim
        visits = [plan.here[(rank - step) % cp] for step in range(1, cp)]
        queries = [visit.rows * cell.heads * cell.shape.qk_dim * cell.element_bytes for visit in visits]
        travelling = max(queries[0::2]) + max(queries[1::2], default=0)
        leaving = sum(visit.covered_rows for visit in visits) * _partial_bytes(cell)
        arriving = sum(visit.covered_rows for holder, visit in enumerate(plan.away) if holder != rank) * _partial_bytes(cell)
        mine, attend = calls_memory(cell, n, heads, plan.here[rank].segments)
        merged = max(mine, 4 * n * (row + cell.heads) if narrow and arriving else 0)
        others = [calls_memory(cell, visit.rows, heads, visit.segments) for visit in visits if visit.segments]
        held = n * row * cell.element_bytes if not (narrow and mine) else 0  # this rank's first result waits for the others
        merged += max((kept for kept, _ in others), default=0)
        opened = self.opened_rows(cell, rank) * cell.shape.opened_values(cell.heads) * cell.element_bytes
        transient = opened + max(attend, held + max((passing for _, passing in others), default=0))
        return AttentionMemory(buffers=travelling + leaving + arriving, merge=merged, transient=transient)


class _Partials:
    """Partial results by rank in one buffer of bytes: each row is its output in the wire dtype, then its log-sum-exp in full precision."""

    def __init__(self, rows: list[int], name: str) -> None:
        self.rows, self._name = rows, name

    def buffer(self, like: Tensor, dim_v: int, context: Context) -> Tensor:
        """[rows of all ranks, bytes per row]."""
        import torch

        width = like.shape[1] * (dim_v * like.element_size() + _wide(like).itemsize)
        return context.buffers.get(self._name, (sum(self.rows), width), like, torch.uint8)

    def put(self, rank: int, covered: tuple[Span, ...], out_THE: Tensor, lse_HT: Tensor, like: Tensor, context: Context) -> None:
        """Write the covered rows of a result for `rank`."""
        for span, out, lse in self.parts(rank, covered, like, out_THE.shape[2], context):
            out.copy_(out_THE[span.start : span.stop])
            lse.copy_(lse_HT[:, span.start : span.stop])

    def parts(self, rank: int, covered: tuple[Span, ...], like: Tensor, dim_v: int, context: Context) -> list[tuple[Span, Tensor, Tensor]]:
        """(query rows, out [t, H, E], lse [H, t]) as views of the buffer, for each covered span of `rank`."""
        row, heads = sum(self.rows[:rank]), like.shape[1]
        buffer, split = self.buffer(like, dim_v, context), like.shape[1] * dim_v * like.element_size()
        found = []
        for span in covered:
            rows = buffer[row : row + span.rows]
            found.append((span, rows[:, :split].view(like.dtype).unflatten(1, (heads, dim_v)), rows[:, split:].view(_wide(like)).t()))
            row += span.rows
        return found


def _wide(like: Tensor) -> torch.dtype:
    """The dtype of a log-sum-exp."""
    import torch

    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _partial_bytes(cell: Cell) -> int:
    """Bytes of one row of a partial result."""
    return cell.heads * (cell.shape.v_dim * cell.element_bytes + max(cell.element_bytes, 4))
