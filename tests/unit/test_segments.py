import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpbench.partition import PARTITIONS, Block, split
from cpbench.segments import Segment, Span, by_queries, causal_segments, place

batches = st.integers(2, 6).flatmap(lambda cp: st.tuples(st.just(cp), st.lists(st.integers(2 * cp, 60), min_size=1, max_size=3).map(tuple)))


def pairs(segments):
    """All (query row, key row) that the segments compute, with repetition."""
    for segment in segments:
        for query in range(*segment.queries):
            for span in segment.full:
                yield from ((query, key) for key in range(*span))
            if segment.causal:
                yield from ((query, segment.causal.start + i) for i in range(query - segment.queries.start + 1))


def rows(placed):
    return {start + i: (block.sequence, position) for block, start in placed for i, position in enumerate(block.positions)}


@given(st.sampled_from(sorted(PARTITIONS)), batches, st.data())
def test_segments_compute_every_visible_pair_once_and_no_other(name, batch, data):
    cp, lengths = batch
    shards = split(name, lengths, cp)
    rank, source = data.draw(st.integers(0, cp - 1)), data.draw(st.integers(0, cp - 1))
    queries, keys = place(shards.ranks[rank]), place(shards.ranks[source], start=100)
    segments = causal_segments(queries, keys)
    computed = sorted(pairs(segments))
    visible = sorted((q, k) for (q, (sq, pq)), (k, (sk, pk)) in itertools.product(rows(queries).items(), rows(keys).items()) if sq == sk and pk <= pq)
    assert computed == visible
    assert sum(segment.pairs for segment in segments) == len(computed)
    if rank != source:
        assert sorted(pairs(by_queries(segments))) == computed


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_a_zigzag_rank_attends_to_its_own_rows_in_one_call(cp):
    shards = split("zigzag", (16 * cp,), cp)
    for rank in range(cp):
        own = place(shards.ranks[rank])
        assert causal_segments(own, own) == (Segment(Span(0, 16), (), Span(0, 16)),)


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_a_ring_step_is_one_call(cp):
    shards = split("zigzag", (16 * cp,), cp)
    for rank, source in itertools.permutations(range(cp), 2):
        (segment,) = causal_segments(place(shards.ranks[rank]), place(shards.ranks[source]))
        assert segment.causal is None
        assert len(segment.full) == 1
        assert segment.pairs == 16 * 8, "every step is half of a square, whichever way the block comes"


def test_a_whole_sequence_is_one_causal_square():
    block = [(Block(0, 0, 50), 0)]
    assert causal_segments(block, block) == (Segment(Span(0, 50), (), Span(0, 50)),)


@given(st.integers(1, 4), st.integers(0, 40), st.integers(1, 40), st.integers(0, 40), st.integers(1, 40))
def test_blocks_of_equal_step_may_overlap_in_any_way(step, query_start, query_rows, key_start, key_rows):
    query = Block(0, query_start, query_start + query_rows * step, step)
    key = Block(0, key_start, key_start + key_rows * step, step)
    segments = causal_segments([(query, 7)], [(key, 300)])
    visible = [(7 + i, 300 + j) for i, p in enumerate(query.positions) for j, k in enumerate(key.positions) if k <= p]
    assert sorted(pairs(segments)) == visible


def test_overlap_in_another_step_is_a_bug_that_shows():
    with pytest.raises(ValueError, match="another step"):
        causal_segments([(Block(0, 10, 20, 2), 0)], [(Block(0, 5, 15), 0)])


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_gathered_rows_take_one_call_per_earlier_rank_and_one_for_all_later_ones(cp):
    shards = split("zigzag", (16 * cp,), cp)
    for rank in range(cp):
        arrived = [place(shards.ranks[source], 16 * source) for source in range(cp) if source != rank]
        segments = by_queries(segment for blocks in arrived for segment in causal_segments(place(shards.ranks[rank]), blocks))
        assert sum(len(segment.full) for segment in segments) == rank + (rank < cp - 1)
