"""Which query rows see which key rows, as data that any kernel can execute.

A segment gives a range of query rows the key ranges that every one of them sees in full, and at most one *causal square*: a key range
as long as the query range whose i-th key is seen by the queries from the i-th on. Every causal pattern of context parallelism is a
list of such segments, and no masked block appears in any of them. This module decides what is computed, not how.

    zigzag, cp=2, rank 0 holds blocks 0 and 3; keys as gathered late-before-early: 3 2 0 1
                     3   2   0   1
        q block 0    .   .   \\   .      causal square on block 0
        q block 3    \\   #   #   #      causal square on block 3, one full range over the rest
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cpbench.partition import Block

MERGE_BLOCK = 1 << 17  # values of partial results merged at a time: in fp32 half a megabyte, inside a core's second-level cache
MIN_ROWS_TO_COPY = 512  # query rows from which on copying K and V head by head costs the CPU kernel less than it saves


class Span(NamedTuple):
    """Rows [start, stop)."""

    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Segment:
    """Query rows `queries` see the key rows of `full`, and those of `causal` up to their own position in it."""

    queries: Span
    full: tuple[Span, ...] = ()
    causal: Span | None = None

    @property
    def keys(self) -> tuple[Span, ...]:
        """All key rows, in as few spans as there are."""
        return joined([*self.full, *([self.causal] if self.causal else [])])

    @property
    def pairs(self) -> int:
        """Score pairs that this segment computes, per head."""
        rows = self.queries.rows
        return rows * sum(span.rows for span in self.full) + (rows * (rows + 1) // 2 if self.causal else 0)


@dataclass(frozen=True)
class Request:
    """Query rows that see cached tokens of one sequence: bottom-right causal attention, read from pages.

    The rows `queries` are the last of the first `keys` tokens of `sequence`, so row i of them sees keys - rows + i + 1 tokens. The pages
    of those tokens are row `sequence` of the block tables. Several requests may read the same sequence, up to different lengths.
    """

    queries: Span
    sequence: int
    keys: int

    def __post_init__(self) -> None:
        if not 0 < self.queries.rows <= self.keys:
            raise ValueError(f"{self.queries.rows} query rows cannot be the last of {self.keys} tokens")


PlacedBlock = tuple[Block, int]  # a block and the row at which it starts in a buffer


def place(blocks: Iterable[Block], start: int = 0) -> list[PlacedBlock]:
    """Lay blocks one after the other from row `start` on."""
    placed = []
    for block in blocks:
        placed.append((block, start))
        start += block.rows
    return placed


def causal_segments(queries: Sequence[PlacedBlock], keys: Sequence[PlacedBlock]) -> tuple[Segment, ...]:
    """The causal attention of the query blocks to the key blocks, in as few and as long ranges as the two row orders allow.

    A key block lies before a query block, or has its step, or both. A query block with no visible key gets no segment.
    """
    segments: list[Segment] = []
    of_sequence: dict[int, list[PlacedBlock]] = {}
    for placed in keys:
        of_sequence.setdefault(placed[0].sequence, []).append(placed)
    for query, row in queries:
        whole = Span(row, row + query.rows)
        full: list[Span] = []
        squares: list[Segment] = []
        for key, key_row in of_sequence.get(query.sequence, ()):
            if key.start > query.last:
                continue
            if key.last < query.start:
                full.append(Span(key_row, key_row + key.rows))
            elif key.step == query.step:
                squares += _staircase(query, row, key, key_row)
            else:
                raise ValueError(f"key block {key} overlaps query block {query} in another step")
        first = squares[0] if squares and squares[0].queries == whole else None
        if first:
            full += first.full
        if full or first:
            _append(segments, Segment(whole, joined(full), first.causal if first else None))
        segments += [square for square in squares if square is not first]
    return tuple(segments)


def _staircase(query: Block, row: int, key: Block, key_row: int) -> list[Segment]:
    """Two blocks of the same step that overlap: query i sees key j where j <= i - late, so the visible keys grow by one per query.

    Queries before the first visible key have no segment; keys that all others see are a full range; the rest is a causal square, and
    queries behind the last key see all keys.

        late = 1    key 0 1 2      late = -2   key 0 1 2 3 4
        query 0     .              query 0     # # \\
        query 1     \\              query 1     # # # \\
        query 2     # \\            query 2     # # # # \\
    """
    late = -((query.start - key.start) // query.step)
    first, head = max(0, late), max(0, -late)
    size = min(query.rows - first, key.rows - head)
    start, seen = row + first, key_row + head
    full = (Span(key_row, seen),) if head else ()
    segments = [Segment(Span(start, start + size), full, Span(seen, seen + size))] if size > 0 else []
    behind = Span(start + max(size, 0), row + query.rows)
    if behind.rows:
        segments.append(Segment(behind, (Span(key_row, key_row + key.rows),)))
    return segments


def by_queries(segments: Iterable[Segment]) -> tuple[Segment, ...]:
    """Segments of equal query rows made one as far as they have no causal square, and their adjacent key ranges with them."""
    full: dict[Span, list[Span]] = {}
    causal = []
    for segment in segments:
        if segment.causal:
            causal.append(segment)
        else:
            full.setdefault(segment.queries, []).extend(segment.full)
    return (*(Segment(queries, joined(spans)) for queries, spans in full.items()), *causal)


def joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    """Sorted, with spans that touch or overlap made one."""
    joined: list[Span] = []
    for span in sorted(spans):
        if joined and joined[-1].stop >= span.start:
            joined[-1] = Span(joined[-1].start, max(joined[-1].stop, span.stop))
        else:
            joined.append(span)
    return tuple(joined)


def _append(segments: list[Segment], new: Segment) -> None:
    """Append a segment, as a continuation of the last one where both together are one longer segment."""
    last = segments[-1] if segments else None
    if last and last.queries.stop == new.queries.start:
        queries = Span(last.queries.start, new.queries.stop)
        if last.causal is None and new.causal is None and last.full == new.full:
            segments[-1] = Segment(queries, last.full)
            return
        if last.causal and new.causal and last.causal.stop == new.causal.start and new.full == joined([*last.full, last.causal]):
            segments[-1] = Segment(queries, last.full, Span(last.causal.start, new.causal.stop))
            return
    segments.append(new)
