"""Ring attention: blocks of K and V travel around the ring while each rank attends to the block it has (arXiv 2310.01889).

The next transfer is posted before the attention call and awaited after it, into one of two buffers that are reused by every layer.
A block that no local query may see is passed on without a call. Partial results are merged by their log-sum-exp in fp32.

    zigzag, cp=2               step 0                    step 1
        rank 0 holds 0 and 3   0,3 x 0,3 causal          3 x 1,2 full
        rank 1 holds 1 and 2   1,2 x 1,2 causal          1,2 x 0 full (block 3 is behind every query)

Each rank keeps its own rows only: the K/V cache is split over the ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpbench.cell import Cell
from cpbench.distributed.traffic import Traffic
from cpbench.segments import Segment, causal_segments, place
from cpbench.strategies.base import AttentionMemory, Context, Strategy, calls_memory, row_values

if TYPE_CHECKING:
    from torch import Tensor

    from cpbench.strategies.base import OpenRows


@dataclass(frozen=True)
class Step:
    """One step of the ring: what to compute with the block that is here, and how many rows the next one has."""

    segments: tuple[Segment, ...]
    next_rows: int | None  # None on the last step


class Ring(Strategy):
    name = "ring"
    summary = "blocks of K and V travel around the ring, each transfer behind the attention to the block before"
    partitions = ("zigzag", "contiguous")
    keeps_local_rows = True

    def plan(self, cell: Cell, rank: int) -> tuple[Step, ...]:
        split, cp = cell.split, cell.layout.cp
        own = place(split.ranks[rank])
        sources = [(rank - step) % cp for step in range(cp)]
        following = [split.rows(source) for source in sources[1:]]
        return tuple(Step(causal_segments(own, place(split.ranks[source])), next_rows) for source, next_rows in zip(sources, [*following, None], strict=True))

    def attend(self, q_THD: Tensor, rows_nW: Tensor, open_rows: OpenRows, plan: tuple[Step, ...], context: Context, layer: int) -> Tensor:
        from cpbench.kernels.accumulate import Accumulator

        result = Accumulator(q_THD.shape[0], context.buffers)
        here = rows_nW
        for number, step in enumerate(plan):
            if step.next_rows is not None:
                arriving = context.buffers.get(f"comm_ring{number % 2}", (step.next_rows, here.shape[1]), here)
                in_flight = context.group.shift(here, arriving)
            if step.segments:
                context.kernel.attend(q_THD, *open_rows(here), step.segments, context.scale, result)
            if step.next_rows is not None:
                in_flight.wait()
                here = arriving
        return result.result()

    def traffic(self, cell: Cell, rank: int) -> Traffic:
        traffic, split = Traffic(), cell.split
        received = sum(split.rows(source) for source in range(cell.layout.cp) if source != rank)
        traffic.add("cp", "send_recv", received * row_values(cell) * cell.element_bytes, cell.layout.cp - 1)
        return traffic

    def memory(self, cell: Cell, rank: int) -> AttentionMemory:
        split, cp = cell.split, cell.layout.cp
        arriving = [split.rows((rank - step) % cp) for step in range(1, cp)]
        rows = max(arriving[0::2]) + max(arriving[1::2], default=0)  # the two buffers alternate
        segments = [segment for step in self.plan(cell, rank) for segment in step.segments]
        buffers, transient = calls_memory(cell, split.rows(rank), (cell.heads, cell.kv_heads), segments)
        return AttentionMemory(0, rows * row_values(cell) * cell.element_bytes + buffers, transient)
