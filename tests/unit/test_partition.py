from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpbench.errors import CpbenchError
from cpbench.partition import PARTITIONS, Block, cut, split, switched_off

batches = st.integers(2, 9).flatmap(
    lambda cp: st.tuples(st.just(cp), st.lists(st.tuples(st.integers(1, 299), st.integers(0, 200)), min_size=1, max_size=5).map(tuple))
)
names = st.sampled_from(sorted(PARTITIONS))


def cases(batch):
    cp, sequences = batch
    return cp, tuple(length for length, _ in sequences), tuple(prefix for _, prefix in sequences)


@given(names, batches)
def test_split_gather_restore_is_the_identity(name, batch):
    cp, lengths, prefixes = cases(batch)
    shards = split(name, lengths, cp, prefixes)
    tokens = list(range(sum(lengths)))
    gathered = [[tokens[i] for part in shards.tokens(rank) for i in part] for rank in range(cp)]
    restored = [None] * len(tokens)
    for rank in range(cp):
        order = [i for part in shards.tokens(rank) for i in part]
        for row, index in enumerate(order):
            restored[index] = gathered[rank][row]
    assert restored == tokens


@given(names, batches)
def test_rows_positions_and_work_agree_with_the_tokens(name, batch):
    cp, lengths, prefixes = cases(batch)
    shards = split(name, lengths, cp, prefixes)
    starts = [0, *accumulate(lengths)]
    for rank in range(cp):
        positions = [p for part in shards.positions(rank) for p in part]
        sequences = [block.sequence for block in shards.ranks[rank] for _ in range(block.rows)]
        assert len(positions) == shards.rows(rank) <= shards.max_rows
        assert shards.causal_pairs(rank) == sum(p + 1 for p in positions)
        tokens = [i for part in shards.tokens(rank) for i in part]
        assert tokens == [starts[s] + p - prefixes[s] for s, p in zip(sequences, positions, strict=True)]
    copies = cp if shards.replicated else 1
    total = sum(p * n + n * (n + 1) // 2 for n, p in zip(lengths, prefixes, strict=True))
    assert sum(shards.causal_pairs(rank) for rank in range(cp)) == copies * total


@given(names, batches)
def test_every_rank_takes_the_same_decision_and_holds_tokens(name, batch):
    cp, lengths, prefixes = cases(batch)
    shards = split(name, lengths, cp, prefixes)
    off = switched_off(name, lengths, cp)
    assert shards.replicated == (off is not None or name == "replicated")
    assert all(shards.rows(rank) > 0 for rank in range(cp))
    if shards.replicated:
        assert all(shards.ranks[rank] == shards.whole for rank in range(cp))


@given(st.sampled_from(["zigzag", "contiguous", "interleave"]), st.integers(1, 4), st.integers(1, 4), st.lists(st.integers(40, 120), min_size=1, max_size=3))
def test_inner_pieces_of_a_hybrid_are_its_ring_places_in_order(name, ring, inner, lengths):
    pieces = split(name, lengths, ring * inner, inner=inner)
    places = split(name, lengths, ring)
    for place in range(ring):
        rows = [range_ for member in range(inner) for range_ in pieces.tokens(place * inner + member)]
        assert [i for part in rows for i in part] == [i for part in places.tokens(place) for i in part]


@given(names, batches)
def test_every_last_token_is_held_once(name, batch):
    cp, lengths, prefixes = cases(batch)
    shards = split(name, lengths, cp, prefixes)
    ranks = [0] if shards.replicated else range(cp)
    held = [(rank, sequence, row) for rank in ranks for sequence, row in shards.last_rows(rank).items()]
    assert sorted(sequence for _, sequence, _ in held) == list(range(len(lengths)))
    for rank, sequence, row in held:
        positions = [(block.sequence, p) for block in shards.ranks[rank] for p in block.positions]
        assert positions[row] == (sequence, prefixes[sequence] + lengths[sequence] - 1)


@given(st.integers(2, 8), st.lists(st.integers(0, 5000), min_size=1, max_size=3))
def test_zigzag_balances_causal_work_within_one_percent_from_512_cp_tokens_on(cp, extra):
    lengths = tuple(512 * cp + more for more in extra)
    work = [split("zigzag", lengths, cp).causal_pairs(rank) for rank in range(cp)]
    assert max(work) / min(work) <= 1.01


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_zigzag_work_is_exactly_equal_where_blocks_are(cp):
    length = 64 * cp
    assert {split("zigzag", (length,), cp).causal_pairs(rank) for rank in range(cp)} == {length * (length + 1) // 2 // cp}


def test_zigzag_vector_with_remainders_and_two_sequences():
    """The worked example of the specification: blocks, rows and local order for c=4, L=[9, 17]."""
    shards = split("zigzag", (9, 17), 4)
    assert [shards.rows(rank) for rank in range(4)] == [8, 6, 6, 6]
    assert shards.max_rows == 8, "a ceiling of the mean would be 7"
    assert [(b.sequence, b.rows) for b in shards.ranks[0]] == [(0, 2), (1, 3), (0, 1), (1, 2)]
    assert [(b.sequence, b.start, b.stop) for b in shards.ranks[3]] == [(0, 4, 5), (1, 7, 9), (0, 5, 6), (1, 9, 11)]


def test_the_first_half_of_equal_sequences_is_not_half_of_the_rows():
    shards = split("zigzag", (9, 9), 4)
    assert sum(block.rows for block in shards.ranks[0][:2]) == 4


def blocks_of(shards, cp):
    """The block sizes of each sequence, and the index of each block of each rank in the concatenation over sequences."""
    sizes = [[stop - start for start, stop in cut(length, 2 * cp)] for length in shards.lengths]
    starts = [list(accumulate([p, *own]))[:-1] for p, own in zip(shards.prefixes, sizes, strict=True)]
    return sizes, [[b.sequence * 2 * cp + starts[b.sequence].index(b.start) for b in shards.ranks[rank]] for rank in range(cp)]


def test_zigzag_metadata_vector_with_prefixes():
    """The published worked example: c=4, L=[9, 17], p=[3, 0]: blocks taken, order of the gathered pieces, keys of each half."""
    shards = split("zigzag", (9, 17), 4, (3, 0))
    sizes, taken = blocks_of(shards, 4)
    assert sizes == [[2, 1, 1, 1, 1, 1, 1, 1], [3, 2, 2, 2, 2, 2, 2, 2]]
    assert taken[0] == [0, 8, 7, 15]
    assert taken[3] == [3, 11, 4, 12]
    assert [shards.rows(rank) for rank in range(4)] == [8, 6, 6, 6]
    assert [block.rows for rank in range(4) for block in shards.ranks[rank]] == [2, 3, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2]
    order = [block for rank in range(4) for block in taken[rank]]
    assert [order.index(block) for block in range(16)] == [0, 4, 8, 12, 14, 10, 6, 2, 1, 5, 9, 13, 15, 11, 7, 3]
    keys = [[block.stop for block in shards.ranks[rank]] for rank in range(4)]
    assert keys[0] == [5, 3, 12, 17]
    assert keys[1] == [6, 5, 11, 15]
    assert keys[3] == [8, 9, 9, 11]


def test_work_of_an_uneven_sequence_with_a_prefix_is_the_published_one():
    shards = split("zigzag", (1003,), 4, (500,))
    assert [shards.causal_pairs(rank) for rank in range(4)] == [251126, 251377, 251628, 250875]


def test_a_prefix_is_never_derived_from_padded_lengths():
    """p=1, L=3670, c=4: from lengths padded to 3672 the prefix would come out as -1."""
    shards = split("zigzag", (3670,), 4, (1,))
    assert shards.positions(0)[0].start == 1
    assert shards.last_rows(0) == {0: shards.rows(0) - 1}


@pytest.mark.parametrize("cp", [2, 4, 8])
def test_one_short_sequence_switches_context_parallelism_off_for_the_batch(cp):
    lengths = (100, 2 * cp - 1)
    assert f"a sequence of {2 * cp - 1} new tokens is shorter than 2*cp = {2 * cp}" in switched_off("zigzag", lengths, cp)
    shards = split("zigzag", lengths, cp)
    assert shards.replicated
    assert {shards.rows(rank) for rank in range(cp)} == {sum(lengths)}
    assert switched_off("zigzag", (100, 2 * cp), cp) is None
    assert switched_off("interleave", lengths, cp) is None


def test_interleave_vector():
    """N=7, c=2: gathered t0 t2 t4 t6, t1 t3 t5 and one padded row."""
    shards = split("interleave", (7,), 2)
    assert [list(part) for rank in range(2) for part in shards.tokens(rank)] == [[0, 2, 4, 6], [1, 3, 5]]
    assert shards.max_rows == 4


@given(st.integers(2, 9), st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_interleave_counts_with_carry(cp, lengths):
    """Rows of request [start, stop) on rank k: floor((stop-1-k)/c) - floor((start-1-k)/c), and never more than one apart in total."""
    shards = split("interleave", lengths, cp)
    if shards.replicated:
        return
    starts = [0, *accumulate(lengths)]
    for rank in range(cp):
        counts = {block.sequence: block.rows for block in shards.ranks[rank]}
        for sequence, (start, stop) in enumerate(pairwise(starts)):
            assert counts.get(sequence, 0) == (stop - 1 - rank) // cp - (start - 1 - rank) // cp
    rows = [shards.rows(rank) for rank in range(cp)]
    assert max(rows) - min(rows) <= 1


def test_a_strided_block_counts_its_own_keys():
    block = Block(0, 5, 30, 7)
    assert list(block.positions) == [5, 12, 19, 26]
    assert block.causal_pairs == 6 + 13 + 20 + 27


def test_unknown_partitions_name_the_nearest():
    with pytest.raises(CpbenchError) as caught:
        split("zigzak", (64,), 2)
    assert "'zigzag'" in caught.value.hint
