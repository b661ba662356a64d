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
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from cpbench.attention_shape import AttentionShape
from cpbench.cell import NOT_COMPILED, Cell
from cpbench.deterministic import attention_workspace
from cpbench.distributed.traffic import Traffic
from cpbench.partition import Block, Blocks, cut, split
from cpbench.segments import MERGE_BLOCK, MIN_ROWS_TO_COPY, PlacedBlock, Segment, place
from cpbench.tracing.spans import KERNEL

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from cpbench.buffers import Buffers
    from cpbench.cache import StepCache
    from cpbench.distributed.collectives import Group
    from cpbench.distributed.mesh import Groups
    from cpbench.kernels.accumulate import Accumulator
    from cpbench.kernels.base import Kernel
    from cpbench.visible import InOrder


class OpenRows(Protocol):
    """Turns rows into K [S, G, D] and V [S, G, E]: of all heads whose parts the rows have, or of some query heads `heads` of these."""

    def __call__(self, rows_SW: Tensor, heads: range | None = None, /) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Context:
    """What a strategy works with on one rank: the groups, the kernel, reused memory, the K/V cache of the step at hand, and sizes."""

    groups: Groups
    kernel: Kernel
    buffers: Buffers
    cache: StepCache
    scale: float
    shape: AttentionShape

    @property
    def group(self) -> Group:
        """All context-parallel ranks."""
        return self.groups.cp

    def attend(self, q_THD: Tensor, k_SGD: Tensor, v_SGE: Tensor, segments: Sequence[Segment], into: Accumulator) -> None:
        """Attention of query rows to key rows as the segments say, by the kernel."""
        with KERNEL():
            self.kernel.attend(q_THD, k_SGD, v_SGE, segments, self.scale, into)


class Strategy(ABC):
    """One algorithm. Instances hold no state. The cells they get run in one step: lengths, and prefixes that are cached."""

    name: str
    summary: str
    partitions: tuple[str, ...]  # the first is the default
    keeps_local_rows = False  # True: a rank's kept K/V are its own rows; False: the strategy writes what it keeps
    divides_group = False  # True: a hybrid, for layouts that cut the group in two
    brings_collectives = False  # True: another library communicates, so no formula predicts its traffic
    brings_kernels = False  # True: and attends, whichever kernel the cell names
    shards_heads = False  # True: also for layouts that divide nothing but heads
    compiles = False  # True: its attention can be compiled
    collects = False  # True: it can bring all rows that a rank's queries see, for attention that selects among them

    def available(self, device: str, dtype: str) -> str | None:
        """Why it cannot run on a kind of device or with a dtype at all, or what is not installed; None if it can. Imports nothing."""
        return None

    def check(self, cell: Cell) -> str | None:
        """Why this cell cannot run, with the nearest valid value; None if it can."""
        if cell.partition not in self.partitions:
            return f"{self.name} cannot use the {cell.partition} partition; use {self.partitions[0]}"
        if cell.layout.ulysses > 1 and not self.divides_group:
            return f"{self.name} does not divide its group as {cell.layout} says; use usp or the layout cp{cell.layout.cp}"
        if cell.compile != NOT_COMPILED and not self.compiles:
            return f"{self.name} has no compiled attention, which compile={cell.compile} asks for; the nearest valid value is compile={NOT_COMPILED}"
        if cell.shape.top_k and not self.collects:
            return f"{self.name} merges parts of attention, and {cell.config.name} selects among all keys at once; use allgather"
        return None

    def cached(self, cell: Cell, rank: int) -> Blocks:
        """The cached tokens that context-parallel rank `rank` has, for the heads of `cache_heads`: all of them, unless tokens are spread."""
        return tuple(Block(sequence, 0, prefix) for sequence, prefix in enumerate(cell.prefixes) if prefix)

    def cache_heads(self, cell: Cell, rank: int) -> tuple[tuple[int, ...], ...]:
        """Which kv heads of its tensor-parallel rank a rank caches: one entry per buffer or pool that it keeps for a layer."""
        return (tuple(range(cell.kv_heads)),)

    def stored(self, cell: Cell, rank: int) -> list[PlacedBlock]:
        """The new tokens whose K and V a rank keeps, and where they lie in the buffer that it keeps them from."""
        return place(cell.split.ranks[rank])

    @abstractmethod
    def plan(self, cell: Cell, rank: int) -> Any:
        """What context-parallel rank `rank` computes and moves: frozen data, made once per cell."""

    @abstractmethod
    def attend(self, q_THD: Tensor, rows_SW: Tensor, open_rows: OpenRows, plan: Any, context: Context, layer: int) -> Tensor:
        """Causal attention of this rank's queries to every visible token: out [T, H, E] in q's dtype.

        `rows_SW` are this rank's rows: where it keeps its own rows, the cached ones (placed as `cached_rows` says) and then the new ones.
        """

    def collected(self, cell: Cell, rank: int) -> list[PlacedBlock]:
        """Where the blocks that a rank's queries see lie in what `collect` brings: every token of a sequence up to its last one, once."""
        raise NotImplementedError

    def collect(self, rows_SW: Tensor, plan: Any, context: Context, layer: int) -> Callable[[], Tensor]:
        """Start to bring all rows that this rank's queries see: what waits for them, and returns them where `collected` says."""
        raise NotImplementedError

    @abstractmethod
    def traffic(self, cell: Cell, rank: int) -> Traffic:
        """What rank `rank` receives in one layer."""

    def score_pairs(self, cell: Cell, rank: int) -> int:
        """Score pairs of one layer on this rank, summed over its query heads."""
        return cell.split.causal_pairs(rank) * cell.heads

    def opened_rows(self, cell: Cell, rank: int) -> int:
        """Rows that this rank opens in one layer, for the query heads that it attends with: what that costs where it is not a view."""
        return sum(block.rows for block in self.cached(cell, rank)) + cell.split.rows(rank)

    def attended_heads(self, cell: Cell) -> int:
        """Query heads that a rank attends with."""
        return cell.heads

    @abstractmethod
    def memory(self, cell: Cell, rank: int) -> AttentionMemory:
        """Bytes that this strategy adds on rank `rank`."""


