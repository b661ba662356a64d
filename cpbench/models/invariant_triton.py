"""Products in a fixed order on CUDA, as a Triton kernel: the leaves of the tree that invariant.py and deterministic.py describe.

One program multiplies a block of rows with a block of columns over one run of tiles, in ascending order, and nothing else of the grid changes
what it does: there is no split of the inputs, and no choice that depends on how many rows or columns there are. Runs are added by the caller.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cpbench.deterministic import TILE

BLOCK_ROWS, BLOCK_COLUMNS = 64, 128


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _run(
    x: Any, w: Any, out: Any, rows: Any, columns: Any, inputs: Any, x_stride: Any, w_stride: Any,
    RUN_INPUTS: tl.constexpr, ROUNDED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(2) * RUN_INPUTS
    dtype = out.dtype.element_ty
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for at in range(0, RUN_INPUTS, DEPTH):
        depth = first + at + tl.arange(0, DEPTH)
        in_run = depth < inputs
        x_rk = tl.load(x + row.to(tl.int64)[:, None] * x_stride + depth[None, :], mask=(row < rows)[:, None] & in_run[None, :], other=0.0)
        w_kc = tl.load(w + column.to(tl.int64)[None, :] * w_stride + depth[:, None], mask=(column < columns)[None, :] & in_run[:, None], other=0.0)
        product = tl.dot(x_rk, w_kc, input_precision="ieee")
        if ROUNDED:  # every node of the tree has the dtype that travels
            total = (total + product.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
        else:
            total += product
    place = (tl.program_id(2).to(tl.int64) * rows + row[:, None]) * columns + column[None, :]
    tl.store(out + place, total.to(dtype), mask=(row < rows)[:, None] & (column < columns)[None, :])


def runs_of_products(x_nK: Tensor, weight_NK: Tensor, run: int | None) -> Tensor:
    """x W^T of every run of so many tiles [runs, n, N], each tile rounded; None: of all inputs [1, n, N], in one accumulator in fp32.

    Inputs lie next to each other in both. Raises ValueError where they do not.
    """
    if x_nK.stride(1) != 1 or weight_NK.stride(1) != 1:
        raise ValueError("the inputs of a row do not lie next to each other")
    (rows, inputs), columns = x_nK.shape, len(weight_NK)
    run_inputs = inputs if run is None else run * TILE
    out = torch.empty(inputs // run_inputs, rows, columns, dtype=x_nK.dtype, device=x_nK.device)
    grid = (triton.cdiv(rows, BLOCK_ROWS), triton.cdiv(columns, BLOCK_COLUMNS), len(out))
    if out.numel():
        _run[grid](
            x_nK, weight_NK, out, rows, columns, inputs, x_nK.stride(0), weight_NK.stride(0),
            RUN_INPUTS=run_inputs, ROUNDED=run is not None, ROWS=BLOCK_ROWS, COLUMNS=BLOCK_COLUMNS, DEPTH=TILE,
        )  # fmt: skip
    return out
