"""Which tokens each context-parallel rank holds, and in which order it holds them.

A partition is a pure function from the lengths of a batch and the number of ranks to blocks of token positions. Everything else
(row counts, positions for RoPE, the order that restores a gathered tensor, causal work per rank) is derived from the blocks, so a
new partition is one function and one line in PARTITIONS. What a rank computes with its tokens is the strategy's business.

    contiguous, cp=4      |0000|1111|2222|3333|          rank 3 sees the whole prompt: causal work 1 : 3 : 5 : 7
    zigzag, cp=4          |0|1|2|3|3|2|1|0|              rank k holds block k and block 2*cp-1-k: equal causal work
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from cpbench.errors import CpbenchError, unknown


@dataclass(frozen=True)
class Block:
    """Positions [start, stop) of the new tokens of one sequence of the batch."""

    sequence: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start

    @property
    def causal_pairs(self) -> int:
        """Score pairs (query, key) of these queries: the query at position p sees p + 1 keys."""
        return (self.stop * (self.stop + 1) - self.start * (self.start + 1)) // 2


@dataclass(frozen=True)
class Split:
    """The blocks of every rank, in local row order. Activations are packed: sequences one after the other, no padding."""

    lengths: tuple[int, ...]
    ranks: tuple[tuple[Block, ...], ...]

    def rows(self, rank: int) -> int:
        return sum(block.rows for block in self.ranks[rank])

    @cached_property
    def max_rows(self) -> int:
        """The largest row count of a rank: what equal-sized collectives are padded to."""
        return max(self.rows(rank) for rank in range(len(self.ranks)))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each sequence starts in the packed batch."""
        return (0, *accumulate(self.lengths))

    def positions(self, rank: int) -> list[range]:
        """Position of each local row within its sequence (what RoPE needs), as ranges in local order."""
        return [range(block.start, block.stop) for block in self.ranks[rank]]

    def tokens(self, rank: int) -> list[range]:
        """Index of each local row in the packed batch, as ranges in local order."""
        return [range(self.starts[b.sequence] + b.start, self.starts[b.sequence] + b.stop) for b in self.ranks[rank]]

    def last_rows(self, rank: int) -> dict[int, int]:
        """The local row of the last token of each sequence whose last token this rank holds: {sequence: row}."""
        rows, found = 0, {}
        for block in self.ranks[rank]:
            rows += block.rows
            if block.rows and block.stop == self.lengths[block.sequence]:
                found[block.sequence] = rows - 1
        return found

    def causal_pairs(self, rank: int) -> int:
        """Score pairs of this rank's queries."""
        return sum(block.causal_pairs for block in self.ranks[rank])


def _cut(length: int, parts: int) -> list[tuple[int, int]]:
    """[0, length) in `parts` pieces; the first `length % parts` pieces are one longer."""
    base, longer = divmod(length, parts)
    ends = list(accumulate(base + (part < longer) for part in range(parts)))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def contiguous(lengths: tuple[int, ...], cp: int) -> list[list[Block]]:
    """Rank k holds the k-th piece of the packed batch, so gathered rows need no reordering."""
    starts = [0, *accumulate(lengths)]
    ranks = []
    for first, last in _cut(sum(lengths), cp):
        blocks = [Block(s, max(first - start, 0), min(last - start, length)) for s, (start, length) in enumerate(zip(starts, lengths, strict=False))]
        ranks.append([block for block in blocks if block.rows > 0])
    return ranks


def zigzag(lengths: tuple[int, ...], cp: int) -> list[list[Block]]:
    """Each sequence in 2*cp blocks; rank k holds blocks k and 2*cp-1-k, all early blocks first (SGLang PR 23269)."""
    cuts = [_cut(length, 2 * cp) for length in lengths]
    return [[Block(s, *cut[index]) for index in (k, 2 * cp - 1 - k) for s, cut in enumerate(cuts) if cut[index][0] < cut[index][1]] for k in range(cp)]


PARTITIONS: dict[str, Callable[[tuple[int, ...], int], list[list[Block]]]] = {
    "zigzag": zigzag,
    "contiguous": contiguous,
}


def split(partition: str, lengths: tuple[int, ...], cp: int) -> Split:
    """Split a batch over `cp` ranks. Raises CpbenchError for an unknown partition or sequences that are too short."""
    if partition not in PARTITIONS:
        raise unknown("partition", partition, PARTITIONS)
    reason = too_short(lengths, cp)
    if reason:
        raise CpbenchError(reason)
    return Split(tuple(lengths), tuple(tuple(blocks) for blocks in PARTITIONS[partition](tuple(lengths), cp)))


def too_short(lengths: tuple[int, ...], cp: int) -> str | None:
    """Why this batch cannot be split over `cp` ranks, with the nearest valid value; None if it can."""
    shortest = min(lengths)
    if cp > 1 and shortest < 2 * cp:
        near = f"use cp={shortest // 2} or " if shortest >= 4 else ""
        return f"a sequence of {shortest} tokens is shorter than 2*cp = {2 * cp}; {near}a length of at least {2 * cp}"
    return None
