"""Pages of the K/V cache: tables that cannot be overrun, slots that no two tokens share, and rows that come back in order."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpbench.buffers import Buffers
from cpbench.cache import KVCache, StepCache
from cpbench.paging import BlockTable, plan_cache
from cpbench.partition import Block
from cpbench.segments import place

CPU = torch.device("cpu")
batches = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60)), min_size=1, max_size=4)


@given(st.lists(st.integers(0, 100), min_size=1, max_size=5), st.sampled_from([1, 3, 16, 64]), st.integers(0, 1000))
def test_every_token_has_a_slot_of_its_own(tokens, size, capacity):
    table = BlockTable.allocate(tokens, size, capacity)
    slots = np.concatenate([table.slots(sequence, 0, count) for sequence, count in enumerate(tokens)])
    assert len(set(slots.tolist())) == sum(tokens)
    assert all(0 <= slot < table.rows for slot in slots)
    assert table.rows >= capacity
    assert [len(pages) for pages in table.pages] == [-(-count // size) for count in tokens]


def test_a_length_behind_the_end_of_a_table_is_an_error_and_not_another_sequences_page():
    table = BlockTable.allocate((100, 30), 16)
    assert len(table.slots(1, 0, 32)) == 32, "the last page may be filled"
    with pytest.raises(ValueError, match="tokens 0 to 33 of sequence 1 lie outside its 2 pages of 16"):
        table.slots(1, 0, 33)
    with pytest.raises(ValueError, match="outside"):
        table.slots(0, -1, 5)


def test_pages_are_not_neighbours():
    """A plan that took a sequence's pages for one run of rows would be found out."""
    pages = BlockTable.allocate((64 * 16,), 16).pages[0]
    assert sorted(pages) == list(range(64))
    assert list(pages) != sorted(pages)


@given(batches, st.sampled_from([1, 7, 16]))
def test_what_a_step_writes_the_next_one_reads_in_the_order_of_positions(batch, size):
    prefixes, lengths = [prefix for prefix, _ in batch], [length for _, length in batch]
    totals = [prefix + length for prefix, length in batch]
    table = BlockTable.allocate(totals, size)
    cached = tuple(Block(s, 0, prefix) for s, prefix in enumerate(prefixes) if prefix)
    halves = [Block(s, p + n // 2, p + n) for s, (p, n) in enumerate(zip(prefixes, lengths, strict=True))]
    halves += [Block(s, p, p + n // 2) for s, (p, n) in enumerate(zip(prefixes, lengths, strict=True)) if n // 2]
    cache = KVCache(keep=True, table=table)
    step = StepCache(cache, plan_cache(table, cached, place(halves, 5)), CPU)
    name = {(s, p): s * 1000.0 + p for s, total in enumerate(totals) for p in range(total)}
    like = torch.empty(0)
    if cached:
        step.fill(0, torch.tensor([[name[b.sequence, p]] for b in cached for p in b.positions]))
    rows = torch.full((5 + sum(lengths), 1), -1.0)
    for block, row in place(halves, 5):
        rows[row : row + block.rows, 0] = torch.tensor([name[block.sequence, p] for p in block.positions])
    step.write(0, rows)
    whole = tuple(Block(s, 0, total) for s, total in enumerate(totals))
    after = StepCache(cache, plan_cache(table, whole, []), CPU)
    read = Buffers().get("gather", (sum(totals), 1), like)
    after.read(0, read)
    assert read[:, 0].tolist() == [name[s, p] for s, total in enumerate(totals) for p in range(total)]
    pages = after.pages(0, 1, like)
    for sequence, total in enumerate(totals):
        found = pages[after.tables[sequence].long()].flatten()[:total]
        assert found.tolist() == [name[sequence, p] for p in range(total)]


def test_lanes_of_a_dropped_cache_do_not_share_memory():
    cache = KVCache(keep=False, lanes=2)
    like = torch.empty(0)
    first, second = cache.dense(4, (3, 1), like).fill_(1), cache.dense(5, (3, 1), like).fill_(2)
    assert first.sum() == 3
    assert second.sum() == 6
    assert cache.dense(6, (3, 1), like).data_ptr() == first.data_ptr(), "the next layer reuses the lane"
