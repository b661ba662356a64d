"""Attention on DTensors through PyTorch's `local_map`: heads sharded over tp, tokens over cp, and cp's gather of K and V inside the local region.

The rest of a layer is ours and works on plain tensors: a rank's q, K and V are wrapped as its shards of DTensors [B, S, H, D] on the mesh of
cp x tp, and its output is unwrapped. Within the region everything is local again: K and V of all ranks of cp are gathered in one functional
collective and put in order, and every block of queries attends, bottom-right causal, to the keys up to its own last one.

    cp2tp2, zigzag              heads: tp 0   tp 1        in the region of rank 2, whose blocks are 1 and 2
        tokens: cp 0, blocks 0 3    rank 0    rank 1          gathered    0 3 1 2  ->  0 1 2 3
                cp 1, blocks 1 2    rank 2    rank 3          block 1     sees 0 1
                                                              block 2     sees 0 1 2

Where tp is above the kv heads, K and V are DTensors of tp heads, each kv head repeated for the ranks that share it.

With `compile`, all of this is one graph of torch.compile with a dynamic number of tokens per block, which is read from the local tensors:
the length of a DTensor is a product of it, and dividing that again leaves the tracer with another expression for the same number. The kernel is
one operator in the graph, as serving engines have it, so that none is traced; what it pads its rows by is cut off inside, and no padded length
exists outside. The graph holds what it was made for (mesh, placements, order, scale) and is found by that; the kernel is looked up in each call.
`local_map` and the functional collectives are experimental: this relies on what PyTorch 2.11 to 2.13 have of them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from types import FunctionType
from typing import TYPE_CHECKING, Any

from cpbench.cell import NOT_COMPILED, Cell
from cpbench.segments import Segment, Span
from cpbench.strategies.base import AttentionMemory, Context, calls_memory, row_values
from cpbench.strategies.library import BatchStrategy, LibraryPlan, as_rows
from cpbench.tracing.spans import LIBRARY

if TYPE_CHECKING:
    from torch import Tensor

    from cpbench.distributed.mesh import Groups
    from cpbench.kernels.base import Kernel
    from cpbench.strategies.base import OpenRows

SHARDED = {"cp": 1, "tp": 2}  # the dimension of [B, S, H, D] that an axis divides
BLOCKS = 1  # the dimension of [B, P, b, H, D] that is this rank's blocks of a sequence
TOKENS = 2  # and the one that is the tokens of a block

Attention = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]


@dataclass(frozen=True)
class LocalMapPlan(LibraryPlan):
    """`order`: where each block of a sequence lies among those that were gathered; `own`: the blocks of this rank, by their place in it."""

    order: tuple[int, ...]
    own: tuple[int, ...]
    compile: str


@dataclass(frozen=True)
class Mesh:
    """The ranks that share a batch: (axis, process group) of every axis with more than one, and their numbers in the world, row by row."""

    axes: tuple[tuple[str, Any], ...]
    sizes: tuple[int, ...]
    ranks: tuple[int, ...]
    device: str


@dataclass(frozen=True)
class Region:
    """All that a local region is made for; lengths are not among it."""

    mesh: Mesh
    order: tuple[int, ...]
    own: tuple[int, ...]
    scale: float
    compile: str


class LocalMap(BatchStrategy):
    name = "local-map"
    summary = "DTensors and PyTorch's local_map, one all-gather of K and V inside the region, which may be compiled"
    partitions = ("zigzag", "contiguous")
    shards_heads = True
    compiles = True

    def check(self, cell: Cell) -> str | None:
        if cell.layout.cp == cell.layout.tp == 1:
            return f"{self.name} shards heads or tokens, and {cell.layout} has one rank for both; use none, or tp=2"
        if cell.partition == "contiguous" and cell.layout.cp > 1 and len(cell.lengths) > 1:
            return f"{self.name} needs a part of every sequence on each rank; use --partition zigzag, or batch=1"
        return super().check(cell)

    def plan(self, cell: Cell, rank: int) -> LocalMapPlan:
        batch = super().plan(cell, rank)
        blocks = [[block.start // block.rows for block in blocks if block.sequence == 0] for blocks in cell.split.ranks]
        gathered = [block for mine in blocks for block in mine]
        order = tuple(gathered.index(block) for block in range(len(gathered)))
        return LocalMapPlan(batch.sequences, batch.blocks, batch.lengths, order, tuple(blocks[rank]), cell.compile)

    def attend(self, q_THD: Tensor, rows_SW: Tensor, open_rows: OpenRows, plan: LocalMapPlan, context: Context, layer: int) -> Tensor:
        region = Region(_mesh(context.groups, q_THD.device.type), plan.order, plan.own, context.scale, plan.compile)
        if context.group.is_watched:
            region = replace(region, compile=NOT_COMPILED)
        blocks = [x.unflatten(0, (plan.blocks, plan.sequences, -1)).transpose(0, 1) for x in (q_THD, *open_rows(rows_SW))]
        if region.compile != NOT_COMPILED:
            _mark_dynamic(blocks)
        token = _KERNEL.set(context.kernel)
        try:
            with LIBRARY(), context.group.foreign():
                return as_rows(_attention(region)(*blocks), plan)
        finally:
            _KERNEL.reset(token)

    def memory(self, cell: Cell, rank: int) -> AttentionMemory:
        """K and V as gathered and in order; or those in order, the outputs of all blocks but the last, and the kernel's call for it."""
        n, cp, size = cell.split.rows(rank), cell.layout.cp, cell.element_bytes
        plan = self.plan(cell, rank)
        rows, output = n * row_values(cell) * size, n * cell.heads * cell.config.head_dim * size
        ordered = rows * cp if cp > 1 else 0
        queries = plan.lengths[0] // plan.blocks
        keys, block = queries * (max(plan.own) + 1), output * queries // n
        earlier = (Span(0, keys - queries),) if keys > queries else ()
        merge, attend = calls_memory(cell, queries, (cell.heads, cell.kv_heads), [Segment(Span(0, queries), earlier, Span(keys - queries, keys))])
        call = max(attend, merge + block)  # what merges is made behind the kernel's last copies, and let go
        batched = output + rows if plan.sequences * plan.blocks > plan.blocks > 1 else 0
        return AttentionMemory(transient=batched + max(2 * ordered, ordered + output - block + call, 2 * output + ordered))


