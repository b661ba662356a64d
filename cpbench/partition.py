"""Which tokens each context-parallel rank holds, and in which order it holds them.

A partition is a pure function from the lengths of a batch and the number of ranks to blocks of token positions. Everything else
(row counts, positions for RoPE, the order that restores a gathered tensor, causal work per rank) is derived from the blocks, so a
new partition is one function and one line in PARTITIONS. What a rank computes with its tokens is the strategy's business.

Only new tokens are split; a sequence's cached prefix moves their positions and nothing else. Blocks are built from unpadded lengths:
ranks may hold different numbers of rows, and what needs equal ones is padded to `Split.max_rows`.

    contiguous, cp=4      |0000|1111|2222|3333|          rank 3 sees the whole prompt: causal work 1 : 3 : 5 : 7
    zigzag, cp=4          |0|1|2|3|3|2|1|0|              rank k holds block k and block 2*cp-1-k: equal causal work
    interleave, cp=4      |0123012301230123|             token i of the packed batch is on rank i mod cp: equal to within a token
    replicated            |****************|             every rank holds every token
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

from cpbench.errors import unknown


@dataclass(frozen=True)
class Block:
    """Every `step`-th position of [start, stop) of one sequence of the batch. Positions count from the sequence's first cached token."""

    sequence: int
    start: int
    stop: int
    step: int = 1

    @property
    def rows(self) -> int:
        return max(0, -((self.start - self.stop) // self.step))

    @property
    def positions(self) -> range:
        return range(self.start, self.stop, self.step)

    @property
    def last(self) -> int:
        """The highest position."""
        return self.start + (self.rows - 1) * self.step

    @property
    def causal_pairs(self) -> int:
        """Score pairs (query, key) of these queries: the query at position p sees p + 1 keys."""
        rows = self.rows
        return rows * (self.start + 1) + self.step * rows * (rows - 1) // 2


Blocks = tuple[Block, ...]


@dataclass(frozen=True)
class Split:
    """The blocks of every rank, in local row order. Activations are packed: sequences one after the other, no padding."""

    lengths: tuple[int, ...]
    prefixes: tuple[int, ...]
    ranks: tuple[Blocks, ...]
    replicated: bool = False

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
        return [block.positions for block in self.ranks[rank]]

    def tokens(self, rank: int) -> list[range]:
        """Index of each local row in the packed batch, as ranges in local order."""
        return [packed(block, self.starts[block.sequence] - self.prefixes[block.sequence]) for block in self.ranks[rank]]

    @property
    def whole(self) -> Blocks:
        """All new tokens in packed order."""
        return tuple(Block(s, p, p + n) for s, (p, n) in enumerate(zip(self.prefixes, self.lengths, strict=True)) if n)

    def last_rows(self, rank: int) -> dict[int, int]:
        """The local row of the last token of each sequence whose last token this rank holds: {sequence: row}."""
        rows, found = 0, {}
        for block in self.ranks[rank]:
            rows += block.rows
            if block.last == self.prefixes[block.sequence] + self.lengths[block.sequence] - 1:
                found[block.sequence] = rows - 1
        return found

    def causal_pairs(self, rank: int) -> int:
        """Score pairs of this rank's queries, those with cached keys included."""
        return sum(block.causal_pairs for block in self.ranks[rank])


def packed(block: Block, origin: int) -> range:
    """Indices of a block's rows in a packed batch in which position 0 of its sequence would have the index `origin`."""
    return range(origin + block.start, origin + block.last + 1, block.step)


def cut(length: int, parts: int) -> list[tuple[int, int]]:
    """[0, length) in `parts` pieces; the first `length % parts` pieces are one longer."""
    base, longer = divmod(length, parts)
    ends = list(accumulate(base + (part < longer) for part in range(parts)))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def contiguous(lengths: Sequence[int], cp: int) -> list[list[Block]]:
    """Rank k holds the k-th piece of the packed batch, so gathered rows need no reordering."""
    whole = [Block(s, 0, length) for s, length in enumerate(lengths) if length]
    return [take(whole, first, last) for first, last in cut(sum(lengths), cp)]


def zigzag(lengths: Sequence[int], cp: int) -> list[list[Block]]:
    """Each sequence in 2*cp blocks; rank k holds blocks k and 2*cp-1-k, all early blocks first (SGLang PR 23269)."""
    cuts = [cut(length, 2 * cp) for length in lengths]
    return [[Block(s, *pieces[index]) for index in (k, 2 * cp - 1 - k) for s, pieces in enumerate(cuts)] for k in range(cp)]


def interleave(lengths: Sequence[int], cp: int) -> list[list[Block]]:
    """Token i of the packed batch is on rank i mod cp (SGLang's round-robin split)."""
    starts = [0, *accumulate(lengths)]
    return [[Block(s, (k - start) % cp, length, cp) for s, (start, length) in enumerate(zip(starts, lengths, strict=False))] for k in range(cp)]


def replicated(lengths: Sequence[int], cp: int) -> list[list[Block]]:
    """Every rank holds every token."""
    return [[Block(s, 0, length) for s, length in enumerate(lengths)] for _ in range(cp)]


PARTITIONS: dict[str, Callable[[Sequence[int], int], list[list[Block]]]] = {
    "zigzag": zigzag,
    "contiguous": contiguous,
    "interleave": interleave,
    "replicated": replicated,
}


def split(partition: str, lengths: Sequence[int], cp: int, prefixes: Sequence[int] = (), inner: int = 1) -> Split:
    """Split a batch over `cp` ranks; each sequence has `prefixes[s]` cached tokens before its new ones.

    In a hybrid, `inner` neighbours share the tokens of one of the partition's cp // inner parts: each has a piece of its rows, in order.
    A batch that is too short for the partition is replicated (`switched_off` says why). Raises CpbenchError for an unknown partition.
    """
    if partition not in PARTITIONS:
        raise unknown("partition", partition, PARTITIONS)
    return _split(partition, tuple(lengths), cp, tuple(prefixes) or (0,) * len(lengths), inner)


@lru_cache(maxsize=512)  # every step of a chunked pass asks for the splits of the steps before it
def _split(partition: str, lengths: tuple[int, ...], cp: int, prefixes: tuple[int, ...], inner: int) -> Split:
    name = "replicated" if switched_off(partition, lengths, cp) else partition
    if name == "replicated":
        inner = 1
    parts = [[block for block in blocks if block.rows] for blocks in PARTITIONS[name](lengths, cp // inner)]
    if inner > 1:
        parts = [take(part, first, last) for part in parts for first, last in cut(sum(block.rows for block in part), inner)]
    moved = tuple(tuple(Block(b.sequence, b.start + prefixes[b.sequence], b.stop + prefixes[b.sequence], b.step) for b in part) for part in parts)
    return Split(lengths, prefixes, moved, name == "replicated")


def switched_off(partition: str, lengths: Sequence[int], cp: int) -> str | None:
    """Why context parallelism is off for this batch: every rank then computes all of it. None where it is on.

    A function of lengths that every rank knows, so that all decide alike. Zigzag needs two tokens of every sequence for every rank of
    the group, as in SGLang; the other partitions need one token of the batch for every rank.
    """
    new = [length for length in lengths if length]
    if cp == 1:
        return None
    if partition == "zigzag" and min(new) < 2 * cp:
        return f"context parallelism is off: a sequence of {min(new)} new tokens is shorter than 2*cp = {2 * cp}"
    if partition != "replicated" and sum(new) < cp:
        return f"context parallelism is off: a batch of {sum(new)} new tokens is shorter than cp = {cp}"
    return None


def take(blocks: Sequence[Block], first: int, last: int) -> list[Block]:
    """Rows [first, last) of blocks that lie one after the other."""
    taken, row = [], 0
    for block in blocks:
        low, high = max(first - row, 0), min(last - row, block.rows)
        if low < high:
            positions = block.positions[low:high]
            taken.append(Block(block.sequence, positions.start, positions[-1] + 1, block.step))
        row += block.rows
    return taken
