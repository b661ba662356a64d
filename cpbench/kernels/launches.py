"""A plan of segments as few varlen launches: pure data, made from row ranges alone.

A varlen kernel takes sequences that lie one after the other, each with its own query rows and key rows, and aligns its causal mask to
the bottom right of each. So a segment's causal square, together with the full range that ends where the square begins, is one causal
sequence; every other full range is one full sequence. Sequences share a launch if they are of the same kind and both their query rows
and their key rows continue where those of the one before end.

    3 sequences, own rows of a zigzag rank: a0 a1 a2 b0 b1 b2      (b sees a of its sequence, and itself)
        causal launch   a0 x a0, a1 x a1, a2 x a2, b0 x b0, b1 x b1, b2 x b2
        full launch     b0 x a0, b1 x a1, b2 x a2
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from cpbench.segments import Segment, Span

KEPT_PLANS = 1024


@dataclass(frozen=True)
class Launch:
    """One varlen call over gap-free query rows and key rows. Sequence i has rows cu_q[i] to cu_q[i + 1] of `queries`; keys likewise."""

    causal: bool
    queries: Span
    keys: Span
    cu_q: tuple[int, ...]
    cu_k: tuple[int, ...]


@lru_cache(maxsize=KEPT_PLANS)
def launches(segments: tuple[Segment, ...]) -> tuple[Launch, ...]:
    """The launches of a plan, causal ones first. Every pair of query and key row that the plan has is in exactly one of them.

    Kept, because every layer runs the same plan.
    """
    causal: list[tuple[Span, Span]] = []
    full: list[tuple[Span, Span]] = []
    for segment in segments:
        spans = list(segment.full)
        if segment.causal:
            prefix = next((span for span in spans if span.stop == segment.causal.start), None)
            if prefix:
                spans.remove(prefix)
            causal.append((segment.queries, Span(prefix.start if prefix else segment.causal.start, segment.causal.stop)))
        full += [(segment.queries, span) for span in spans]
    return (*_chained(causal, True), *_chained(full, False))


def _chained(pairs: Sequence[tuple[Span, Span]], causal: bool) -> list[Launch]:
    """Pairs of query and key ranges in launches: each pair continues the first chain that ends where it begins, or starts one."""
    chains: list[list[tuple[Span, Span]]] = []
    for pair in sorted(pairs):
        chain = next((c for c in chains if (c[-1][0].stop, c[-1][1].stop) == (pair[0].start, pair[1].start)), None)
        if chain is None:
            chains.append([pair])
        else:
            chain.append(pair)
    return [_launch(chain, causal) for chain in chains]


def _launch(chain: Sequence[tuple[Span, Span]], causal: bool) -> Launch:
    queries, keys = ([pair[side] for pair in chain] for side in (0, 1))
    return Launch(causal, Span(queries[0].start, queries[-1].stop), Span(keys[0].start, keys[-1].stop), _offsets(queries), _offsets(keys))


def _offsets(spans: Sequence[Span]) -> tuple[int, ...]:
    return (0, *(span.stop - spans[0].start for span in spans))