def _mesh(groups: Groups, device: str) -> Mesh:
    """The ranks of cp and tp around this one."""
    layout, place = groups.layout, groups.place
    parts = [(axis, group) for axis, group in (("cp", groups.cp), ("tp", groups.tp)) if group.size > 1]
    ranks = tuple(layout.rank_of(place.pp, place.dp, cp, tp) for cp in range(layout.cp) for tp in range(layout.tp))
    handles = tuple((axis, group.process_group) for axis, group in parts)
    return Mesh(handles, tuple(group.size for _, group in parts), ranks, "cpu" if device == "meta" else device)  # PyTorch knows no mesh of meta


def _mark_dynamic(blocks: list[Tensor]) -> None:
    """The tokens of a block may be another number in the next call; one token is a case of its own for the tracer."""
    import torch._dynamo

    for x in blocks:
        if x.shape[TOKENS] > 1:
            torch._dynamo.mark_dynamic(x, TOKENS)


@lru_cache(maxsize=64)
def _attention(region: Region) -> Attention:
    """Attention [B, S, H, E] of a rank's blocks of q, K and V [B, P, b, H, D], through DTensors."""
    import torch
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.distributed.tensor.experimental import local_map

    axes = [axis for axis, _ in region.mesh.axes]
    ranks = torch.tensor(region.mesh.ranks).view(region.mesh.sizes)
    mesh = DeviceMesh.from_group([group for _, group in region.mesh.axes], region.mesh.device, ranks, mesh_dim_names=tuple(axes))
    placements = tuple(Shard(SHARDED[axis]) for axis in axes)
    mapped: Any = local_map(_local(region), out_placements=list(placements), in_placements=(placements,) * 3, device_mesh=mesh)

    def attention(q_BPbHD: Tensor, k_BPbGD: Tensor, v_BPbGE: Tensor) -> Tensor:
        shards = [x.flatten(BLOCKS, TOKENS) for x in (q_BPbHD, k_BPbGD, v_BPbGE)]
        q, k, v = (DTensor.from_local(x, mesh, placements, run_check=False) for x in shards)
        out: Tensor = mapped(q, k, v).to_local()
        return out

    if region.compile == NOT_COMPILED:
        return attention
    # Compiled code is kept, and limited in number, by code object: each region has its own.
    own = FunctionType(attention.__code__.replace(), globals(), attention.__name__, None, attention.__closure__)
    compiled: Attention = torch.compile(own, fullgraph=True, backend=region.compile)
    return compiled


