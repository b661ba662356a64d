"""The ratio of two variants: block by block, over the rounds in which they alternated."""

from __future__ import annotations

import pytest

from cpbench.ab import alternations, block_ratios, with_ratio, with_rounds
from cpbench.records import merge_record, not_measured
from cpbench.results import CellResult
from tests.unit.fakes import made, record

PAIR = made(ab=["strategy=ring", "strategy=allgather"])[1].pairs[0]
KNOWN = alternations([PAIR])


def measured(letter: str, rounds: list[tuple[int | None, list[float]]]) -> CellResult:
    """A variant with samples of some rounds; the number of each, None where it ran alone."""
    cell = PAIR.a if letter == "A" else PAIR.b
    result: CellResult | None = None
    for number, samples in rounds:
        known = result.ab if result and result.ab else KNOWN[cell.id]
        result = with_rounds(merge_record(cell, result, record(samples=samples, skew_samples=[])), known, number)
    assert result is not None
    return result


def compared(a: CellResult | None, b: CellResult) -> tuple[float | None, int]:
    found = with_ratio(b, a).ab
    assert found is not None
    return found.ratio, found.blocks


def test_each_cell_knows_which_variant_it_is_and_the_other() -> None:
    a, b = KNOWN[PAIR.a.id], KNOWN[PAIR.b.id]
    assert (a.variant, a.setting, a.other) == ("A", "strategy=ring", PAIR.b.id)
    assert (b.variant, b.setting, b.other) == ("B", "strategy=allgather", PAIR.a.id)


def test_a_steady_drift_cancels_in_every_block() -> None:
    passes = [1.0 + 0.05 * number for number in range(24)]  # A B B A ...: both take as long
    a = [passes[start + place] for start in range(0, 24, 4) for place in (0, 3)]
    b = [passes[start + place] for start in range(0, 24, 4) for place in (1, 2)]
    assert block_ratios(a, b) == pytest.approx([1.0] * 6)
    assert block_ratios(a, [0.9 * seconds for seconds in b]) == pytest.approx([0.9] * 6)


def test_the_ratio_is_the_median_over_blocks_with_its_interval_from_five_on() -> None:
    a, b = [(0, [1.0, 1.0] * 5)], [(0, [0.9, 0.9, 0.8, 1.0, 0.7, 0.7, 0.95, 0.95, 0.92, 0.92])]
    found = with_ratio(measured("B", b), measured("A", a)).ab
    assert found is not None and (found.blocks, found.ratio) == (5, pytest.approx(0.9))
    assert found.ratio_ci95 == pytest.approx((0.7, 0.95))
    few = with_ratio(measured("B", [(0, [0.9, 0.9])]), measured("A", [(0, [1.0, 1.0])])).ab
    assert few is not None and (few.blocks, few.ratio_ci95) == (1, None)


def test_only_rounds_in_which_both_alternated_count() -> None:
    a = measured("A", [(0, [1.0, 1.0]), (2, [4.0, 4.0])])  # A failed in round 1, and was tried again in round 2
    b = measured("B", [(0, [2.0, 2.0]), (None, [9.0, 9.0, 9.0]), (2, [2.0, 2.0])])
    assert b.ab is not None and b.ab.rounds == [0, None, 2]
    assert compared(a, b) == (pytest.approx(1.25), 2)


def test_without_a_time_of_both_there_is_no_ratio() -> None:
    a, b = measured("A", [(0, [1.0, 1.0])]), measured("B", [(0, [2.0, 2.0])])
    assert compared(None, b) == (None, 0)
    assert compared(a.model_copy(update={"status": "crash"}), b) == (None, 0)
    assert compared(measured("A", [(None, [1.0, 1.0])]), measured("B", [(None, [2.0, 2.0])])) == (None, 0)
    wrong = with_rounds(not_measured(PAIR.b, "wrong", "ratio 2.0", b), b.ab, None) if b.ab else b
    assert wrong.ab is not None and wrong.ab.rounds == [] and compared(a, wrong) == (None, 0)