def cached_rows(cached: Blocks) -> list[PlacedBlock]:
    """Where cached blocks lie after they were read: sequences one after the other."""
    return place(sorted(cached, key=lambda block: block.sequence))


def laid_out(cached: Blocks, new: Blocks) -> list[PlacedBlock]:
    """Where blocks lie in a buffer of a rank's cached rows and then its new ones."""
    return [*cached_rows(cached), *place(new, sum(block.rows for block in cached))]


def spread_cache(cell: Cell, parts: int, index: int) -> Blocks:
    """Part `index` of the cached tokens where they are spread over `parts` places: a piece of each prefix, and the place's own earlier chunks."""
    chunks = [sum(sizes) for sizes in zip(*cell.earlier, strict=True)] if cell.earlier else [0] * len(cell.lengths)
    prefixes = tuple(prefix - done for prefix, done in zip(cell.prefixes, chunks, strict=True))
    blocks = [Block(sequence, *cut(prefix, parts)[index]) for sequence, prefix in enumerate(prefixes)]
    for lengths in cell.earlier:
        blocks += sorted(split(cell.partition, lengths, parts, prefixes).ranks[index], key=lambda block: block.start)
        prefixes = tuple(prefix + length for prefix, length in zip(prefixes, lengths, strict=True))
    return tuple(block for block in blocks if block.rows)


@dataclass(frozen=True)
class ParallelAttention:
    """A strategy with its plan and context: all that a model sees of context parallelism.

    Where a strategy keeps its own rows, cached rows lie before the new ones in one buffer, so that both travel as one.
    """

    strategy: Strategy
    plan: Any
    context: Context

    def rows(self, layer: int, shape: tuple[int, int], like: Tensor) -> Tensor:
        """Where the model writes this rank's K/V rows: in the cache if that is what the strategy keeps."""
        if self.strategy.keeps_local_rows and self.context.cache.keeps_rows_in_place:
            return self.context.cache.get(layer, shape, like)
        n, width = shape
        return self.context.buffers.get("rows", (self._cached + n, width), like)[self._cached :]

    def attend(self, q_THD: Tensor, rows_nW: Tensor, open_rows: OpenRows, layer: int) -> Tensor:
        """Causal attention of this rank's queries to every visible token: out [T, H, E] in q's dtype."""
        return self.strategy.attend(q_THD, self._with_cached(rows_nW, layer), open_rows, self.plan, self.context, layer)

    def _with_cached(self, rows_nW: Tensor, layer: int) -> Tensor:
        """This rank's rows with the cached ones in front, where it keeps its own."""
        cache, rows_SW = self.context.cache, rows_nW
        if self._cached:
            rows_SW = self.context.buffers.get("rows", (self._cached + rows_nW.shape[0], rows_nW.shape[1]), rows_nW)
            cache.read(layer, rows_SW[: self._cached])
        if self.strategy.keeps_local_rows:
            cache.write(layer, rows_nW)
        return rows_SW

    @property
    def _cached(self) -> int:
        """Cached rows before the new ones."""
        return self.context.cache.cached_rows if self.strategy.keeps_local_rows else 0


def row_values(cell: Cell) -> int:
    """Values per token that travel: K and V of one tensor-parallel rank, or what they are made from."""
    return cell.shape.row_values


def packed_heads(k_SGD: Tensor, v_SGE: Tensor) -> tuple[Tensor, OpenRows]:
    """Some heads of K and V as rows [S, W] of their own, and what opens such rows."""
    import torch

    rows_SW = torch.cat([k_SGD.flatten(1), v_SGE.flatten(1)], 1)
    return rows_SW, keys_and_values(k_SGD.shape[2])


