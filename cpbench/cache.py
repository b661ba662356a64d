"""The memory in which K and V stay: a buffer per layer that a strategy fills as it likes, or a pool of pages per layer.

A kernel that reads pages where they lie gets the pool and the tables; for the others the cached rows are copied out. Which page holds
which token is decided in paging.py, which tokens a rank keeps by the strategies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cpbench.buffers import Buffers
from cpbench.paging import BlockTable, CachePlan


class KVCache:
    """The kept K and V of one rank: dense buffers per layer, or pools of pages. Where they are dropped, all layers share those of one.

    A strategy may keep several buffers for a layer, its lanes (kv heads that travel apart): what is called `layer` here counts them all.
    """

    def __init__(self, keep: bool, table: BlockTable | None = None, lanes: int = 1) -> None:
        self.keep = keep
        self.table = table
        self.lanes = lanes
        self._buffers = Buffers()
        self._pools: set[int] = set()  # those that have been cleared

    def dense(self, layer: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """This layer's buffer where nothing is paged and K and V are kept, else one that all layers share."""
        kept = self.keep and self.table is None
        return self._buffers.get(f"cache_{layer}" if kept else f"gather_{layer % self.lanes}", shape, like)

    def pool(self, layer: int, width: int, like: Tensor) -> Tensor:
        """All pages of a layer as rows [pages * page size, width], zero until written: kernels load whole pages and mask by multiplying."""
        assert self.table is not None, "a dense cache has no pages"
        index = layer if self.keep else layer % self.lanes
        pool = self._buffers.get(f"cache_{index}", (self.table.rows, width), like)
        if index not in self._pools:
            self._pools.add(index)
            pool.zero_()
        return pool

    def tensors(self) -> list[tuple[str, Tensor]]:
        return self._buffers.tensors()


@dataclass(frozen=True)
class StepCache:
    """The cache as one step of a pass sees it."""

    cache: KVCache
    plan: CachePlan | None
    device: torch.device

    @property
    def page_size(self) -> int | None:
        """Tokens per page where new K and V are kept in pages, else None."""
        return self.cache.table.page_size if self.cache.table is not None and self.cache.keep else None

    @property
    def keeps_rows_in_place(self) -> bool:
        """Whether a layer's kept K and V are whatever buffer the strategy fills."""
        return self.cache.keep and self.cache.table is None

    @property
    def cached_rows(self) -> int:
        return len(self.plan.read) if self.plan else 0

    @cached_property
    def _indices(self) -> tuple[Tensor, Tensor, Tensor]:
        """`read`, `rows` and `write` of the plan on the device."""
        assert self.plan is not None, "a dense cache is not read by slots"
        read, rows, write = (torch.from_numpy(slots).to(self.device) for slots in (self.plan.read, self.plan.rows, self.plan.write))
        return read, rows, write

    def get(self, layer: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A buffer for the layer's new K and V, kept if nothing is paged."""
        return self.cache.dense(layer, shape, like)

    def read(self, layer: int, out_SW: Tensor) -> None:
        """Copy the cached rows [S, W] out of their pages, in the order of `in_read_order`."""
        torch.index_select(self.cache.pool(layer, out_SW.shape[1], out_SW), 0, self._indices[0], out=out_SW)

    def write(self, layer: int, rows_SW: Tensor, columns: slice = slice(None), width: int | None = None) -> None:
        """Put the step's new rows into pages, if they are kept in pages; or `columns` of them, of rows `width` wide."""
        if self.page_size is None:
            return
        _, rows, slots = self._indices
        pool = self.cache.pool(layer, width or rows_SW.shape[1], rows_SW)
        pool[:, columns].index_copy_(0, slots, rows_SW.index_select(0, rows))

    def fill(self, layer: int, rows_SW: Tensor) -> None:
        """Put cached rows into their pages, before the first pass."""
        self.cache.pool(layer, rows_SW.shape[1], rows_SW).index_copy_(0, self._indices[0], rows_SW)

    def pages(self, layer: int, width: int, like: Tensor) -> Tensor:
        """All pages of a layer: [pages, page size, width]."""
        assert self.cache.table is not None, "a dense cache has no pages"
        return self.cache.pool(layer, width, like).view(self.cache.table.pool_pages, self.cache.table.page_size, width)

    @cached_property
    def tables(self) -> Tensor:
        """Page numbers [batch, longest] in int32. Entries behind a sequence's last page are 0 and never read."""
        assert self.cache.table is not None, "a dense cache has no pages"
        pages = self.cache.table.pages
        longest = max(map(len, pages))
        return torch.tensor([[*known, *[0] * (longest - len(known))] for known in pages], dtype=torch.int32, device=self.device)
