"""All-gather: every rank gathers the K and V of all, packed in one collective per layer, and attends with its own queries.

While the gather is in flight the rank attends to its own rows and to the cached prefix, which it has. What has arrived is read where it
lies, in rank order: full ranges need no order, so nothing is reordered, and rows that pad uneven ranks are never looked at.

    zigzag, cp=4, rank 1                gathered: | 0 7 | 1 6 | 2 5 | 3 4 |
        own rows, during the gather               .     causal  .     .
        queries 1 and 6 (one call)                0     own     .     .
        query 6 (one call)                        .     own     2 5   3 4

With `head_groups`, K and V travel in that many collectives by kv heads, so that a group's gather hides behind the group before. A kernel
that reads pages where they lie takes the other way that SGLang and the Llama 3 report describe: gather into the pages, then one call in
which each block of queries sees its own prefix of them.

Each rank keeps the whole K/V, as SGLang's prefill context parallelism does (PR 23269).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpbench.cell import Cell
from cpbench.distributed.traffic import Traffic
from cpbench.layout import nearest_divisor
from cpbench.partition import Block
from cpbench.segments import PlacedBlock, Request, Segment, Span, by_queries, causal_segments, place
from cpbench.strategies.base import AttentionMemory, Context, Strategy, cached_rows, calls_memory, in_position_order, packed_heads, row_values
from cpbench.tracing.spans import KERNEL, moving
from cpbench.visible import InOrder, in_order

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from cpbench.strategies.base import OpenRows

GATHER_KV = moving("gather_kv")


@dataclass(frozen=True)
class GatherPlan:
    """`own` segments index the rank's rows; `cached` and `remote` ones a buffer [cached + ranks * max_rows, W].

    `requests` are the same work on pages in the order of positions; empty where a rank's blocks have gaps. `ordered` is it on all rows in that
    order; None where no one asks for it.
    """

    own: tuple[Segment, ...]
    cached: tuple[Segment, ...]
    remote: tuple[Segment, ...]
    requests: tuple[Request, ...]
    cached_rows: int
    max_rows: int
    head_groups: int
    ordered: OrderedKeys | None


@dataclass(frozen=True)
class OrderedKeys:
    """The rows of all ranks in the order of sequences and positions, and all attention of a rank to them."""

    rows: InOrder
    segments: tuple[Segment, ...]


class AllGather(Strategy):
    name = "allgather"
    summary = "every rank gathers K and V of all ranks in one packed collective"
    partitions = ("zigzag", "contiguous", "interleave")
    collects = True

    def check(self, cell: Cell) -> str | None:
        if cell.kv_heads % cell.head_groups:
            near = nearest_divisor(cell.head_groups, cell.kv_heads)
            return f"{cell.kv_heads} kv heads do not divide into {cell.head_groups} head groups; the nearest valid value is head_groups={near}"
        return super().check(cell)

    def stored(self, cell: Cell, rank: int) -> list[PlacedBlock]:
        split = cell.split
        cached = sum(block.rows for block in self.cached(cell, rank))
        return [placed for source, blocks in enumerate(split.ranks) for placed in place(blocks, cached + source * split.max_rows)]

    def plan(self, cell: Cell, rank: int) -> GatherPlan:
        split = cell.split
        own, cached = place(split.ranks[rank]), cached_rows(self.cached(cell, rank))
        before = sum(block.rows for block, _ in cached)
        arrived = [place(blocks, before + source * split.max_rows) for source, blocks in enumerate(split.ranks) if source != rank]
        remote = [segment for blocks in arrived for segment in causal_segments(own, blocks)]
        requests = [Request(Span(row, row + block.rows), block.sequence, block.stop) for block, row in own if block.step == 1]
        return GatherPlan(
            own=causal_segments(own, own),
            cached=causal_segments(own, cached),
            remote=by_queries(remote),
            requests=tuple(requests) if len(requests) == len(own) else (),
            cached_rows=before,
            max_rows=split.max_rows,
            head_groups=cell.head_groups,
            ordered=self._ordered(cell, rank) if cell.deterministic else None,
        )

    def _ordered(self, cell: Cell, rank: int) -> OrderedKeys:
        """Every query block and all that it sees, in one segment."""
        own = place(cell.split.ranks[rank])
        rows = in_order(own, self.collected(cell, rank))
        spans = {block.sequence: visible.keys for (block, _), visible in zip(own, rows.visible, strict=True)}
        sequences = [(Block(sequence, 0, span.rows), span.start) for sequence, span in spans.items()]
        return OrderedKeys(rows, causal_segments(own, sequences))

    def attend(self, q_THD: Tensor, rows_SW: Tensor, open_rows: OpenRows, plan: GatherPlan, context: Context, layer: int) -> Tensor:
        if plan.head_groups == 1:
            return _Gather(rows_SW, plan, context, layer).attend(q_THD, open_rows)
        k_SGD, v_SGE = open_rows(rows_SW)
        heads, kv_heads = q_THD.shape[1] // plan.head_groups, k_SGD.shape[1] // plan.head_groups
        packed = [packed_heads(k, v) for k, v in zip(k_SGD.split(kv_heads, 1), v_SGE.split(kv_heads, 1), strict=True)]
        lanes = range(layer * plan.head_groups, (layer + 1) * plan.head_groups)
        started = [_Gather(rows, plan, context, lane) for lane, (rows, _) in zip(lanes, packed, strict=True)]  # all before the first attention
        out_THE = q_THD.new_empty(*q_THD.shape[:2], v_SGE.shape[2])
        for part, q, gather, (_, opens) in zip(out_THE.split(heads, 1), q_THD.split(heads, 1), started, packed, strict=True):
            part.copy_(gather.attend(q, opens))
        return out_THE

    def collected(self, cell: Cell, rank: int) -> list[PlacedBlock]:
        return [*cached_rows(self.cached(cell, rank)), *self.stored(cell, rank)]

    def collect(self, rows_SW: Tensor, plan: GatherPlan, context: Context, layer: int) -> Callable[[], Tensor]:
        return _Gather(rows_SW, plan, context, layer).arrived

    def cache_heads(self, cell: Cell, rank: int) -> tuple[tuple[int, ...], ...]:
        heads = cell.kv_heads // cell.head_groups
        return tuple(tuple(range(first, first + heads)) for first in range(0, cell.kv_heads, heads))

    def traffic(self, cell: Cell, rank: int) -> Traffic:
        traffic = Traffic()
        cp = cell.layout.cp
        traffic.add("cp", "all_gather", (cp - 1) * cell.split.max_rows * row_values(cell) * cell.element_bytes, cell.head_groups)
        return traffic

    def memory(self, cell: Cell, rank: int) -> AttentionMemory:
        split, row, groups = cell.split, row_values(cell) * cell.element_bytes, cell.head_groups
        plan = self.plan(cell, rank)
        gathered = (plan.cached_rows + cell.layout.cp * split.max_rows) * row
        padded = split.max_rows * row if split.rows(rank) < split.max_rows else 0
        if cell.shape.top_k:
            return AttentionMemory(new_rows=gathered, buffers=padded)
        if plan.ordered is not None:
            merge, transient = calls_memory(cell, split.rows(rank), (cell.heads, cell.kv_heads), plan.ordered.segments)
            order = plan.ordered.rows
            opened = len(order.rows) * cell.shape.opened_values(cell.heads) * cell.element_bytes
            return AttentionMemory(gathered, padded + (0 if order.is_identity else len(order.rows) * row), merge, transient + opened)
        segments = [*plan.own, *plan.cached, *plan.remote]
        merge, transient = calls_memory(cell, split.rows(rank), (cell.heads // groups, cell.kv_heads // groups), segments)
        grouped = split.rows(rank) * (cell.heads * cell.shape.v_dim * cell.element_bytes + row) if groups > 1 else 0  # output and packed rows
        opened = (plan.cached_rows + cell.layout.cp * split.max_rows) * cell.shape.opened_values(cell.heads) * cell.element_bytes
        return AttentionMemory(new_rows=gathered, buffers=padded, merge=merge, transient=transient + grouped + opened)

    def opened_rows(self, cell: Cell, rank: int) -> int:
        plan = self.plan(cell, rank)
        if plan.ordered is not None:
            return len(plan.ordered.rows.rows)
        return cell.split.rows(rank) + 2 * plan.cached_rows + cell.layout.cp * plan.max_rows


class _Gather:
    """The gather of a step's rows, or of those of one group of kv heads, in flight from the start. `lane` names its part of the cache."""

    def __init__(self, rows_nW: Tensor, plan: GatherPlan, context: Context, lane: int) -> None:
        self.rows_nW, self.plan, self.context, self.lane = rows_nW, plan, context, lane
        n, width = rows_nW.shape
        self.gathered = context.cache.get(lane, (plan.cached_rows + context.group.size * plan.max_rows, width), rows_nW)
        block = rows_nW
        if n < plan.max_rows:  # uneven ranks: the collective needs equal blocks
            block = context.buffers.get(f"comm_padded{lane % plan.head_groups}", (plan.max_rows, width), rows_nW)
            block[:n].copy_(rows_nW)
        with GATHER_KV():
            self.in_flight = context.group.all_gather(self.gathered[plan.cached_rows :], block)

    def arrived(self) -> Tensor:
        """Wait: the cached rows, and then those of all ranks in rank order."""
        self._cached()
        self._wait()
        self.context.cache.write(self.lane, self.gathered)
        return self.gathered

    def attend(self, q_THD: Tensor, open_rows: OpenRows) -> Tensor:
        """Attention to what is here while the rest is on its way: out [T, H, E]. Valid until the next group has attended."""
        from cpbench.kernels.accumulate import Accumulator

        if self.plan.ordered is not None:
            return self._in_order(q_THD, open_rows, self.plan.ordered)
        size, shape = self.context.cache.page_size, self.context.shape
        if self.plan.requests and size and not shape.opened and self.context.kernel.reads_pages(size, shape.qk_dim, shape.v_dim):
            return self._in_pages(q_THD, open_rows)
        cache, context, plan = self.context.cache, self.context, self.plan
        result = Accumulator(q_THD.shape[0], self.context.buffers)
        context.attend(q_THD, *open_rows(self.rows_nW), plan.own, result)
        if plan.cached_rows:
            context.attend(q_THD, *open_rows(self._cached()), plan.cached, result)
        self._wait()
        context.attend(q_THD, *open_rows(self.gathered), plan.remote, result)
        cache.write(self.lane, self.gathered)
        return result.result()

    def _in_order(self, q_THD: Tensor, open_rows: OpenRows, ordered: OrderedKeys) -> Tensor:
        """All rows in the order of positions, then one call for each block of queries."""
        from cpbench.kernels.accumulate import Accumulator

        result = Accumulator(q_THD.shape[0], self.context.buffers)
        k, v = open_rows(in_position_order(self.arrived(), ordered.rows, self.context.buffers, "comm_ordered"))
        self.context.attend(q_THD, k, v, ordered.segments, result)
        return result.result()

    def _cached(self) -> Tensor:
        """The cached rows, in front of those that arrive."""
        cached = self.gathered[: self.plan.cached_rows]
        if self.plan.cached_rows:
            self.context.cache.read(self.lane, cached)
        return cached

    def _in_pages(self, q_THD: Tensor, open_rows: OpenRows) -> Tensor:
        """Everything into pages, then one call over all blocks of queries."""
        cache = self.context.cache
        self._wait()
        cache.write(self.lane, self.gathered)
        pages = cache.pages(self.lane, self.rows_nW.shape[1], self.rows_nW)
        k, v = (x.unflatten(0, pages.shape[:2]) for x in open_rows(pages.flatten(0, 1)))
        with KERNEL():
            return self.context.kernel.attend_pages(q_THD, k, v, cache.tables, self.plan.requests, self.context.scale)[0]

    def _wait(self) -> None:
        with GATHER_KV():
            self.in_flight.wait()