def keys_and_values(dim: int) -> OpenRows:
    """Opens rows of K and then V, both of heads of size `dim`: views of as many heads as the rows have."""

    def open_rows(rows_SW: Tensor, heads: range | None = None, /) -> tuple[Tensor, Tensor]:
        k, v = rows_SW.chunk(2, 1)
        return k.unflatten(1, (-1, dim)), v.unflatten(1, (-1, dim))

    return open_rows


@dataclass(frozen=True)
class AttentionMemory:
    """Bytes that a strategy adds on a rank in one step.

    `new_rows`: a layer's buffer for K and V beside the rank's rows, which is what is kept where nothing is paged; `buffers` that travel
    and `merge` buffers: reused by every layer; `transient`: alive during `attend` beside q and the rank's rows.
    """

    new_rows: int = 0
    buffers: int = 0
    merge: int = 0
    transient: int = 0


def calls_memory(cell: Cell, rows: int, shards: tuple[int, int], segments: Sequence[Segment]) -> tuple[int, int]:
    """(buffers, transient) of running `segments` in this order into one result of `rows` rows.

    `shards`: query heads and parts of rows in the call. One call for all rows: its output. Else the first output and the latest one, and an
    fp32 accumulator where the dtype is narrower or the first call does not cover all rows (accumulate.py). While a kernel runs, its copies
    of K and V.
    """
    heads, parts = shards
    row, size = heads * cell.shape.v_dim, cell.element_bytes
    if cell.deterministic:
        return _whole_calls_memory(cell, rows, shards, segments)
    padded = heads * max(cell.shape.v_dim, cell.shape.qk_dim) if cell.device == "cpu" else row  # a view of what the kernel computed
    spans = [(s.queries.rows, span.rows) for s in segments for span in ([s.causal] if s.causal else []) + list(s.full)]
    costs = [queries * padded * size + _copied(cell, queries, keys, cell.shape.kv_heads(heads, parts)) for queries, keys in spans]
    whole, narrow = segments[0].queries.rows == rows, size < 4
    accumulator = 4 * rows * (row + heads) if not whole or (narrow and len(spans) > 1) else 0
    if len(spans) == 1:
        return accumulator, costs[0]
    largest = max(queries for queries, _ in spans[1:])
    scratch = 4 * min(largest, max(1, MERGE_BLOCK // row)) * row if narrow else 0
    first = rows * row * size if whole else 0  # in a narrow dtype it is gone once the accumulator has it
    return accumulator + scratch, max(costs[0], first + costs[1], (0 if narrow else first) + max(costs[1:]))


def _whole_calls_memory(cell: Cell, rows: int, shards: tuple[int, int], segments: Sequence[Segment]) -> tuple[int, int]:
    """The same where each segment is one call for all of its keys, and nothing is merged."""
    heads, parts = shards
    row, size, shape = heads * cell.shape.v_dim, cell.element_bytes, cell.shape
    joins = [sum(span.rows for span in s.keys) * shape.kv_heads(heads, parts) * (shape.qk_dim + shape.v_dim) * size * (len(s.keys) > 1) for s in segments]
    works = [attention_workspace(sum(span.rows for span in s.keys), shape.qk_dim + shape.v_dim, size) for s in segments]
    costs = [s.queries.rows * (row * size + heads * max(size, 4)) + join + work for s, join, work in zip(segments, joins, works, strict=True)]
    whole = len(segments) == 1 and segments[0].queries.rows == rows
    accumulator = 0 if whole else max(size, 4) * rows * (row + heads)
    return accumulator, max(costs)


def _copied(cell: Cell, queries: int, keys: int, kv_heads: int) -> int:
    """Bytes of K and V that the CPU kernel copies head by head for one call; fused CUDA kernels read them as they are.

    It knows one head size, and the smaller of K and V is padded to the larger.
    """
    dim_qk, dim_v = cell.shape.qk_dim, cell.shape.v_dim
    if cell.device != "cpu":
        return 0
    copies = 2 if queries >= MIN_ROWS_TO_COPY else int(dim_qk != dim_v)
    return keys * kv_heads * copies * max(dim_qk, dim_v) * cell.element_bytes


def in_position_order(rows_SW: Tensor, order: InOrder, buffers: Buffers, name: str) -> Tensor:
    """Collected rows in the order of sequences and positions, in a reused buffer of that name; a view where they came in it."""
    import torch

    if order.is_identity:
        return rows_SW[: len(order.rows)]
    ordered = buffers.get(name, (len(order.rows), rows_SW.shape[1]), rows_SW)
    return torch.index_select(rows_SW, 0, _index_of(order, rows_SW.device), out=ordered)


@lru_cache(maxsize=64)
def _index_of(order: InOrder, device: torch.device) -> Tensor:
    """An order as an index tensor. Kept, because every layer needs it."""
    import torch

    return torch.from_numpy(order.rows).to(device)


def row_index(ranges: Iterable[range], device: torch.device) -> Tensor:
    """The rows of the ranges, one after the other, as an index tensor."""
    import torch

    return torch.cat([torch.empty(0, dtype=torch.int64, device=device), *(torch.arange(r.start, r.stop, r.step, device=device) for r in ranges)])
