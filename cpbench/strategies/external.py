"""Adapters to libraries of context-parallel attention, where they are installed on CUDA: ring-flash-attn, yunchang, TransformerEngine.

Each calls the function that a user of the library would call for a causal forward pass, with its defaults, and adds nothing but the
layout that it asks for. Read were ring-flash-attn 0.1.8, yunchang 0.6.4 and TransformerEngine 2.20.2.

    ring-flash-attn     zigzag_ring_flash_attn_func, [B, S, H, D]; sequences of different lengths: zigzag_ring_flash_attn_varlen_func
    yunchang-ulysses    UlyssesAttention, [1, S, H, D]: what it gathers must be in order, so rows are contiguous and of one sequence
    te-p2p, te-all-gather, te-a2a    DotProductAttention with a group, [B, S, H, D], zigzag for all three ways to communicate

yunchang's rings are those of ring-flash-attn, and its hybrid makes process groups of its own for the whole world: neither is offered.
All of them run FlashAttention (TransformerEngine: or cuDNN) whichever kernel the cell names.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib import import_module
from itertools import accumulate
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cpbench.cell import Cell
from cpbench.layout import nearest_divisor
from cpbench.strategies.base import Context
from cpbench.strategies.library import LibraryPlan, LibraryStrategy, missing

if TYPE_CHECKING:
    from torch import Tensor

    from cpbench.strategies.base import OpenRows

HALF_PRECISION = ("bfloat16", "float16")


class ExternalStrategy(LibraryStrategy):
    """A package that is not a dependency of cpbench and runs on CUDA only."""

    brings_kernels = True
    modules: tuple[str, ...]
    install: str

    def available(self, device: str, dtype: str) -> str | None:
        if device != "cuda":
            return f"it runs on cuda, not on {device}"
        if dtype not in HALF_PRECISION:
            return f"it takes {' and '.join(HALF_PRECISION)}, not {dtype}; use bfloat16"
        return missing(self.modules, self.install)


class RingFlashAttn(ExternalStrategy):
    name = "ring-flash-attn"
    summary = "the zigzag ring of the package ring-flash-attn, on FlashAttention 2"
    modules = ("ring_flash_attn", "flash_attn")
    install = "install them with pip install --no-build-isolation ring-flash-attn flash-attn (which needs nvcc)"
    uneven = True

    def attend(self, q_THD: Tensor, rows_SW: Tensor, open_rows: OpenRows, plan: LibraryPlan, context: Context, layer: int) -> Tensor:
        if len(set(plan.lengths)) == 1:
            return super().attend(q_THD, rows_SW, open_rows, plan, context, layer)
        return self._attend_packed(q_THD, *open_rows(rows_SW), plan, context)

    def call(self, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, context: Context) -> Tensor:
        ring, group = import_ring_flash_attn().zigzag_ring_flash_attn_func, context.group.process_group
        out: Tensor = ring(q_BSHD, k_BSGD, v_BSGE, softmax_scale=context.scale, causal=True, group=group)
        return out

    def _attend_packed(self, q_nHD: Tensor, k_nGD: Tensor, v_nGE: Tensor, plan: LibraryPlan, context: Context) -> Tensor:
        """Sequences one after the other, each as its early and its late block: the rows are put into this order and back."""
        import torch

        order = torch.tensor(packed_order(plan.lengths), device=q_nHD.device)
        cu_seqlens = torch.tensor([0, *accumulate(plan.lengths)], dtype=torch.int32, device=q_nHD.device)
        q, k, v = (x.index_select(0, order) for x in (q_nHD, k_nGD, v_nGE))
        with context.group.foreign():
            out = import_ring_flash_attn().zigzag_ring_flash_attn_varlen_func(
                q, k, v, cu_seqlens, max(plan.lengths), softmax_scale=context.scale, causal=True, group=context.group.process_group
            )
        rows: Tensor = torch.empty_like(out).index_copy_(0, order, out)
        return rows


class YunchangUlysses(ExternalStrategy):
    name = "yunchang-ulysses"
    summary = "UlyssesAttention of the package yunchang (long-context-attention), on FlashAttention 2"
    partitions = ("contiguous",)
    modules = ("yunchang", "flash_attn")
    install = "install them with pip install --no-build-isolation yunchang flash-attn (which needs nvcc)"

    def check(self, cell: Cell) -> str | None:
        if len(cell.lengths) > 1:
            return f"{self.name} needs one sequence, not {len(cell.lengths)}: it gathers contiguous pieces of each; use ulysses, or batch=1"
        return super().check(cell) or head_refusal(self.name, cell)

    def call(self, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, context: Context) -> Tensor:
        out: Tensor = _yunchang(context.group.process_group)(q_BSHD, k_BSGD, v_BSGE, softmax_scale=context.scale, causal=True)
        return out

    def score_pairs(self, cell: Cell, rank: int) -> int:
        return sum(block.causal_pairs for block in cell.split.whole) * (cell.heads // cell.layout.cp)


class TransformerEngine(ExternalStrategy):
    """One of the ways to communicate that TransformerEngine has."""

    modules = ("transformer_engine",)
    install = "install it with pip install --no-build-isolation 'transformer-engine[pytorch]' (which needs nvcc)"

    def __init__(self, name: str, comm_type: str, how: str) -> None:
        self.name, self._comm_type = name, comm_type
        self.summary = f"DotProductAttention of TransformerEngine, {how}"

    def check(self, cell: Cell) -> str | None:
        return super().check(cell) or (head_refusal(self.name, cell) if self._comm_type == "a2a" else None)

    def call(self, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, context: Context) -> Tensor:
        heads, dims = (q_BSHD.shape[2], k_BSGD.shape[2]), (q_BSHD.shape[3], v_BSGE.shape[3])
        attention = _transformer_engine(self._comm_type, heads, dims, context.scale, context.group.process_group, context.group.ranks)
        out_BSM = attention(*(x.contiguous() for x in (q_BSHD, k_BSGD, v_BSGE)), qkv_format="bshd", attn_mask_type="causal")
        out: Tensor = out_BSM.unflatten(2, (heads[0], dims[1]))
        return out

    def score_pairs(self, cell: Cell, rank: int) -> int:
        if self._comm_type != "a2a":
            return super().score_pairs(cell, rank)
        return sum(block.causal_pairs for block in cell.split.whole) * (cell.heads // cell.layout.cp)


def head_refusal(name: str, cell: Cell) -> str | None:
    """Why heads cannot be exchanged: these libraries replicate no kv head."""
    if cell.kv_heads % cell.layout.cp == 0 and cell.heads % cell.layout.cp == 0:
        return None
    near = nearest_divisor(cell.layout.cp, cell.kv_heads)
    return f"{name} needs kv heads that divide over cp={cell.layout.cp}, not {cell.kv_heads}; the nearest degree is cp={near}, or use ulysses"


def packed_order(lengths: tuple[int, ...]) -> list[int]:
    """For each row of sequences that lie one after the other, its place among rows that hold all early blocks and then all late ones."""
    halves = [length // 2 for length in lengths]
    starts, late = [0, *accumulate(halves)], sum(halves)
    pieces = [(start + offset, half) for start, half in zip(starts, halves, strict=False) for offset in (0, late)]
    return [row for first, rows in pieces for row in range(first, first + rows)]


def import_ring_flash_attn() -> Any:
    """The package, also beside a transformers that its Hugging Face adapter cannot use (0.1.8 needs one below 5): nothing here needs that one."""
    try:
        return import_module("ring_flash_attn")
    except ImportError as error:
        if "transformers" not in str(error):
            raise
    adapters: Any = ModuleType("ring_flash_attn.adapters")
    adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = None
    sys.modules[adapters.__name__] = adapters
    return import_module("ring_flash_attn")


@lru_cache(maxsize=4)
def _yunchang(group: Any) -> Any:
    """The module for a group, made once."""
    from yunchang import UlyssesAttention

    return UlyssesAttention(sequence_process_group=group)


@lru_cache(maxsize=4)
def _transformer_engine(comm_type: str, heads: tuple[int, int], dims: tuple[int, int], scale: float, group: Any, ranks: tuple[int, ...]) -> Any:
    """The module for a shape and a group, made once. It stays in training mode, in which every backend returns what a ring merges by."""
    import torch
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        heads[0],
        dims[0] if dims[0] == dims[1] else dims,
        num_gqa_groups=heads[1],
        attention_dropout=0.0,
        qkv_format="bshd",
        attn_mask_type="causal",
        cp_group=group,
        cp_global_ranks=list(ranks),
        cp_stream=torch.cuda.Stream(),
        cp_comm_type=comm_type,
        softmax_scale=scale,
    )