def _local(region: Region) -> Attention:
    """What runs on local tensors [B, S, H, D]."""
    import torch

    own, order, scale = region.own, region.order, region.scale
    group = dict(region.mesh.axes).get("cp")
    ranks = len(order) // len(own)
    all_gather = _all_gather()
    attend: Callable[[Tensor, Tensor, Tensor, float], Tensor] = _attend if region.compile == NOT_COMPILED else _operator()

    def of_all_ranks(k_BSGD: Tensor, v_BSGE: Tensor) -> tuple[Tensor, ...]:
        """K and V of whole sequences; what was gathered is let go before anything attends to them."""
        gathered = all_gather(torch.stack([k_BSGD, v_BSGE]), group).unflatten(0, (ranks, 2)).unflatten(3, (len(own), -1))
        blocks = gathered.movedim(3, 1).flatten(0, 1)  # [blocks, 2, B, b, G, D] as they came
        return torch.cat([blocks[place] for place in order], 2).unbind()

    def local(q_BSHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor) -> Tensor:
        q_BPbHD = q_BSHD.unflatten(1, (len(own), -1))
        batch, tokens = q_BPbHD.shape[0], q_BPbHD.shape[TOKENS]
        k, v = (k_BSGD, v_BSGE) if group is None else of_all_ranks(k_BSGD, v_BSGE)
        outs = [
            attend(q_BPbHD[sequence, place], k[sequence, : (block + 1) * tokens], v[sequence, : (block + 1) * tokens], scale)
            for sequence in range(batch)
            for place, block in enumerate(own)
        ]
        out_BSHE: Tensor = torch.cat(outs).unflatten(0, (batch, len(own) * tokens))
        return out_BSHE

    return local


def _all_gather() -> Callable[[Tensor, Any], Tensor]:
    """The functional all-gather along the first dimension, which can be traced. torch 2.13 renamed it and warns on the old name."""
    collectives: Any = import_module("torch.distributed._functional_collectives")
    gather = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor

    def gathered(x: Tensor, group: Any) -> Tensor:
        whole: Tensor = collectives.wait_tensor(gather(x, 0, group))
        return whole

    return gathered


_KERNEL: ContextVar[Kernel] = ContextVar("kernel")  # of the call at hand


def _attend(q_THD: Tensor, k_SGD: Tensor, v_SGE: Tensor, scale: float) -> Tensor:
    """Attention [T, H, E] of the last T of S tokens, bottom-right causal, by the kernel of the call at hand, without rows that it added."""
    rows, keys = q_THD.shape[0], k_SGD.shape[0]
    out, _ = _KERNEL.get().varlen_block(q_THD, k_SGD, v_SGE, (0, rows), (0, keys), scale, True)
    return out[:rows].contiguous()


@lru_cache(maxsize=1)
def _operator() -> Any:
    """`_attend` as an operator that graphs call and do not look into."""
    import torch

    schema = "(Tensor q, Tensor k, Tensor v, float scale) -> Tensor"
    operator = torch.library.custom_op("cpbench::attend", _attend, mutates_args=(), schema=schema)
    operator.register_fake(lambda q, k, v, scale: q.new_empty(q.shape[0], q.shape[1], v.shape[2]))
    return torch.ops.cpbench.attend
