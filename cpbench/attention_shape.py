"""Sizes of the attention that strategies and kernels see, whatever model they come from. Which they are is decided in cell.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of the attention of one tensor-parallel rank, as strategies and kernels see them.

    A token's row has one part for each kv head, K of all before V of all; or a single part, which all heads share. `opened`: values per
    query head that are computed from the row, K and what K and V are taken from; 0: both are views of it. `top_k`: a query attends to at
    most so many keys, selected by values behind those of K and V in the row; 0: to all.
    """

    heads: int
    parts: int
    qk_dim: int
    v_dim: int
    part_values: int
    opened: int = 0
    top_k: int = 0

    @property
    def row_values(self) -> int:
        return self.parts * self.part_values

    def kv_heads(self, heads: int, parts: int) -> int:
        """Heads of K and V where so many query heads attend to so many parts."""
        return heads if self.opened else parts

    def columns(self, parts: Sequence[int]) -> list[slice]:
        """Where some parts lie in a row."""
        if self.parts == 1:
            return [slice(0, self.part_values)]
        k, v, values = self.qk_dim, self.v_dim, self.parts * self.qk_dim
        return [*(slice(p * k, (p + 1) * k) for p in parts), *(slice(values + p * v, values + (p + 1) * v) for p in parts)]

    def opened_values(self, heads: int) -> int:
        """Values per row that are made when it is opened for so many heads."""
        return heads * self.opened
