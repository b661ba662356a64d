"""What one device computes for a cell: the truth in fp64, the yardstick in the cell's dtype, and what ranks would answer without each other.

The yardstick rounds where the layout rounds: the same tensor-parallel partial sums, without context parallelism. What follows from the
distances between these answers and that of the ranks is decided in numerics.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from cpbench.cell import Cell
from cpbench.kernels import load_kernel
from cpbench.kernels.accumulate import Accumulator
from cpbench.kernels.base import Kernel
from cpbench.layout import Layout
from cpbench.partition import packed
from cpbench.program import Program, alone, run_locally
from cpbench.segments import causal_segments, place
from cpbench.strategies import STRATEGIES
from cpbench.strategies.base import cached_rows, laid_out, row_index

KEPT = 8  # answers; those of one batch for two dtypes and two tensor-parallel degrees


@dataclass(frozen=True)
class Solution:
    """Rows [N, M] in packed order; of a prefill also the logits [batch, V], the first tokens and their margins."""

    rows: Tensor
    logits: Tensor | None = None
    tokens: tuple[int, ...] = ()
    margins: tuple[float, ...] = ()


class OneDevice:
    """One device, and its latest answers: cells that differ in context parallelism only share them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kept: dict[tuple[object, ...], Solution] = {}

    def truth(self, cell: Cell) -> Solution:
        """The cell in fp64 on one rank, from the values that the cell's dtype can hold."""
        single, rounded_to = _single(cell, Layout(), "float64"), getattr(torch, cell.dtype)
        return self._get((single, cell.dtype), lambda: _solve(single, load_kernel("reference"), self.device, rounded_to))

    def yardstick(self, cell: Cell, kernel: Kernel) -> Solution:
        """The cell in its dtype with its tensor-parallel sums."""
        single = _single(cell, Layout(tp=cell.layout.tp), cell.dtype)
        return self._get((single, kernel.name), lambda: _solve(single, kernel, self.device, None))

    def own_tokens_only(self, cell: Cell) -> Tensor:
        """In fp64: the attention [N, M] in which every context-parallel rank sees its own tokens and what it has cached, in packed order."""
        kernel = load_kernel("reference")
        program = Program(_single(cell, Layout(), "float64"), alone(), kernel, self.device, rounded_to=getattr(torch, cell.dtype))
        q_THD, k_SGD, v_SGE = program.attention_inputs()
        cached_k, cached_v = program.cached_inputs(0)
        starts = [0, *accumulate(cell.prefixes)]
        rows = torch.empty_like(q_THD)
        for rank in range(cell.layout.cp):
            blocks = cell.blocks(rank)
            before = STRATEGIES[cell.strategy].cached(cell.steps[0], rank)
            tokens = row_index(cell.packed_tokens(blocks), self.device)
            prefix = row_index([packed(block, starts[block.sequence]) for block, _ in cached_rows(before)], self.device)
            result = Accumulator(len(tokens), program.buffers)
            k, v = torch.cat([cached_k[prefix], k_SGD[tokens]]), torch.cat([cached_v[prefix], v_SGE[tokens]])
            kernel.attend(q_THD[tokens], k, v, causal_segments(place(blocks), laid_out(before, blocks)), program.scale, result)
            rows[tokens] = result.result()
        return rows.flatten(1)

    def _get(self, key: tuple[object, ...], solve: Callable[[], Solution]) -> Solution:
        solution = self._kept.pop(key, None) or solve()
        while len(self._kept) >= KEPT:
            del self._kept[next(iter(self._kept))]
        self._kept[key] = solution
        return solution


def _single(cell: Cell, layout: Layout, dtype: str) -> Cell:
    """The cell without context parallelism, and without what changes where K and V lie but no value."""
    plain = replace(cell, chunk=None, cache_tokens=None, page_size=None, head_groups=1)
    return replace(plain, layout=layout, strategy="none", partition="contiguous", dtype=dtype)


def _solve(cell: Cell, kernel: Kernel, device: torch.device, rounded_to: torch.dtype | None) -> Solution:
    outputs = [output for _, output in run_locally(cell, kernel, device, rounded_to)]
    rows = [output.rows.flatten(1) for output in outputs]
    whole = torch.cat(rows, 1) if cell.target == "attention" else rows[0]
    first = [output.first for output in outputs if output.first is not None]
    if not first:
        return Solution(whole)
    return Solution(whole, torch.cat([shard.logits_BV for shard in first], 1), tuple(first[0].tokens), tuple(first[0].margins))
