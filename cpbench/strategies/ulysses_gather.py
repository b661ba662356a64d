"""Ulysses by gathering: every rank holds all tokens and attends with its slice of the heads; an all-gather joins the heads again.

This is what SGLang-style scoring calls Ulysses: it reproduces the numbers of tensor parallelism with one head slice per rank, and saves
neither memory nor projections outside attention, because RoPE, projections and MLP run on the whole sequence on every rank.

    cp=4, 8 query heads, 2 kv heads     every rank: all tokens, kv 0 and 1     rank 1: attends q 2 3 with kv 0, gathers 0 1, 4 5, 6 7

Fewer kv heads than ranks need nothing special: a rank reads the kv heads that its query heads share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpbench.cell import Cell
from cpbench.distributed.traffic import Traffic
from cpbench.segments import Segment, causal_segments, place
from cpbench.strategies.base import AttentionMemory, Context, Strategy, calls_memory, laid_out
from cpbench.strategies.ulysses import HeadShards, head_shards, undivided_heads
from cpbench.tracing.spans import moving

if TYPE_CHECKING:
    from torch import Tensor

    from cpbench.strategies.base import OpenRows

GATHER_HEADS = moving("gather_heads")


@dataclass(frozen=True)
class SlicePlan:
    """Heads of each rank, and causal attention over the whole batch."""

    shards: HeadShards
    segments: tuple[Segment, ...]


class UlyssesGather(Strategy):
    name = "ulysses-gather"
    summary = "every rank holds all tokens and attends with a slice of the heads, which are gathered"
    partitions = ("replicated",)
    keeps_local_rows = True

    def check(self, cell: Cell) -> str | None:
        return undivided_heads(cell, "cp", cell.layout.cp) or super().check(cell)

    def plan(self, cell: Cell, rank: int) -> SlicePlan:
        new = cell.split.ranks[rank]
        shards = head_shards(cell.heads, cell.kv_heads, cell.layout.cp)
        return SlicePlan(shards, causal_segments(place(new), laid_out(self.cached(cell, rank), new)))

    def attend(self, q_THD: Tensor, rows_SW: Tensor, open_rows: OpenRows, plan: SlicePlan, context: Context, layer: int) -> Tensor:
        from cpbench.kernels.accumulate import Accumulator

        group, shards = context.group, plan.shards
        mine, sources = slice(group.rank * shards.q_heads, (group.rank + 1) * shards.q_heads), shards.kv_sources[group.rank]
        k, v = open_rows(rows_SW, range(mine.start, mine.stop))
        if not context.shape.opened:
            k, v = _heads(k, sources), _heads(v, sources)
        result = Accumulator(q_THD.shape[0], context.buffers)
        context.attend(q_THD[:, mine], k, v, plan.segments, result)
        out = result.result().contiguous()
        by_rank = context.buffers.get("comm_heads", (group.size, *out.shape), out)
        with GATHER_HEADS():
            group.all_gather(by_rank.flatten(0, 1), out).wait()
        return by_rank.transpose(0, 1).flatten(1, 2)

    def traffic(self, cell: Cell, rank: int) -> Traffic:
        traffic, cp = Traffic(), cell.layout.cp
        traffic.add("cp", "all_gather", (cp - 1) * cell.tokens * (cell.heads // cp) * cell.shape.v_dim * cell.element_bytes)
        return traffic

    def attended_heads(self, cell: Cell) -> int:
        return cell.heads // cell.layout.cp

    def score_pairs(self, cell: Cell, rank: int) -> int:
        return cell.split.causal_pairs(rank) * (cell.heads // cell.layout.cp)

    def memory(self, cell: Cell, rank: int) -> AttentionMemory:
        plan, head = self.plan(cell, rank), cell.shape.v_dim * cell.element_bytes
        shards = plan.shards
        own, whole = cell.tokens * shards.q_heads * head, cell.tokens * cell.heads * head
        merge, attend = calls_memory(cell, cell.tokens, (shards.q_heads, shards.kv_heads), plan.segments)
        keys = cell.tokens + sum(block.rows for block in self.cached(cell, rank))
        repeated = 0 if _adjacent(shards.kv_sources[rank]) else keys * shards.kv_heads * cell.shape.part_values * cell.element_bytes
        repeated += keys * cell.shape.opened_values(shards.q_heads) * cell.element_bytes
        joined = whole if shards.q_heads > 1 else 0  # with one head per rank the gathered output is used where it lies
        return AttentionMemory(buffers=whole, merge=merge, transient=repeated + max(attend + own, own + joined))


def _heads(x_SGD: Tensor, sources: tuple[int, ...]) -> Tensor:
    """The kv heads that a rank needs: a view where they are neighbours, a copy where one serves two runs of query heads."""
    if _adjacent(sources):
        return x_SGD[:, sources[0] : sources[-1] + 1]
    return x_SGD[:, list(sources)]


def _adjacent(sources: tuple[int, ...]) -> bool:
    return list(sources) == list(range(sources[0], sources[-1] + 1))
