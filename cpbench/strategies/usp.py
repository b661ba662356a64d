"""USP: Ulysses among neighbours, a ring between them (arXiv 2405.07719). `cp8u4` is Ulysses 4 x ring 2, also written u4r2.

The ring splits the tokens by the partition; the ranks of one ring place share its tokens in order and exchange them for heads. What
arrives is the place's rows in the order that the ring uses, so nothing is reordered. Fast links carry the all-to-all, slow ones the ring.

    cp=4, u=2, r=2, zigzag      place 0 holds blocks 0 3: ranks 0 and 1, half of the rows each; then all rows, half of the heads each
                                place 1 holds blocks 1 2: ranks 2 and 3
    rings                       ranks 0 and 2 (first heads), ranks 1 and 3 (second heads)

A rank keeps the tokens of its place for the kv heads of its shard: the K/V cache is split over all ranks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpbench.cell import Cell
from cpbench.distributed.traffic import Traffic
from cpbench.partition import Blocks, split
from cpbench.segments import PlacedBlock, place
from cpbench.strategies.base import AttentionMemory, Context, Strategy, calls_memory, spread_cache
from cpbench.strategies.ring import Step, arriving_rows, attended_rows, ring_steps, run_ring
from cpbench.strategies.ulysses import TO_HEADS, TO_TOKENS, Exchange, head_shards, undivided_heads

if TYPE_CHECKING:
    from torch import Tensor

    from cpbench.strategies.base import OpenRows


@dataclass(frozen=True)
class UspPlan:
    """The exchange among the ranks of a place, and the steps of its ring."""

    exchange: Exchange
    steps: tuple[Step, ...]


class Usp(Strategy):
    name = "usp"
    summary = "Ulysses among neighbours, a ring between them: --strategy u4r2 or a layout such as cp8u4 gives the degrees"
    partitions = ("zigzag", "contiguous", "interleave")
    divides_group = True

    def check(self, cell: Cell) -> str | None:
        return super().check(cell) or undivided_heads(cell, "u", cell.layout.ulysses)

    def cached(self, cell: Cell, rank: int) -> Blocks:
        return spread_cache(cell, cell.layout.ring, rank // cell.layout.ulysses)

    def cache_heads(self, cell: Cell, rank: int) -> tuple[tuple[int, ...], ...]:
        degree = cell.layout.ulysses
        return (head_shards(cell.heads, cell.kv_heads, degree).kv_sources[rank % degree],)

    def stored(self, cell: Cell, rank: int) -> list[PlacedBlock]:
        return place(_places(cell)[rank // cell.layout.ulysses], sum(block.rows for block in self.cached(cell, rank)))

    def plan(self, cell: Cell, rank: int) -> UspPlan:
        degree = cell.layout.ulysses
        place_here = rank // degree
        members = range(place_here * degree, (place_here + 1) * degree)
        cached = [spread_cache(cell, cell.layout.ring, index) for index in range(cell.layout.ring)]
        exchange = Exchange(
            rows=tuple(cell.split.rows(member) for member in members),
            shards=head_shards(cell.heads, cell.kv_heads, degree),
            cached_rows=sum(block.rows for block in cached[place_here]),
        )
        return UspPlan(exchange, ring_steps(list(zip(cached, _places(cell), strict=True)), place_here))

    def attend(self, q_THD: Tensor, rows_SW: Tensor, open_rows: OpenRows, plan: UspPlan, context: Context, layer: int) -> Tensor:
        exchange, ulysses = plan.exchange, context.groups.ulysses
        with TO_HEADS():
            q_all, kv_all = exchange.to_heads(q_THD, rows_SW, context, ulysses, layer)
        heads = exchange.heads(ulysses.rank)
        out = run_ring(q_all, kv_all, lambda rows, _=None: open_rows(rows, heads), plan.steps, context, context.groups.ring)
        with TO_TOKENS():
            return exchange.to_tokens(out, context, ulysses)

    def traffic(self, cell: Cell, rank: int) -> Traffic:
        plan = self.plan(cell, rank)
        traffic = Traffic()
        if cell.layout.ulysses > 1:
            traffic = plan.exchange.traffic(cell, rank % cell.layout.ulysses, "ulysses")
        received = sum(step.next_rows or 0 for step in plan.steps)
        if received:
            traffic.add("ring", "send_recv", received * _row_bytes(cell, plan.exchange), len(plan.steps) - 1)
        return traffic

    def attended_heads(self, cell: Cell) -> int:
        return cell.heads // cell.layout.ulysses

    def score_pairs(self, cell: Cell, rank: int) -> int:
        tokens = sum(block.causal_pairs for block in _places(cell)[rank // cell.layout.ulysses])
        return tokens * (cell.heads // cell.layout.ulysses)

    def memory(self, cell: Cell, rank: int) -> AttentionMemory:
        plan = self.plan(cell, rank)
        shards, exchange = plan.exchange.shards, plan.exchange
        kept, exchanged, all_tokens, own = exchange.memory(cell, rank % cell.layout.ulysses)
        segments = [segment for step in plan.steps for segment in step.segments]
        merge, attend = calls_memory(cell, sum(exchange.rows), (shards.q_heads, shards.kv_heads), segments)
        arriving = arriving_rows(plan.steps) * _row_bytes(cell, exchange)
        opened = max(self._rows_by_step(plan)) * cell.shape.opened_values(shards.q_heads) * cell.element_bytes
        return AttentionMemory(kept, exchanged + arriving, merge, max(attend + opened, all_tokens + own))

    def opened_rows(self, cell: Cell, rank: int) -> int:
        """For this rank's heads only."""
        return sum(self._rows_by_step(self.plan(cell, rank)))

    def _rows_by_step(self, plan: UspPlan) -> list[int]:
        return attended_rows(plan.exchange.cached_rows + sum(plan.exchange.rows), plan.steps)


def hybrid_degrees(name: str) -> tuple[int, int] | None:
    """`u4r2` -> (4, 2): the Ulysses and the ring degree. None for any other text."""
    found = re.fullmatch(r"u([1-9]\d{0,3})r([1-9]\d{0,3})", name)
    return (int(found[1]), int(found[2])) if found else None


def default_degree(heads: int, kv_heads: int, cp: int) -> int:
    """The Ulysses degree of a hybrid that was not told one, for the heads of a tensor-parallel rank.

    The largest proper divisor of `cp` that divides the query heads, of those that need no kv head twice where there are any above 1. Two
    ranks have no proper hybrid: they exchange heads where they can.
    """
    if cp == 2:
        return 2 if heads % 2 == 0 else 1
    degrees = [degree for degree in range(1, cp) if cp % degree == 0 and heads % degree == 0]
    return max((degree for degree in degrees if 1 < degree <= kv_heads), default=max(degrees, default=1))


def _places(cell: Cell) -> list[Blocks]:
    """The blocks of each ring place."""
    return list(split(cell.partition, cell.lengths, cell.layout.ring, cell.prefixes).ranks)


def _row_bytes(cell: Cell, exchange: Exchange) -> int:
    """Bytes of a token's row for this rank's heads."""
    return exchange.shards.kv_heads * cell.shape.part_values * cell.element_bytes
