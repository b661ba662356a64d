import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpbench.errors import CpbenchError
from cpbench.partition import PARTITIONS, split

batches = st.integers(2, 9).flatmap(lambda cp: st.tuples(st.just(cp), st.lists(st.integers(2 * cp, 300), min_size=1, max_size=5).map(tuple)))
names = st.sampled_from(sorted(PARTITIONS))


@given(names, batches)
def test_split_gather_restore_is_the_identity(name, batch):
    cp, lengths = batch
    shards = split(name, lengths, cp)
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
    cp, lengths = batch
    shards = split(name, lengths, cp)
    for rank in range(cp):
        positions = [p for part in shards.positions(rank) for p in part]
        assert len(positions) == shards.rows(rank) <= shards.max_rows
        assert shards.causal_pairs(rank) == sum(p + 1 for p in positions)
    assert sum(shards.causal_pairs(rank) for rank in range(cp)) == sum(n * (n + 1) // 2 for n in lengths)


@given(names, batches)
def test_every_last_token_is_held_once(name, batch):
    cp, lengths = batch
    shards = split(name, lengths, cp)
    held = [(rank, sequence, row) for rank in range(cp) for sequence, row in shards.last_rows(rank).items()]
    assert sorted(sequence for _, sequence, _ in held) == list(range(len(lengths)))
    for rank, sequence, row in held:
        positions = [(s, p) for block, part in zip(shards.ranks[rank], shards.positions(rank), strict=True) for s, p in ((block.sequence, p) for p in part)]
        assert positions[row] == (sequence, lengths[sequence] - 1)


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


@pytest.mark.parametrize(("lengths", "hint"), [((7,), "cp=3"), ((100, 5), "cp=2"), ((1,), "at least 8")])
def test_short_sequences_are_refused_with_the_nearest_degree(lengths, hint):
    with pytest.raises(CpbenchError, match="shorter than 2\\*cp") as caught:
        split("zigzag", lengths, 4)
    assert hint in caught.value.message


def test_unknown_partitions_name_the_nearest():
    with pytest.raises(CpbenchError) as caught:
        split("zigzak", (64,), 2)
    assert "'zigzag'" in caught.value.hint
