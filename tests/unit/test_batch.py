"""How a batch is written, and how repeated flags become batches."""

from __future__ import annotations

import pytest

from cpbench.batch import Batch, flag_batches
from cpbench.errors import CpbenchError

K = 1024


@pytest.mark.parametrize(
    ("lengths", "prefixes", "label", "name", "exact"),
    [
        ((36 * K,), (), "36k", "36k", "36k = 36,864 tokens"),
        ((1000,), (), "1000", "1000", "1,000 tokens"),
        ((36 * K,), (32 * K,), "36k@32k", "36k@32k", "36k@32k = 36,864 tokens behind 32,768 cached"),
        ((2 * K,) * 3, (), "2k", "2k b3", "2k = 2,048 tokens"),
        ((2 * K,) * 2, (K, 0), "2k@1k+2k", "2k@1k+2k", "2k@1k+2k = 4,096 tokens behind 1,024 cached"),
        ((1003, 517, 36 * K), (500, 0, 32 * K), "1003@500+517+36k@32k", "1003@500+517+36k@32k", "1003@500+517+36k@32k = 38,384 tokens behind 33,268 cached"),
        ((1, 2, 3, 4, 5 * K), (), "1-5k", "1-5k b5", "1-5k = 5,130 tokens"),
        ((1, 2, 3, 4, 5), (0, 0, 7, 0, 0), "1-5@0-7", "1-5@0-7 b5", "1-5@0-7 = 15 tokens behind 7 cached"),
        ((), (), "?", "?", None),
    ],
)
def test_names(lengths: tuple[int, ...], prefixes: tuple[int, ...], label: str, name: str, exact: str | None) -> None:
    batch = Batch(lengths, prefixes)
    assert (batch.label, batch.name) == (label, name)
    assert exact is None or batch.exact == exact


def test_no_prefixes_and_prefixes_of_zero_are_the_same_batch() -> None:
    assert Batch((3, 4)) == Batch((3, 4), (0, 0)) != Batch((3, 4), (0, 1))


@pytest.mark.parametrize(
    ("lengths", "prefixes", "expected"),
    [
        (["5,6"], [], [{"lengths": "5,6"}]),
        (["5,6", "7"], ["1,2", "3"], [{"lengths": "5,6", "prefixes": "1,2"}, {"lengths": "7", "prefixes": "3"}]),
        (["5,6", "7"], ["32k"], [{"lengths": "5,6", "prefixes": "32k"}, {"lengths": "7", "prefixes": "32k"}]),
    ],
)
def test_flags_pair_in_order(lengths: list[str], prefixes: list[str], expected: list[dict[str, str]]) -> None:
    assert flag_batches(lengths, prefixes) == expected


@pytest.mark.parametrize(("prefixes", "times"), [(["1,2"], "1 time"), (["1", "2", "3"], "3 times")])
def test_flags_that_do_not_pair_up(prefixes: list[str], times: str) -> None:
    with pytest.raises(CpbenchError) as caught:
        flag_batches(["5,6", "7"], prefixes)
    assert caught.value.message == f"--lengths is given 2 times and --prefix {times}."
    assert "2 times" in caught.value.hint
