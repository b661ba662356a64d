"""What strategies that another library brings have in common: when they can run, and how rows become the batches that libraries take.

Such a library communicates over the process group itself, so its traffic has no formula here: it is observed. Libraries take dense
batches [B, S, H, D], where a rank's part of a sequence is its early block and then its late one. Our rows hold the early blocks of all
sequences and then the late ones, so with one sequence the two are the same memory, and with more a copy. What is kept of K and V is the
rank's own rows. Which function is called, and with what, stands in torch_cp.py, external.py and local_map.py.

    rows, zigzag, two sequences a and b        a0 b0 a1 b1
    batch [2, S, H, D]                         a0 a1 | b0 b1
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from cpbench.cell import Cell
from cpbench.distributed.traffic import Traffic
from cpbench.strategies.base import AttentionMemory, Context, Strategy, row_values
from cpbench.tracing.spans import LIBRARY

if TYPE_CHECKING:
    from torch import Tensor

    from cpbench.strategies.base import OpenRows


@dataclass(frozen=True)
class LibraryPlan:
    """How a rank's rows lie: so many sequences, each in so many blocks; and their local lengths."""

    sequences: int
    blocks: int
    lengths: tuple[int, ...]


class BatchStrategy(Strategy):
    """A strategy that takes dense batches, and communicates through a library."""

    partitions: tuple[str, ...] = ("zigzag",)
    keeps_local_rows = True
    brings_collectives = True
    uneven = False  # True: sequences may have different lengths

    def check(self, cell: Cell) -> str | None:
        reason = self.available(cell.device, cell.dtype)
        if reason:
            return f"{self.name} cannot run here: {reason}" + ("" if "; " in reason else "; use ring or ulysses")
        if cell.shape.qk_dim != cell.shape.v_dim:
            return f"{self.name} needs K and V of one head size, not {cell.shape.qk_dim} and {cell.shape.v_dim}; use allgather or ring"
        return super().check(cell) or self._batch_refusal(cell)

    def _batch_refusal(self, cell: Cell) -> str | None:
        if any(cell.prefixes):
            return f"{self.name} does not know cached tokens; use ring, or prefix=0"
        if cell.chunk is not None:
            return f"{self.name} does not prefill in chunks; use ring, or leave the chunk out"
        longest, multiple = max(cell.lengths), cell.layout.cp * (2 if cell.partition == "zigzag" else 1)
        if len(set(cell.lengths)) > 1 and not self.uneven:
            return f"{self.name} needs sequences of one length, not {min(cell.lengths)} to {longest}; use ring, or {len(cell.lengths)} of {longest}"
        for length in cell.lengths:
            if length % multiple:
                near = max(multiple, round(length / multiple) * multiple)
                what = "2*cp" if multiple > cell.layout.cp else "cp"
                return f"{self.name} needs a length that {what} = {multiple} divides, not {length}; the nearest valid length is {near}"
        return None

    def plan(self, cell: Cell, rank: int) -> LibraryPlan:
        lengths = tuple(length // cell.layout.cp for length in cell.lengths)
        return LibraryPlan(len(lengths), 2 if cell.partition == "zigzag" else 1, lengths)

    def traffic(self, cell: Cell, rank: int) -> Traffic:
        """Nothing is predicted: what the library receives is observed."""
        return Traffic()


class LibraryStrategy(BatchStrategy):
    """A strategy of another library. Subclasses say what it needs, and call it."""

    def attend(self, q_THD: Tensor, rows_SW: Tensor, open_rows: OpenRows, plan: LibraryPlan, context: Context, layer: int) -> Tensor:
        q, k, v = (as_batch(x, plan) for x in (q_THD, *open_rows(rows_SW)))
        with LIBRARY(), context.group.foreign():
            out_BSHE = self.call(q, k, v, context)
        return as_rows(out_BSHE, plan)

    @abstractmethod
    def call(self, q_BSHD: Tensor, k_BSGD: Tensor, v_BSGE: Tensor, context: Context) -> Tensor:
        """The library's causal attention over the group: out [B, S, H, E]."""

    def memory(self, cell: Cell, rank: int) -> AttentionMemory:
        """An estimate of what the library makes: contiguous K and V, those of one other rank, and twice an fp32 output."""
        rows = cell.split.rows(rank)
        return AttentionMemory(transient=rows * (2 * row_values(cell) * cell.element_bytes + 2 * 4 * cell.heads * cell.config.head_dim))


def as_batch(x_nHD: Tensor, plan: LibraryPlan) -> Tensor:
    """[B, S, H, D] of a rank's rows in sequences of one length: a view for one sequence, else a copy."""
    batch: Tensor = x_nHD.unflatten(0, (plan.blocks, plan.sequences, -1)).transpose(0, 1).flatten(1, 2)
    return batch


def as_rows(x_BSHD: Tensor, plan: LibraryPlan) -> Tensor:
    """The inverse of `as_batch`: rows [n, H, D]."""
    rows: Tensor = x_BSHD.unflatten(1, (plan.blocks, -1)).transpose(0, 1).flatten(0, 2)
    return rows


def missing(modules: tuple[str, ...], how: str) -> str | None:
    """Which of these top-level modules are not installed, and how to install them; None if all are. Imports nothing."""
    absent = [module for module in modules if find_spec(module) is None]
    return f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed; {how}" if absent else None
