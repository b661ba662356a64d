"""Merging the records of rounds, and comparing first tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpbench.cell import Cell
from cpbench.errors import CpbenchError
from cpbench.projection.light import least_flops
from cpbench.records import compare_tokens, merge_record, not_measured, rounds_done, token_reference
from cpbench.results import CellResult
from cpbench.stats import median
from tests.unit.fakes import made, record

CELLS = [planned.cell for planned in made()[1].cells]
BASE, CELL = CELLS[0], CELLS[1]


def merged(*records: dict[str, Any], cell: Cell = CELL) -> CellResult:
    result = None
    for one in records:
        result = merge_record(cell, result, one)
    assert result is not None
    return result


@pytest.mark.parametrize(("target", "name"), [("prefill", "ttft_s"), ("layer", "layer_s"), ("attention", "attention_s")])
def test_the_time_is_named_after_the_target_and_the_rest_follows_from_it(target: str, name: str) -> None:
    result = merged(record(2.0), cell=replace(CELL, target=target))
    assert set(result.metrics) == {name, "skew", "tokens_per_s", "tflops_per_rank"}
    assert result.metrics[name].median == 2.0 and result.metrics[name].unit == "s"
    assert result.metrics["tokens_per_s"].median == 128.0 and result.metrics["tokens_per_s"].better == "higher"
    assert result.metrics["tflops_per_rank"].median == pytest.approx(0.5)


@given(st.lists(st.lists(st.floats(0.001, 100.0), min_size=1, max_size=6), min_size=1, max_size=5))
def test_rounds_stay_apart_and_the_median_is_over_all_samples(rounds: list[list[float]]) -> None:
    result = merged(*(record(samples=samples, skew_samples=None) for samples in rounds))
    time, everything = result.metrics["ttft_s"], [sample for one in rounds for sample in one]
    assert time.rounds == rounds and time.n == len(everything) and rounds_done(result) == len(rounds)
    assert time.median == median(everything)
    assert (time.ci95 is None) == (len(everything) < 5)
    assert time.stop == ["max_seconds"] * len(rounds)


def test_what_is_measured_once_is_kept_from_the_round_that_has_it() -> None:
    small, large = {"rank": 0, "peak_live_bytes": 10}, {"rank": 1, "peak_live_bytes": 20}
    first = record(memory=large, first_call_s=9.0, warnings=["a"])
    later = record(memory=small, first_call_s=1.0, warnings=["a", "b"], numerics=None)
    result = merged(first, later)
    assert result.memory is not None and result.memory.rank == 1
    assert result.first_call_s == 9.0 and result.warnings == ["a", "b"]
    assert result.numerics is not None and result.numerics.ratio == 1.0


def test_outliers_are_counted_over_all_rounds_in_one_warning() -> None:
    result = merged(record(samples=[1.0, 1.01, 0.99, 1.02, 0.98, 7.0]), record(samples=[1.0, 1.01, 0.99]))
    assert result.warnings == ["1 of 9 samples far from the median (kept)"]
    assert result.metrics["ttft_s"].n == 9


@pytest.mark.parametrize("status", ["wrong", "unsupported"])
def test_no_time_without_a_right_answer(status: str) -> None:
    result = merged(record(), record(status=status, reason="because", samples=[]))
    assert (result.status, result.reason, result.metrics) == (status, "because", {})


def test_a_failure_keeps_what_was_measured_except_where_the_answer_is_wrong() -> None:
    good = merged(record())
    assert not_measured(CELL, "crash", "boom", good).metrics == good.metrics
    assert not_measured(CELL, "wrong", "no", good).metrics == {}
    assert not_measured(CELL, "skipped", "no time").metrics == {}


@pytest.mark.parametrize(
    "broken", [{"samples": []}, {"samples": None}, {"status": "good"}, {"samples": [1e400]}, {"samples": [0.0]}, {"ranks": [{"rank": "a"}]}]
)
def test_a_broken_record_is_one_sentence(broken: dict[str, Any]) -> None:
    with pytest.raises(CpbenchError, match="record"):
        merge_record(CELL, None, record(**broken))
    with pytest.raises(CpbenchError, match="record"):
        merge_record(CELL, None, {})


def tokens(*pairs: tuple[int, float], error: float | None = 0.01) -> dict[str, Any]:
    return record(first_tokens=[{"token": token, "margin": margin} for token, margin in pairs], numerics={"logits_max_error": error})


@pytest.mark.parametrize(
    ("mine", "theirs", "status", "warnings"),
    [
        (tokens((1, 0.5)), tokens((1, 0.5)), "ok", 0),
        (tokens((2, 0.5)), tokens((1, 0.5)), "wrong", 0),
        (tokens((2, 0.005)), tokens((1, 0.5)), "ok", 1),
        (tokens((2, 0.5)), tokens((1, 0.005)), "ok", 1),
        (tokens((2, 0.5), error=1.0), tokens((1, 0.5)), "ok", 1),
        (tokens((2, 0.5)), tokens((1, 0.5), error=1.0), "ok", 1),
        (tokens((2, 0.5), error=None), tokens((1, 0.5), error=None), "ok", 1),
        (tokens((1, 0.5), (2, 0.5)), tokens((1, 0.5), (3, 0.5)), "wrong", 0),
    ],
)
def test_another_token_is_wrong_only_where_both_margins_exceed_the_error(mine: dict[str, Any], theirs: dict[str, Any], status: str, warnings: int) -> None:
    result = compare_tokens(CELL, merged(mine), merged(theirs, cell=BASE))
    assert (result.status, len(result.warnings)) == (status, warnings)


def test_the_reference_is_the_first_that_computed_the_same() -> None:
    results = [(cell, merged(record(), cell=cell)) for cell in CELLS]
    assert token_reference(CELLS[2], results) == results[0][1]
    assert token_reference(CELLS[2], results[1:]) == results[1][1]  # no baseline: the smallest layout
    assert token_reference(BASE, results) is None
    failed = [(CELLS[0], not_measured(CELLS[0], "oom", "no memory")), *results[1:]]
    assert token_reference(CELLS[2], failed) == results[1][1]
    for other in (replace(CELL, seed=1), replace(CELL, prefixes=(64,))):
        assert token_reference(other, [*results, (other, merged(record(), cell=other))]) is None
    assert compare_tokens(CELL, results[1][1], None) == results[1][1]


def test_a_record_says_whether_context_parallelism_was_on() -> None:
    assert (merged(record()).cp_active, merged(record()).cp_off_reason) == (True, None)
    off = merged(record(cp_active=False, cp_off_reason="too short"))
    assert (off.cp_active, off.cp_off_reason) == (False, "too short")
    assert not not_measured(CELL, "crash", "boom", off).cp_active


def test_the_split_is_of_the_latest_round_and_its_times_are_kept_of_all() -> None:
    def split(exposed: float) -> dict[str, Any]:
        return {"step_s": 1.0, "compute_s": 1.0 - exposed, "comm_s": 0.5, "exposed_comm_s": exposed, "rank": 0, "compute_skew": 1.1}

    result = merged(record(1.0, split=split(0.2)), record(1.0, split=split(0.3)), record(1.0, split={"reason": "a library communicates"}))
    assert result.split is not None and result.split.reason == "a library communicates"
    assert result.metrics["exposed_comm_s"].rounds == [[0.2], [0.3]]
    assert result.metrics["compute_s"].rounds == [[0.8], [0.7]]


@pytest.mark.parametrize(("flops", "is_limit", "stored"), [(0.9e12, True, False), (1.1e12, True, True), (0.9e12, False, True)])
def test_more_than_a_data_sheet_allows_is_refused(flops: float, is_limit: bool, stored: bool) -> None:
    """The record computes 1e12 operations in one second."""
    result = merged(record(1.0, peak={"flops": flops, "source": "data sheet of a GPU", "is_limit": is_limit}))
    assert ("tflops_per_rank" in result.metrics) == ("peak_fraction" in result.metrics) == ("light_fraction" in result.metrics) == stored
    assert bool(result.warnings) != stored
    if stored:
        assert result.metrics["peak_fraction"].median == pytest.approx(1e12 / flops)


def test_the_part_of_the_speed_of_light_leaves_out_what_a_layout_does_in_vain() -> None:
    """Two ranks with all the work of one pass each are half as fast as its operations allow; nothing but compute has a data sheet."""
    operations = least_flops(CELL)
    twice = record(2.0, flops_per_rank=operations, peak={"flops": operations, "source": "data sheet of a GPU", "is_limit": True})
    metrics = merged(twice).metrics
    assert CELL.world_size == 2
    assert metrics["light_fraction"].median == pytest.approx(0.25) and metrics["peak_fraction"].median == pytest.approx(0.5)
    assert (metrics["light_fraction"].unit, metrics["light_fraction"].better, metrics["light_fraction"].n) == ("1", "higher", 3)
