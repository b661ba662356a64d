"""Arithmetic whose bits do not depend on how rows, columns and inputs are cut over ranks (see deterministic.py for the orders).

Products are made in blocks of one shape, because what a GEMM does with a row depends on how many rows and columns it is given (on CPU, fewer
than four rows have other bits). Inputs in narrow dtypes are multiplied in fp32.

    n rows   K inputs   N outputs
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn.functional import pad

from cpbench.deterministic import COLUMNS, DEPTH, ROWS, TILE, run_of
from cpbench.device_kind import kind_of
from cpbench.distributed.deterministic import tree_sum

RUN_VALUES = 1 << 27  # values of all runs that exist at a time on CUDA
SERIAL = 1 << 14  # values that an elementwise operation surely does on one thread
VECTOR = 64  # PyTorch takes two vectors at a time, in bf16 with AVX-512 of 32 values: a multiple of that leaves no rest for scalar code


@dataclass(frozen=True)
class InvariantWeight:
    """A weight [..., N, K] whose products have bits that no layout changes. `is_summed`: ranks have parts of its inputs, and add up."""

    values: Tensor
    is_summed: bool = False

    def __getitem__(self, index: int) -> InvariantWeight:
        return InvariantWeight(self.values[index], self.is_summed)


def invariant_linear(x_nK: Tensor, weight: InvariantWeight) -> Tensor:
    """x W^T [n, N] in the dtype of `x_nK`; of a summed weight this rank's branch of the tree. Raises ValueError where its inputs are not whole tiles."""
    (n, inputs), weight_NK = x_nK.shape, weight.values
    if weight.is_summed and inputs % TILE:
        raise ValueError(f"{inputs} inputs are no multiple of the tile of {TILE}")
    if x_nK.is_cuda and x_nK.dtype != torch.float64 and find_spec("triton"):
        return _in_runs(x_nK, weight)
    wide = torch.promote_types(x_nK.dtype, torch.float32)
    product = _tree if weight.is_summed else _deep
    wide_nK, out_nN = x_nK.to(wide), x_nK.new_empty(n, len(weight_NK))
    for c in range(0, len(weight_NK), COLUMNS):
        columns_cK = _padded(weight_NK[c : c + COLUMNS].to(wide), COLUMNS)
        for r in range(0, n, ROWS):
            out_rc = out_nN[r : r + ROWS, c : c + COLUMNS]
            out_rc.copy_(product(_padded(wide_nK[r : r + ROWS], ROWS), columns_cK, x_nK.dtype)[: len(out_rc), : out_rc.shape[1]])
    return out_nN


def _in_runs(x_nK: Tensor, weight: InvariantWeight) -> Tensor:
    """The same by a Triton kernel, as many rows at a time as there is space for all runs."""
    from cpbench.models.invariant_triton import runs_of_products

    (n, inputs), outputs = x_nK.shape, len(weight.values)
    run = run_of(inputs // TILE) if weight.is_summed else None
    runs = inputs // TILE // run if run else 1
    out_nN = x_nK.new_empty(n, outputs)
    step = max(1, RUN_VALUES // (runs * outputs))
    for first in range(0, n, step):
        rows = slice(first, first + step)
        out_nN[rows] = tree_sum(runs_of_products(x_nK[rows], weight.values, run).unbind())
    return out_nN


def _deep(x_rK: Tensor, weight_cK: Tensor, dtype: torch.dtype) -> Tensor:
    """One accumulator, some inputs at a time."""
    out_rc = x_rK[:, :DEPTH] @ weight_cK[:, :DEPTH].T
    for first in range(DEPTH, x_rK.shape[1], DEPTH):
        out_rc.addmm_(x_rK[:, first : first + DEPTH], weight_cK[:, first : first + DEPTH].T)
    return out_rc


def _tree(x_rK: Tensor, weight_cK: Tensor, dtype: torch.dtype) -> Tensor:
    """Tiles of inputs, each rounded to `dtype`, added in runs and runs in a binary tree."""
    tiles = x_rK.shape[1] // TILE
    if tiles != (run := run_of(tiles)):
        half = tiles // 2 * TILE
        return _tree(x_rK[:, :half], weight_cK[:, :half], dtype).add_(_tree(x_rK[:, half:], weight_cK[:, half:], dtype))
    total_rc = (x_rK[:, :TILE] @ weight_cK[:, :TILE].T).to(dtype)
    for first in range(TILE, run * TILE, TILE):
        total_rc.add_((x_rK[:, first : first + TILE] @ weight_cK[:, first : first + TILE].T).to(dtype))
    return total_rc


def _padded(rows_xK: Tensor, count: int) -> Tensor:
    """With rows of zeros behind, up to `count`."""
    return rows_xK if len(rows_xK) == count else pad(rows_xK, (0, 0, 0, count - len(rows_xK)))


def in_blocks(function: Callable[[Tensor], Tensor], x_nW: Tensor) -> Tensor:
    """An elementwise function of rows, a few at a time, on one thread each: its vector and its scalar form may differ in the last bit, and
    where threads or rows end, the scalar one computes what is left. On CUDA all values are computed alike."""
    if kind_of(x_nW) == "cuda":
        return function(x_nW)
    step = rows_at_a_time(x_nW.shape[1])
    whole_mW = _padded(x_nW, -(-len(x_nW) // VECTOR) * VECTOR) if x_nW.shape[1] % VECTOR else x_nW
    return torch.cat([function(whole_mW[first : first + step]) for first in range(0, len(whole_mW), step)] or [x_nW])[: len(x_nW)]


def rows_at_a_time(width: int) -> int:
    """Rows of so many values that are computed together on CPU."""
    return max(VECTOR, SERIAL // width // VECTOR * VECTOR) if width % VECTOR else max(1, SERIAL // width)


def sum_of_experts(values_PM: Tensor, experts_nK: Tensor, count: int) -> Tensor:
    """Sums [n, M] over the experts of each row in a binary tree over all `count` experts, in the dtype of `values_PM`.

    `values_PM` [n * K, M] are those of the rows in turn, and of each by ascending expert. Experts that a row has not are left out, which adding
    zeros would give too.
    """
    rows = torch.arange(len(experts_nK), device=experts_nK.device)[:, None]
    node_P = (rows * count + experts_nK).flatten()
    for _ in range(count.bit_length() - 1):
        node_P = node_P >> 1
        is_second = torch.zeros_like(node_P, dtype=torch.bool)
        is_second[1:] = node_P[1:] == node_P[:-1]
        second_Q = is_second.nonzero().squeeze(1)
        if len(second_Q):
            values_PM[second_Q - 1] += values_PM[second_Q]
            values_PM, node_P = values_PM[~is_second], node_P[~is_second]
    return values_PM
