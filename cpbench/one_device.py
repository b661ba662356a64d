"""What one device computes for a cell: the truth in fp64, the yardstick in the cell's dtype, and what ranks would answer without each other.

The yardstick rounds where the layout rounds: the same partial sums of weights that are cut, without context parallelism and stages. What
follows from the distances between these answers and that of the ranks is decided in numerics.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from cpbench.cell import NOT_COMPILED, Cell
from cpbench.choices import ChoiceLog, Choices, Forced, choices_of
from cpbench.kernels import load_kernel
from cpbench.kernels.accumulate import Accumulator
from cpbench.kernels.base import Kernel
from cpbench.layout import Layout
from cpbench.program import Program, alone, run_locally
from cpbench.segments import causal_segments, place
from cpbench.strategies import STRATEGIES
from cpbench.strategies.base import cached_rows, laid_out, row_index

NOTHING = Forced()
KEPT = 8  # answers; those of one batch for two dtypes and two tensor-parallel degrees


@dataclass(frozen=True)
class Solution:
    """Rows [N, M] in packed order; of a prefill also the logits [batch, V], the first tokens and their margins."""

    rows: Tensor
    logits: Tensor | None = None
    tokens: tuple[int, ...] = ()
    margins: tuple[float, ...] = ()
    experts: Choices | None = None  # of the routers, whatever was used
    keys: Choices | None = None  # of the queries


class OneDevice:
    """One device, and its latest answers: cells that differ in context parallelism only share them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._kept: dict[tuple[object, ...], Solution] = {}

    def truth(self, cell: Cell, forced: Forced = NOTHING) -> Solution:
        """The cell in fp64 on one rank, from the values that the cell's dtype can hold, with these choices instead of its own."""
        single, rounded_to = _single(cell, Layout(), "float64"), getattr(torch, cell.dtype)
        key = single, cell.dtype, _bytes(forced)
        return self._get(key, lambda: _solve(single, load_kernel("reference"), self.device, rounded_to, forced))

    def yardstick(self, cell: Cell, kernel: Kernel, forced: Forced = NOTHING) -> Solution:
        """The cell in its dtype with its partial sums, with these choices instead of its own; without them where they must not matter."""
        layout = Layout() if cell.deterministic else Layout(dp=cell.layout.dp, tp=cell.layout.tp)
        single = replace(_single(cell, layout, cell.dtype), deterministic=cell.deterministic)
        return self._get((single, kernel.name, _bytes(forced)), lambda: _solve(single, kernel, self.device, None, forced))

    def own_tokens_only(self, cell: Cell) -> Tensor:
        """In fp64: the attention [N, M] in which every context-parallel rank sees its own tokens and what it has cached, in packed order."""
        kernel = load_kernel("reference")
        program = Program(_single(cell, Layout(), "float64"), alone(), kernel, self.device, rounded_to=getattr(torch, cell.dtype))
        q_THD, rows_SW = program.attention_inputs()
        open_rows = program.open_rows()
        (k_SGD, v_SGE), (cached_k, cached_v) = open_rows(rows_SW), open_rows(program.cached_inputs(0))
        rows = q_THD.new_empty(*q_THD.shape[:2], v_SGE.shape[2])
        for dp, cp in product(range(cell.layout.dp), range(cell.layout.cp)):
            steps = cell.parts[dp].cell.steps
            if not steps:
                continue
            blocks = cell.parts[dp].cell.blocks(cp)
            before = STRATEGIES[steps[0].strategy].cached(steps[0], cp)
            tokens = row_index(cell.tokens_of(dp, cp), self.device)
            prefix = row_index(cell.cached_tokens_of(dp, tuple(block for block, _ in cached_rows(before))), self.device)
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
    plain = replace(cell, chunk=None, cache_tokens=None, page_size=None, head_groups=1, compile=NOT_COMPILED, mla="expanded", dispatch=None)
    plain = replace(plain, sp_chunks=1, sp_gather="hidden", sp_fused=False, deterministic=False)
    return replace(plain, layout=layout, strategy="none", partition="contiguous", dtype=dtype)


def _bytes(forced: Forced) -> tuple[bytes, ...]:
    return tuple(b"" if chosen is None else chosen.cpu().numpy().tobytes() for chosen in forced)


def _solve(cell: Cell, kernel: Kernel, device: torch.device, rounded_to: torch.dtype | None, forced: Forced) -> Solution:
    """All ranks of a layout without context parallelism and stages, put together: tokens and sequences by DP group, heads and logits by TP rank."""
    routers, selections = ChoiceLog(forced_LNK=forced.experts_LNK), ChoiceLog(forced_LNK=forced.keys_LNK)
    answers, layout = run_locally(cell, kernel, device, rounded_to, routers, selections), cell.layout
    shards = [[answers[layout.rank_of(dp=dp, tp=tp)][1] for tp in range(layout.tp)] for dp in range(layout.dp)]
    order = torch.cat([answers[layout.rank_of(dp=dp)][0] for dp in range(layout.dp)]).argsort()
    experts, keys = (choices_of(log.notes, cell.layer_range.stop, cell.tokens) for log in (routers, selections))
    parts = [[output.rows.flatten(1) for output in group] for group in shards]
    rows = torch.cat([torch.cat(group, 1) if cell.target == "attention" else group[0] for group in parts])[order]
    firsts = [[output.first for output in group if output.first is not None] for group in shards]
    if not any(firsts):
        return Solution(rows, experts=experts, keys=keys)
    sequences = [sequence for part in cell.parts for sequence in part.sequences]
    logits = torch.cat([torch.cat([shard.logits_BV for shard in group], 1) for group in firsts if group])
    first = sorted((s, t, m) for s, (t, m) in zip(sequences, (pair for g in firsts if g for pair in zip(g[0].tokens, g[0].margins, strict=True)), strict=True))
    tokens, leads = tuple(token for _, token, _ in first), tuple(margin for _, _, margin in first)
    return Solution(rows, logits[torch.tensor(sequences).argsort()], tokens, leads, experts, keys)
