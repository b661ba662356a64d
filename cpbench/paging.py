"""Pages of the K/V cache as data: which page holds which cached token, and what one step of a pass reads and writes.

A page holds a fixed number of consecutive cached tokens of one sequence; a block table says which pages a sequence has. Pages are handed
out in a shuffled order, as a server's allocator does after many requests, so that nothing can rely on neighbours. Tables are built from
unpadded lengths, and a row behind the end of a table is an error. Which tokens a rank caches is the strategy's decision; the memory is
in cache.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cpbench.partition import Blocks
from cpbench.segments import PlacedBlock

SHUFFLE_SEED = 0

Slots = NDArray[np.int64]


@dataclass(frozen=True)
class BlockTable:
    """The pages of each sequence, in the order of its cached tokens."""

    page_size: int
    pages: tuple[tuple[int, ...], ...]
    pool_pages: int

    @classmethod
    def allocate(cls, tokens: Sequence[int], page_size: int, capacity: int | None = None) -> BlockTable:
        """Pages for `tokens[s]` tokens of each sequence, out of a pool of `capacity` tokens (None: as many as are needed)."""
        needed = [-(-count // page_size) for count in tokens]
        pool = max(sum(needed), -(-(capacity or 0) // page_size))
        free = np.random.default_rng(SHUFFLE_SEED).permutation(pool).tolist()
        ends = [sum(needed[: s + 1]) for s in range(len(needed))]
        return cls(page_size, tuple(tuple(free[end - count : end]) for end, count in zip(ends, needed, strict=True)), pool)

    @property
    def rows(self) -> int:
        """Rows of the whole pool."""
        return self.pool_pages * self.page_size

    def slots(self, sequence: int, first: int, count: int) -> Slots:
        """Pool rows of the cached tokens `first` to `first + count` of a sequence. Raises ValueError behind the end of its table."""
        known = self._slots[sequence]
        if count and (first < 0 or first + count > len(known)):
            pages = len(self.pages[sequence])
            raise ValueError(f"tokens {first} to {first + count} of sequence {sequence} lie outside its {pages} pages of {self.page_size}")
        return known[first : first + count]

    @cached_property
    def _slots(self) -> list[Slots]:
        """The slot of every token of every page: made once, because each chunk of a long prompt reads a longer part of the same."""
        rows = np.arange(self.page_size)
        return [(np.asarray(pages, dtype=np.int64)[:, None] * self.page_size + rows).ravel() for pages in self.pages]


@dataclass(frozen=True)
class CachePlan:
    """What one step of a pass reads from pages and writes to them, on one rank. Slots are rows of the pool.

    `read`: slots of the cached tokens, sequences one after the other. `rows` and `write`: rows of the buffer that holds the step's new
    K and V, and the slot of each.
    """

    read: Slots
    rows: Slots
    write: Slots


def plan_cache(table: BlockTable, cached: Blocks, stored: Sequence[PlacedBlock]) -> CachePlan:
    """Slots of cached blocks, and of new ones in the order of their positions behind what is cached of their sequence."""
    counts = [sum(block.rows for block in cached if block.sequence == sequence) for sequence in range(len(table.pages))]
    read = [table.slots(sequence, 0, count) for sequence, count in enumerate(counts)]
    rows, write = [], []
    for sequence, count in enumerate(counts):
        blocks = [(np.arange(b.start, b.stop, b.step), np.arange(row, row + b.rows)) for b, row in stored if b.sequence == sequence]
        if blocks:
            order = np.concatenate([positions for positions, _ in blocks]).argsort()
            rows.append(np.concatenate([places for _, places in blocks])[order])
            write.append(table.slots(sequence, count, len(order)))
    return CachePlan(_joined(read), _joined(rows), _joined(write))


def _joined(parts: Sequence[NDArray[Any]]) -> Slots:
    """One after the other; a single part as it is, not copied."""
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])
