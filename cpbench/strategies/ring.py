"""Ring attention: blocks of K and V travel around the ring while each rank attends to the block it has (arXiv 2310.01889).

The next transfer is posted before the attention call and awaited after it, into one of two buffers that are reused by every layer.
A block that no local query may see is passed on without a call. Partial results are merged by their log-sum-exp in fp32.

    zigzag, cp=2               step 0                    step 1
        rank 0 holds 0 and 3   0,3 x 0,3 causal          3 x 1,2 full
        rank 1 holds 1 and 2   1,2 x 1,2 causal          1,2 x 0 full (block 3 is behind every query)

Each rank keeps its own rows only: the K/V cache is split over the ranks, and a cached prefix travels with the new rows. Striped
attention (arXiv 2311.09431) is this ring on the interleave partition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpbench.cell import Cell
from cpbench.distributed.traffic import Traffic
from cpbench.partition import Blocks
from cpbench.segments import Segment, causal_segments, place
from cpbench.strategies.base import AttentionMemory, Context, Strategy, calls_memory, laid_out, row_values, spread_cache
from cpbench.tracing.spans import moving

if TYPE_CHECKING:
    from torch import Tensor

    from cpbench.distributed.collectives import Group
    from cpbench.strategies.base import OpenRows

PASS_KV = moving("pass_kv")


@dataclass(frozen=True)
class Step:
    """One step of the ring: what to compute with the block that is here, and how many rows the next one has."""

    segments: tuple[Segment, ...]
    next_rows: int | None  # None on the last step


class Ring(Strategy):
    name = "ring"
    summary = "blocks of K and V travel around the ring, each transfer behind the attention to the block before"
    partitions = ("zigzag", "contiguous", "interleave")
    keeps_local_rows = True

    def cached(self, cell: Cell, rank: int) -> Blocks:
        return spread_cache(cell, cell.layout.cp, rank)

    def plan(self, cell: Cell, rank: int) -> tuple[Step, ...]:
        return ring_steps([(self.cached(cell, source), cell.split.ranks[source]) for source in range(cell.layout.cp)], rank)

    def attend(self, q_THD: Tensor, rows_SW: Tensor, open_rows: OpenRows, plan: tuple[Step, ...], context: Context, layer: int) -> Tensor:
        return run_ring(q_THD, rows_SW, open_rows, plan, context, context.group)

    def traffic(self, cell: Cell, rank: int) -> Traffic:
        traffic = Traffic()
        received = sum(step.next_rows or 0 for step in self.plan(cell, rank))
        traffic.add("cp", "send_recv", received * row_values(cell) * cell.element_bytes, cell.layout.cp - 1)
        return traffic

    def memory(self, cell: Cell, rank: int) -> AttentionMemory:
        plan = self.plan(cell, rank)
        segments = [segment for step in plan for segment in step.segments]
        merge, transient = calls_memory(cell, cell.split.rows(rank), (cell.heads, cell.kv_heads), segments)
        opened = max(self._rows_by_step(cell, rank)) * cell.shape.opened_values(cell.heads) * cell.element_bytes
        return AttentionMemory(buffers=arriving_rows(plan) * row_values(cell) * cell.element_bytes, merge=merge, transient=transient + opened)

    def opened_rows(self, cell: Cell, rank: int) -> int:
        return sum(self._rows_by_step(cell, rank))

    def _rows_by_step(self, cell: Cell, rank: int) -> list[int]:
        return attended_rows(super().opened_rows(cell, rank), self.plan(cell, rank))


def ring_steps(places: Sequence[tuple[Blocks, Blocks]], place_here: int) -> tuple[Step, ...]:
    """The steps of one place of a ring whose places hold these (cached, new) blocks, each laid out cached first."""
    held = [laid_out(cached, new) for cached, new in places]
    rows = [sum(block.rows for block, _ in blocks) for blocks in held]
    queries = place(places[place_here][1])
    sources = [(place_here - step) % len(places) for step in range(len(places))]
    following = [*(rows[source] for source in sources[1:]), None]
    return tuple(Step(causal_segments(queries, held[source]), next_rows) for source, next_rows in zip(sources, following, strict=True))


def run_ring(q_THD: Tensor, rows_SW: Tensor, open_rows: OpenRows, plan: tuple[Step, ...], context: Context, group: Group) -> Tensor:
    """Attention of this place's queries to the rows of every place of the ring `group`."""
    from cpbench.kernels.accumulate import Accumulator

    result = Accumulator(q_THD.shape[0], context.buffers)
    here = rows_SW
    for number, step in enumerate(plan):
        if step.next_rows is not None:
            arriving = context.buffers.get(f"comm_ring{number % 2}", (step.next_rows, here.shape[1]), here)
            with PASS_KV():
                in_flight = group.shift(here, arriving)
        if step.segments:
            context.attend(q_THD, *open_rows(here), step.segments, result)
        if step.next_rows is not None:
            with PASS_KV():
                in_flight.wait()
            here = arriving
    return result.result()


def attended_rows(held: int, plan: tuple[Step, ...]) -> list[int]:
    """Of each step the rows that are attended to: those that the place holds, and then those that arrived; none where nothing is computed."""
    rows = [held, *(step.next_rows or 0 for step in plan[:-1])]
    return [count if step.segments else 0 for count, step in zip(rows, plan, strict=True)]


def arriving_rows(plan: tuple[Step, ...]) -> int:
    """Rows of the two buffers that the ring alternates between."""
    arriving = [step.next_rows or 0 for step in plan[:-1]]
    return max(arriving[0::2], default=0) + max(arriving[1::2], default=0)
