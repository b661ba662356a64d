"""No context parallelism: a rank (per tensor-parallel group) computes every token. The baseline, and what a batch gets that is too short."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpbench.cell import Cell
from cpbench.distributed.traffic import Traffic
from cpbench.segments import PlacedBlock, Segment, causal_segments, place
from cpbench.strategies.base import AttentionMemory, Context, Strategy, calls_memory, laid_out

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from cpbench.strategies.base import OpenRows


class NoParallelism(Strategy):
    name = "none"
    summary = "one rank holds every token: the baseline"
    partitions = ("contiguous",)
    keeps_local_rows = True
    collects = True

    def check(self, cell: Cell) -> str | None:
        return f"none is for cp1, not {cell.layout}; use allgather, ring or ulysses" if cell.layout.cp > 1 else super().check(cell)

    def plan(self, cell: Cell, rank: int) -> tuple[Segment, ...]:
        new = cell.split.ranks[rank]
        return causal_segments(place(new), laid_out(self.cached(cell, rank), new))

    def attend(self, q_THD: Tensor, rows_SW: Tensor, open_rows: OpenRows, plan: tuple[Segment, ...], context: Context, layer: int) -> Tensor:
        from cpbench.kernels.accumulate import Accumulator

        result = Accumulator(q_THD.shape[0], context.buffers)
        context.attend(q_THD, *open_rows(rows_SW), plan, result)
        return result.result()

    def collected(self, cell: Cell, rank: int) -> list[PlacedBlock]:
        return laid_out(self.cached(cell, rank), cell.split.ranks[rank])

    def collect(self, rows_SW: Tensor, plan: tuple[Segment, ...], context: Context, layer: int) -> Callable[[], Tensor]:
        return lambda: rows_SW

    def traffic(self, cell: Cell, rank: int) -> Traffic:
        return Traffic()

    def memory(self, cell: Cell, rank: int) -> AttentionMemory:
        if cell.shape.top_k:
            return AttentionMemory()
        merge, transient = calls_memory(cell, cell.split.rows(rank), (cell.heads, cell.kv_heads), self.plan(cell, rank))
        opened = self.opened_rows(cell, rank) * cell.shape.opened_values(cell.heads) * cell.element_bytes
        return AttentionMemory(merge=merge, transient=transient + opened)
