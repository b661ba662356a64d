"""The search for the longest length: doubling, bisection, going down, and what it will try next."""

from __future__ import annotations

from math import ceil, log2

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpbench.longest import MAX_CHAIN, Search


def searched(search: Search, longest: int) -> tuple[Search, list[int]]:
    """The end of a search on a device where `longest` fits, and what was tried."""
    tried: list[int] = []
    while (length := search.next) is not None:
        tried.append(length)
        search = search.after(length, fitted=length <= longest)
    return search, tried


def test_lengths_are_doubled_until_one_does_not_fit_and_then_bisected() -> None:
    search, tried = searched(Search(4096, 128, 0.0), 21_200)
    assert tried == [4096, 8192, 16384, 32768, 24576, 20480, 22528, 21504, 20992, 21248, 21120]
    assert (search.fits, search.fails) == (21_120, 21_248)


def test_where_the_first_length_is_too_long_it_is_halved_down_to_the_shortest() -> None:
    search, tried = searched(Search(1024, 128, 0.01), 300)
    assert tried == [1024, 512, 256, 384]
    assert (search.fits, search.fails) == (256, 384)
    search, tried = searched(Search(640, 256, 0.01), 0)
    assert tried == [768, 256]
    assert (search.fits, search.fails) == (0, 256)


@given(longest=st.integers(1, 10_000_000), start=st.integers(1, 1_000_000), step=st.sampled_from([128, 384, 2048]), precision=st.sampled_from([0.0, 0.01, 0.2]))
def test_the_answer_is_the_longest_to_the_precision_after_few_trials(longest: int, start: int, step: int, precision: float) -> None:
    search, tried = searched(Search(start, step, precision), longest)
    assert len(set(tried)) == len(tried) and all(length % step == 0 and length > 0 for length in tried)
    assert search.fits <= longest < (search.fails or 0)
    if search.fits:
        assert (search.fails or 0) - search.fits <= max(step, precision * search.fits)
    else:
        assert search.fails == step
    first = ceil(start / step) * step
    doublings = abs(log2(max(longest, step) / first)) + 3
    assert len(tried) <= doublings + ceil(log2(max(2, longest / step))) + 1


@pytest.mark.parametrize(("fits", "fails"), [(0, None), (65536, 131072), (0, 512)])
def test_the_chain_is_what_is_tried_as_long_as_all_fits(fits: int, fails: int | None) -> None:
    search = Search(4096, 128, 0.01, fits, fails)
    _, tried = searched(search, 10**9 if fails is None else fails - 1) if fails is not None else (None, [4096 << n for n in range(MAX_CHAIN)])
    assert search.chain == tuple(tried[:MAX_CHAIN])


def test_a_search_that_is_over_has_no_chain() -> None:
    assert Search(4096, 128, 0.01, 4096, 4224).chain == ()
