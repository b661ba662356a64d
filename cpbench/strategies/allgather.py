"""All-gather: every rank gathers the K and V of all, packed in one collective per layer, and attends with its own queries.

While the gather is in flight the rank attends to its own rows. What has arrived is read where it lies, in rank order: full ranges need
no order, so nothing is reordered, and rows that pad uneven ranks are never looked at.

    zigzag, cp=4, rank 1                gathered: | 0 7 | 1 6 | 2 5 | 3 4 |
        own rows, during the gather               .     causal  .     .
        queries 1 and 6 (one call)                0     own     .     .
        query 6 (one call)                        .     own     2 5   3 4

Each rank keeps the whole K/V, as SGLang's prefill context parallelism does (PR 23269).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpbench.cell import Cell
from cpbench.distributed.traffic import Traffic
from cpbench.segments import Segment, by_queries, causal_segments, place
from cpbench.strategies.base import AttentionMemory, Context, Strategy, calls_memory, row_values

if TYPE_CHECKING:
    from torch import Tensor

    from cpbench.strategies.base import OpenRows


@dataclass(frozen=True)
class GatherPlan:
    """Own segments index the rank's rows; remote ones the gathered buffer [ranks * max_rows, W]."""

    own: tuple[Segment, ...]
    remote: tuple[Segment, ...]
    max_rows: int


class AllGather(Strategy):
    name = "allgather"
    summary = "every rank gathers K and V of all ranks in one packed collective"
    partitions = ("zigzag", "contiguous")

    def plan(self, cell: Cell, rank: int) -> GatherPlan:
        split = cell.split
        own = place(split.ranks[rank])
        arrived = [place(blocks, source * split.max_rows) for source, blocks in enumerate(split.ranks) if source != rank]
        remote = [segment for blocks in arrived for segment in causal_segments(own, blocks)]
        return GatherPlan(causal_segments(own, own), by_queries(remote), split.max_rows)

    def attend(self, q_THD: Tensor, rows_nW: Tensor, open_rows: OpenRows, plan: GatherPlan, context: Context, layer: int) -> Tensor:
        from cpbench.kernels.accumulate import Accumulator

        n, width = rows_nW.shape
        gathered = context.cache.get(layer, (context.group.size * plan.max_rows, width), rows_nW)
        block = rows_nW
        if n < plan.max_rows:  # uneven ranks: the collective needs equal blocks
            block = context.buffers.get("comm_padded", (plan.max_rows, width), rows_nW)
            block[:n].copy_(rows_nW)
        in_flight = context.group.all_gather(gathered, block)
        result = Accumulator(n, context.buffers)
        context.kernel.attend(q_THD, *open_rows(rows_nW), plan.own, context.scale, result)
        in_flight.wait()
        context.kernel.attend(q_THD, *open_rows(gathered), plan.remote, context.scale, result)
        return result.result()

    def traffic(self, cell: Cell, rank: int) -> Traffic:
        traffic = Traffic()
        cp = cell.layout.cp
        traffic.add("cp", "all_gather", (cp - 1) * cell.split.max_rows * row_values(cell) * cell.element_bytes)
        return traffic

    def memory(self, cell: Cell, rank: int) -> AttentionMemory:
        split, row = cell.split, row_values(cell) * cell.element_bytes
        padded = split.max_rows * row if split.rows(rank) < split.max_rows else 0
        plan = self.plan(cell, rank)
        buffers, transient = calls_memory(cell, split.rows(rank), (cell.heads, cell.kv_heads), [*plan.own, *plan.remote])
        return AttentionMemory(cell.layout.cp * split.max_rows * row, padded + buffers, transient)
