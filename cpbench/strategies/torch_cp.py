"""PyTorch's own context parallelism: the ring of `torch.distributed.tensor.experimental`, called below its DTensor layer.

The public `context_parallel` cannot run causal attention on CPU (no sharding rule for its flash operator), but the ring beneath it takes
any operator that returns (out, lse), and so runs here with the kernel of the cell, on gloo as on NCCL. It is private, so this module
relies on what PyTorch 2.11 to 2.13 have: `_templated_ring_attention(group, seq_dim, op, query, key, value, is_causal)` with
[B, H, S, D], head-tail (zigzag) order per sequence when `_cp_options.enable_load_balance` is set, and `_cp_options.rotate_method`.

`torch-cp` moves K and V as PyTorch does by default, by one all-gather behind the first block; `torch-cp-ring` passes them on rank by
rank, one all-to-all per step, each posted before the attention call that it hides behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from cpbench.cell import Cell
from cpbench.strategies.base import AttentionMemory, Context, row_values
from cpbench.strategies.library import LibraryStrategy

if TYPE_CHECKING:
    from torch import Tensor

    from cpbench.kernels.base import Kernel

ALL_GATHER, ALL_TO_ALL = "ALL_GATHER", "ALL_TO_ALL"  # PyTorch's names


class TorchContextParallel(LibraryStrategy):
    """One of PyTorch's two ways to move K and V."""

    def __init__(self, name: str, rotate_method: str, how: str) -> None:
        self.name, self._rotate_method = name, rotate_method
        self.summary = f"PyTorch's experimental context parallelism, K and V moved by {how}"

    def call(self, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, context: Context) -> Tensor:
        from torch.distributed.tensor.experimental._context_parallel import _attention

        q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BSGD, v_BSGE))
        operator = _operator(context.kernel, context.scale)
        with _options(_attention, self._rotate_method):
            out_BHSE = _attention._templated_ring_attention(context.group.process_group, 2, operator, q, k, v, is_causal=True)[0]
        return out_BHSE.transpose(1, 2)

    def memory(self, cell: Cell, rank: int) -> AttentionMemory:
        """While a full block is merged: every K and V that arrived, which both ways hold until the end, four fp32 outputs (old, new, a
        product, the sum), and copies made on the way."""
        n = cell.split.rows(rank)
        rows, output = n * row_values(cell), n * cell.heads * cell.config.head_dim
        moved = rows * cell.layout.cp
        narrow = output if cell.element_bytes < 4 else 0  # the new output before it is widened
        batched = output + rows if len(cell.lengths) > 1 else 0  # q, K and V as batches
        return AttentionMemory(transient=(moved + narrow + batched) * cell.element_bytes + 4 * 4 * output)


def _operator(kernel: Kernel, scale: float) -> Any:
    """The kernel as an operator of PyTorch's ring: [B, H, S, D] in, (out [B, H, S, E], lse [B, H, S]) out."""
    import torch

    def attention(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool) -> tuple[Tensor, Tensor]:
        sequences = zip(*(x.transpose(1, 2).unbind(0) for x in (query, key, value)), strict=True)
        outs, lses = zip(*(kernel.block(q, k, v, scale, is_causal) for q, k, v in sequences), strict=True)
        if len(outs) == 1:
            return outs[0].unsqueeze(0).transpose(1, 2), lses[0].unsqueeze(0)
        return torch.stack(outs).transpose(1, 2), torch.stack(lses)

    return attention


@contextmanager
def _options(attention: Any, rotate_method: str) -> Iterator[None]:
    """PyTorch's module-wide options: zigzag order, merging in fp32, and how K and V move; put back afterwards."""
    options = attention._cp_options
    wanted = {"convert_to_f32": True, "enable_load_balance": True, "rotate_method": attention._RotateMethod[rotate_method]}
    before = {name: getattr(options, name) for name in wanted}
    for name, value in wanted.items():
        setattr(options, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(options, name, value)
