"""What a strategy is: one algorithm for attention across context-parallel ranks.

A strategy moves *rows*, an opaque payload of values per token, and asks `open_rows` to turn what arrived into K and V; so it never
knows the model. It decides once, from lengths that all ranks know, what each rank computes (`plan`), and then only executes that
(`attend`). Its formulas for traffic, work and memory stand next to the algorithm, and tests hold them against what is counted.

    n local rows   W values per row   T query rows   H query heads   G kv heads   D head size of q and k   E head size of v
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.cell import Cell
from cpbench.distributed.traffic import Traffic
from cpbench.partition import too_short
from cpbench.segments import MERGE_BLOCK, MIN_ROWS_TO_COPY, Segment

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cpbench.buffers import Buffers, KVCache
    from cpbench.distributed.collectives import Group
    from cpbench.kernels.base import Kernel

    OpenRows = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Context:
    """What a strategy works with on one rank: the group, the kernel, reused memory, and the kept K/V."""

    group: Group
    kernel: Kernel
    buffers: Buffers
    cache: KVCache
    scale: float


class Strategy(ABC):
    """One algorithm. Instances hold no state."""

    name: str
    summary: str
    partitions: tuple[str, ...]  # the first is the default
    keeps_local_rows = False  # True: a rank's kept K/V are its own rows; False: the strategy writes what it keeps

    def check(self, cell: Cell) -> str | None:
        """Why this cell cannot run, with the nearest valid value; None if it can."""
        if cell.partition not in self.partitions:
            return f"{self.name} cannot use the {cell.partition} partition; use {self.partitions[0]}"
        return too_short(cell.lengths, cell.layout.cp)

    @abstractmethod
    def plan(self, cell: Cell, rank: int) -> Any:
        """What context-parallel rank `rank` computes and moves: frozen data, made once per cell."""

    @abstractmethod
    def attend(self, q_THD: Tensor, rows_nW: Tensor, open_rows: OpenRows, plan: Any, context: Context, layer: int) -> Tensor:
        """Causal attention of this rank's queries to every visible token: out [T, H, E] in q's dtype."""

    @abstractmethod
    def traffic(self, cell: Cell, rank: int) -> Traffic:
        """What rank `rank` receives in one layer."""

    def score_pairs(self, cell: Cell, rank: int) -> int:
        """Score pairs of one layer on this rank, summed over its query heads."""
        return cell.split.causal_pairs(rank) * cell.heads

    @abstractmethod
    def memory(self, cell: Cell, rank: int) -> AttentionMemory:
        """Bytes that this strategy adds on rank `rank`."""


@dataclass(frozen=True)
class ParallelAttention:
    """A strategy with its plan and context: all that a model sees of context parallelism."""

    strategy: Strategy
    plan: Any
    context: Context

    def rows(self, layer: int, shape: tuple[int, int], like: Tensor) -> Tensor:
        """Where the model writes this rank's K/V rows: in the cache if that is what the strategy keeps."""
        if self.strategy.keeps_local_rows and self.context.cache.keep:
            return self.context.cache.get(layer, shape, like)
        return self.context.buffers.get("rows", shape, like)

    def attend(self, q_THD: Tensor, rows_nW: Tensor, open_rows: OpenRows, layer: int) -> Tensor:
        """Causal attention of this rank's queries to every visible token: out [T, H, E] in q's dtype."""
        return self.strategy.attend(q_THD, rows_nW, open_rows, self.plan, self.context, layer)


def row_values(cell: Cell) -> int:
    """Values per token that travel: K and V of one tensor-parallel rank."""
    return 2 * cell.kv_heads * cell.config.head_dim


@dataclass(frozen=True)
class AttentionMemory:
    """Bytes that a strategy adds on a rank: kept K/V per layer, buffers for good, and what is alive during `attend` beside q and rows."""

    cache: int = 0
    buffers: int = 0
    transient: int = 0


def calls_memory(cell: Cell, rows: int, shards: tuple[int, int], segments: Sequence[Segment]) -> tuple[int, int]:
    """(buffers, transient) of running `segments` in this order into one result of `rows` rows.

    `shards`: query and kv heads of the call. One call: its output. More: the first output and the latest one, and an fp32 accumulator
    where the dtype is narrower or the first call does not cover all rows (accumulate.py). While a kernel runs, its copies of K and V.
    """
    heads, _ = shards
    row, size = heads * cell.config.head_dim, cell.element_bytes
    spans = [(s.queries.rows, span.rows) for s in segments for span in ([s.causal] if s.causal else []) + list(s.full)]
    costs = [queries * row * size + _copied(cell, queries, keys, shards) for queries, keys in spans]
    if len(spans) == 1:
        return 0, costs[0]
    whole, narrow = segments[0].queries.rows == rows, size < 4
    accumulator = 4 * rows * (row + heads) if narrow or not whole else 0
    largest = max(queries for queries, _ in spans[1:])
    scratch = 4 * min(largest, max(1, MERGE_BLOCK // row)) * row if narrow else 0
    first = rows * row * size if whole else 0  # in a narrow dtype it is gone once the accumulator has it
    return accumulator + scratch, max(costs[0], first + costs[1], (0 if narrow else first) + max(costs[1:]))


def _copied(cell: Cell, queries: int, keys: int, shards: tuple[int, int]) -> int:
    """Bytes of K and V that a kernel copies for one call: head by head on CPU, repeated to all query heads by the fused CUDA operators."""
    value = 2 * cell.config.head_dim * cell.element_bytes
    if cell.device == "cpu":
        return keys * shards[1] * value if queries >= MIN_ROWS_TO_COPY else 0
    return keys * shards[0] * value if shards[0] > shards[1] else 0


def row_index(ranges: Iterable[range], device: torch.device) -> Tensor:
    """The rows of the ranges, one after the other, as an index tensor."""
    import torch

    return torch.cat([torch.empty(0, dtype=torch.int64, device=device), *(torch.arange(r.start, r.stop, device=device) for r in ranges)])


def nearest_divisor(size: int, of: int) -> int:
    """The divisor of `of` nearest to `size` (the smaller one where two are as near)."""
    return min((n for n in range(1, of + 1) if of % n == 0), key=lambda n: (abs(n - size), n))
