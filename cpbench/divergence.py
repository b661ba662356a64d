"""Where two layouts part: the first module, in the order of a pass, whose output differs for a token, and by how much.

Layouts hold hidden states on different ranks, so what is compared goes by token: each rank hashes every row of every output, and only hashes are
kept. The hash tells bits apart, so that it sees a rounding error and -0.0; it is quick and not cryptographic. The values of one module, the first that
differs, are fetched by another pass. Who runs these passes is decided in against.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cpbench.cell import Cell
from cpbench.models.decoder import SHOWN

BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}  # integers as wide as an element
FACTORS = (-0x61C8864680B583EB, -0x40A7B892E31B1A47)  # odd, with bits spread evenly (those of splitmix64)
BLOCK_ELEMENTS = 1 << 22


@dataclass
class Trace:
    """What one rank saw of one pass: by module, the tokens and hashes of its rows; of the module `wanted` also the rows themselves."""

    wanted: str | None = None
    hashes: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def watch(self, tokens_n: Tensor, module: str, rows_nX: Tensor) -> None:
        """Take down the output [n, X] of a module for some tokens, by their places in the packed batch."""
        if self.wanted is None:
            self.hashes.setdefault(module, []).append((tokens_n.cpu(), row_hashes(rows_nX).cpu()))
        elif module == self.wanted:
            self.rows.append((tokens_n.cpu(), rows_nX.to("cpu", torch.float64, copy=True)))  # a residual goes on to change in place


@dataclass(frozen=True)
class Divergence:
    """The first module whose output differs. `tokens`: those that it differs for, by their places in the packed batch.

    `relative_rmse`: over all tokens, against the one that it is compared with; `max_error`: the largest absolute difference.
    """

    module: str
    tokens: tuple[int, ...]
    relative_rmse: float
    max_error: float


def modules(cell: Cell) -> list[str]:
    """The outputs that are compared of a prefill, in the order in which a token meets them."""
    return ["embedding", *(f"layer {layer}, {module}" for layer in cell.layer_range for module in SHOWN), "final norm", "logits"]


def row_hashes(rows_nX: Tensor) -> Tensor:
    """One number [n] int64 for the bits of each row. Wrapping arithmetic; equal rows have equal numbers on every rank and device."""
    columns_X = torch.arange(1, rows_nX.shape[1] + 1, device=rows_nX.device) * FACTORS[0]
    hashes_n = torch.empty(len(rows_nX), dtype=torch.int64, device=rows_nX.device)
    size = max(1, BLOCK_ELEMENTS // max(1, rows_nX.shape[1]))
    for first in range(0, len(rows_nX), size):
        bits = rows_nX[first : first + size].contiguous().view(BITS[rows_nX.element_size()])
        hashes_n[first : first + size] = _mixed(_mixed(bits + columns_X)).sum(1)
    return hashes_n


def _mixed(bits: Tensor) -> Tensor:
    bits.bitwise_xor_(bits >> 31)
    return bits.mul_(FACTORS[1]).bitwise_xor_(bits >> 29)


def first_difference(cell: Cell, one: Sequence[Trace], other: Sequence[Trace]) -> tuple[str, tuple[int, ...]] | None:
    """The first module, and its tokens, of which not all copies on all ranks of both sides have the same bits; None where all have."""
    for module in modules(cell):
        lowest_N = torch.full((cell.tokens,), torch.iinfo(torch.int64).max)
        highest_N = torch.full((cell.tokens,), torch.iinfo(torch.int64).min)
        for trace in (*one, *other):
            for tokens_n, hashes_n in trace.hashes.get(module, []):
                lowest_N[tokens_n] = lowest_N[tokens_n].minimum(hashes_n)
                highest_N[tokens_n] = highest_N[tokens_n].maximum(hashes_n)
        if differing := (lowest_N != highest_N).nonzero().flatten().tolist():
            return module, tuple(differing)
    return None


def measured(cell: Cell, module: str, tokens: tuple[int, ...], one: Sequence[Trace], other: Sequence[Trace]) -> Divergence:
    """The error of a module's output, from the rows themselves. Of several copies of a token the one counts that is farthest from `one`."""
    pieces = [piece for trace in (*one, *other) for piece in trace.rows]
    truth_NX = pieces[0][1].new_zeros(cell.tokens, pieces[0][1].shape[1])
    for tokens_n, rows_nX in reversed([piece for trace in one for piece in trace.rows]):
        truth_NX[tokens_n] = rows_nX
    squares_N, largest_N = truth_NX.new_zeros(cell.tokens), truth_NX.new_zeros(cell.tokens)
    for tokens_n, rows_nX in pieces:
        error_nX = (rows_nX - truth_NX[tokens_n]).abs()
        squares_N[tokens_n] = squares_N[tokens_n].maximum(error_nX.square().sum(1))
        largest_N[tokens_n] = largest_N[tokens_n].maximum(error_nX.amax(1))
    return Divergence(module, tokens, float(squares_N.sum().sqrt() / truth_NX.norm()), float(largest_N.max()))
