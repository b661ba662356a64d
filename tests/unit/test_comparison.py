"""Which cells are compared, and what is called a change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex

import cpbench
from cpbench.clock_record import ClockRound, Clocks, GpuClocks, Spread
from cpbench.comparison import Comparison, compare
from cpbench.errors import NOTHING_COMPARABLE, CpbenchError
from cpbench.judging import WITHIN_RUN, Row
from cpbench.records import not_measured
from cpbench.results import CellResult, Metric, ResultFile
from cpbench.stats import median, median_interval
from cpbench.verdicts import direction
from tests.cli.samples import make_cell, measured, result, variants

FIVE = (0.99, 1.0, 1.005, 0.995, 1.01)


def metric(rounds: list[list[float]], **changes: Any) -> Metric:
    samples = [sample for one in rounds for sample in one]
    known: dict[str, Any] = {"unit": "s", "rounds": rounds, "median": median(samples), "ci95": median_interval(samples), "n": len(samples)}
    return Metric(**{**known, **changes})


def timed(seconds: float, rounds: tuple[float, ...] = FIVE, layout: str = "cp2", strategy: str = "ring", **changes: Any) -> CellResult:
    """A cell whose rounds take so many times `seconds`, three samples each."""
    memory = changes.pop("memory", 200 << 20)
    cell = measured(make_cell(layout, strategy, **changes), [seconds], memory=memory)
    ttft = metric([[seconds * one * sample for sample in (0.999, 1.0, 1.001)] for one in rounds])
    return cell.model_copy(update={"metrics": {**cell.metrics, "ttft_s": ttft}})


def only(comparison: Comparison, name: str = "ttft_s") -> Row:
    rows = [row for row in comparison.rows if row.metric == name]
    assert len(rows) == 1
    return rows[0]


def verdict_of(old: CellResult, new: CellResult, **changes: Any) -> str:
    return only(compare(result([old]), result([new]), metrics=["time"], **changes)).verdict


@pytest.mark.parametrize(
    ("seconds", "rounds", "expected"),
    [
        (1.0, tuple(1 + (one - 1) * 2 for one in FIVE), "unsure"),
        (1.0, tuple(1 + (one - 1) / 2 for one in FIVE), "same"),
        (1.1, FIVE, "slower"),
        (0.9, FIVE, "faster"),
        (1.025, FIVE, "unsure"),
    ],
)
def test_rounds_decide(seconds: float, rounds: tuple[float, ...], expected: str) -> None:
    assert verdict_of(timed(1.0, rounds), timed(seconds, rounds)) == expected


def test_the_evidence_is_said() -> None:
    row = only(compare(result([timed(1.0)]), result([timed(1.1)])))
    assert row.evidence is not None and row.evidence.basis == "rounds" and row.evidence.counts == (5, 5)
    assert row.evidence.p == pytest.approx(2 / 252)
    assert row.ratio == pytest.approx(1.1)
    assert row.notes == ()


@given(st.lists(st.floats(0.9, 1.1), min_size=4, max_size=6), st.lists(st.floats(0.9, 1.1), min_size=4, max_size=6))
def test_swapping_the_files_swaps_the_verdict(old: list[float], new: list[float]) -> None:
    a, b = timed(1.0, tuple(old)), timed(1.0, tuple(new))
    mirrored = {"faster": "slower", "slower": "faster"}
    there = verdict_of(a, b)
    assert verdict_of(b, a) == mirrored.get(there, there)
    assert verdict_of(a, a) in ("same", "unsure")


def test_no_false_alarms_and_no_missed_changes() -> None:
    rng = np.random.default_rng(0)

    def cells(change: float) -> ResultFile:
        return result([timed(change, tuple(1 + 0.01 * rng.standard_normal(5)), seq=1024 + number) for number in range(300)])

    same, slower = compare(cells(1.0), cells(1.0), metrics=["time"]), compare(cells(1.0), cells(1.05), metrics=["time"])
    assert same.counts["slower"] + same.counts["faster"] <= 0.05 * 300
    assert slower.counts["slower"] >= 0.92 * 300  # 95% in the long run, which benchmarks/verdicts.py shows
    assert same.false_alarms == pytest.approx(300 * 0.0317, abs=0.1)


def test_fewer_rounds_have_a_wider_band_and_say_so() -> None:
    a, b = timed(1.0, (1.0,)), timed(1.04, (1.0,))
    row = only(compare(result([a]), result([b])))
    assert row.verdict == "same" and WITHIN_RUN in row.notes
    assert row.evidence is not None and row.evidence.p is None
    assert verdict_of(a, timed(1.06, (1.0,))) == "slower"
    assert verdict_of(a, timed(1.06, (1.0,)), noise=0.1) == "same"


def test_intervals_within_a_run_must_leave_the_band_too() -> None:
    assert verdict_of(timed(1.0, (0.9, 1.0, 1.1)), timed(1.06, (0.9, 1.0, 1.1))) == "unsure"


def test_strict_is_for_the_whole_table() -> None:
    still = [timed(1.0, seq=1024 * n) for n in range(1, 8)]
    changed = [timed(1.2 if n == 1 else 1.0, seq=1024 * n) for n in range(1, 8)]
    assert compare(result(still), result(changed), metrics=["time"]).counts["slower"] == 1
    assert compare(result(still), result(changed), metrics=["time"], strict=True).counts["slower"] == 0
    assert compare(result(still[:6]), result(changed[:6]), metrics=["time"], strict=True).counts["slower"] == 1


def test_memory_is_exact() -> None:
    memory = {more: only(compare(result([timed(1.0)]), result([timed(1.0, memory=(200 << 20) + more)])), "peak_live_bytes") for more in (0, 1 << 20, 2 << 20)}
    assert [row.verdict for row in memory.values()] == ["same", "same", "worse"]
    assert only(compare(result([timed(1.0)]), result([timed(1.0, memory=100 << 20)])), "peak_live_bytes").verdict == "better"


def test_what_became_of_cells() -> None:
    ok, failed, skipped = timed(1.0), not_measured(make_cell("cp2", "ring"), "oom", "tried 6 GiB"), not_measured(make_cell("cp2", "ring"), "skipped", "budget")
    assert [verdict_of(ok, failed), verdict_of(failed, ok), verdict_of(ok, skipped), verdict_of(failed, failed)] == ["broke", "fixed", "n/a", "n/a"]
    other = timed(1.0, layout="cp4")
    comparison = compare(result([ok]), result([other]))
    assert [row.verdict for row in comparison.rows] == ["gone", "new"] and not comparison.is_comparable
    assert "layout cp2 and cp4" in comparison.reason


def test_kinds_and_kernels_meet_only_when_asked() -> None:
    a, b = timed(1.0), timed(1.1)
    projected = b.model_copy(update={"metrics": {"projected_ttft_s": b.metrics["ttft_s"]}})
    assert verdict_of(a, projected) == "n/a"
    assert verdict_of(a, projected, across=["kind"]) == "slower"
    other = b.model_copy(update={"kernel": "sdpa"})
    assert verdict_of(a, other) == "n/a"
    assert verdict_of(a, other, across=["kernel"]) == "slower"


def test_clocks_that_differ_leave_it_open() -> None:
    def at(mhz: float, seconds: float) -> CellResult:
        gpu = GpuClocks(rank=0, sm_mhz=Spread(min=mhz, median=mhz, max=mhz), samples=9)
        return timed(seconds).model_copy(update={"clocks": Clocks(rounds=[ClockRound(seconds=2.0, gpus=[gpu])])})

    row = only(compare(result([at(2000, 1.0)]), result([at(1800, 1.111)])))
    assert row.verdict == "unsure" and row.notes[0].endswith("by cycles the change is -0.0%")
    assert verdict_of(at(2000, 1.0), at(1950, 1.111)) == "slower"


def test_strategies_of_one_file() -> None:
    cells = [timed(1.0, layout="cp1", strategy="none"), timed(1.0), timed(0.8, strategy="allgather"), timed(1.3, strategy="usp", layout="cp2u2")]
    found = {row.label: row.verdict for row in compare(result(cells), by="strategy", metrics=["time"]).rows}
    assert found == {"cp2 36k: ring -> allgather": "faster", "cp2u2 36k: ring -> usp": "slower"}
    found = {row.label: row.verdict for row in compare(result(cells), by="strategy=allgather", metrics=["time"]).rows}
    assert found == {"cp2 36k: allgather -> ring": "slower", "cp2u2 36k: allgather -> usp": "slower"}


def test_layouts_and_degrees_of_one_file_and_of_two() -> None:
    cells = [timed(1.0, layout="cp1", strategy="none"), timed(0.6), timed(0.3, layout="cp4"), timed(0.5, layout="tp2cp2")]
    layouts = compare(result(cells), by="layout", metrics=["time"])
    assert [row.label for row in layouts.rows] == ["ring 36k: cp1 -> cp2", "ring 36k: cp1 -> cp4", "ring 36k: cp1 -> cp2tp2"]
    degrees = compare(result(cells), by="cp", metrics=["time"])
    assert [row.label for row in degrees.rows] == ["ring 36k: cp1 -> cp2", "ring 36k: cp1 -> cp4"]
    across = compare(result([timed(1.0)]), result([timed(0.8, strategy="allgather")]), by="strategy", metrics=["time"])
    assert [(row.label, row.verdict) for row in across.rows] == [("cp2 36k: ring -> allgather", "faster")]


def test_variants_keep_their_blocks() -> None:
    comparison = compare(variants(), metrics=["time"])
    assert [row.verdict for row in comparison.rows] == ["faster", "faster", "broke"]
    evidence = comparison.rows[0].evidence
    assert evidence is not None and evidence.basis == "alternated" and evidence.interval is not None
    assert evidence.ratio == pytest.approx(0.93, abs=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metrics": ["ttft"]}, "Unknown metric 'ttft'"),
        ({"by": "layuot"}, "Unknown field of --by 'layuot'"),
        ({"by": "strategy=rnig"}, "Unknown strategy 'rnig'"),
        ({"across": ["kernels"]}, "Unknown --across 'kernels'"),
        ({}, "There is one file"),
    ],
)
def test_bad_questions(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CpbenchError, match=message):
        compare(result([timed(1.0)]), **changes)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-320, 1e308])
def test_hostile_numbers_are_not_compared(value: float) -> None:
    strange = timed(1.0).model_copy(update={"metrics": {"ttft_s": metric([[value]] * 5)}})
    for a, b in ((timed(1.0), strange), (strange, timed(1.0)), (strange, strange)):
        comparison = compare(result([a]), result([b]))
        assert only(comparison).verdict in ("n/a", "faster", "slower", "same", "unsure")
        assert "inf" not in comparison.to_frame().to_csv()


def test_only_what_differs_of_the_environment() -> None:
    a, b = result([timed(1.0)]), result([timed(1.0)])
    a.environment["running"] = {"2": {"nccl": "2.26"}, "4": {"nccl": "2.26"}}
    b.environment["running"] = {"2": {"nccl": "2.28"}, "4": {"nccl": "2.28"}}
    assert compare(a, b).environment == (("running.nccl", "2.26", "2.28"),)


def test_geomeans_say_what_they_leave_out() -> None:
    failed = not_measured(make_cell("cp4", "ring"), "oom", "x")
    old = result([timed(1.0), timed(1.0, strategy="allgather"), timed(1.0, layout="cp4")])
    new = result([timed(0.5), timed(2.0, strategy="allgather"), failed])
    mean = compare(old, new, metrics=["time"]).geomeans[0]
    assert (mean.cells, mean.left_out) == (2, 1) and mean.ratio == pytest.approx(1.0)


def test_from_python() -> None:
    comparison = cpbench.compare(result([timed(1.0)]), result([timed(1.1)]))
    frame = comparison.to_frame()
    assert list(frame.verdict) == ["slower", "same"] and frame.seq[0] == 36864
    hostile = timed(1.1).model_copy(update={"warnings": []})
    hostile.key["options"] = {"x": "<script>"}
    page = compare(result([hostile]), result([hostile]))._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_the_band_is_as_wide_in_both_directions() -> None:
    assert direction(1.02, None, None, 0.02) == direction(1 / 1.02, None, None, 0.02) == "same"
    assert (direction(1.03, None, 0.2, 0.02), direction(1.03, None, 0.01, 0.02), direction(0.97, None, 0.01, 0.02)) == ("unsure", "up", "down")


def test_by_without_a_baseline_or_a_choice_there_is_nothing_to_compare() -> None:
    one = compare(result([timed(1.0, layout="cp2", strategy="ring")]), by="strategy")
    assert one.rows == () and not one.is_comparable
    with pytest.raises(CpbenchError, match="can be compared") as error:
        one.require_comparable()
    assert error.value.exit_code == NOTHING_COMPARABLE
    with pytest.raises(CpbenchError, match="strategy"):
        compare(result([timed(1.0, strategy="ring"), timed(1.1, strategy="ulysses")]), by="strategy=allgather")
    lost = timed(1.0, strategy="ring").model_copy(update={"status": "oom", "reason": "no memory", "metrics": {}})
    found = compare(result([lost, timed(1.0, strategy="ulysses"), timed(1.2, strategy="allgather")]), by="strategy", metrics=["time"])
    assert {(row.match.change, row.verdict) for row in found.rows} == {("ulysses -> ring", "broke"), ("ulysses -> allgather", "slower")}


def test_by_compares_within_one_batch_and_prefix() -> None:
    def cells(lengths: list[int], prefixes: list[int], factor: float) -> list[CellResult]:
        made = [timed(seconds, strategy=name) for name, seconds in (("ring", factor), ("ulysses", 0.8 * factor))]
        return [
            cell.model_copy(update={"id": f"{cell.id}/{lengths}{prefixes}", "key": {**cell.key, "lengths": lengths, "prefixes": prefixes}}) for cell in made
        ]

    batches = [cells([4096], [0], 1.0), cells([4096], [8192], 2.0), cells([4096, 4096], [0, 0], 3.0), cells([1000, 7192], [0, 0], 4.0)]
    found = compare(result([cell for batch in batches for cell in batch]), by="strategy", metrics=["time"])
    assert [row.verdict for row in found.rows] == ["faster"] * 4
    assert len({row.label for row in found.rows}) == 4
    assert all(row.ratio == pytest.approx(0.8) for row in found.rows)


def test_variants_with_rounds_are_judged_by_rounds() -> None:
    a, b = variants().cells[:2]
    assert a.ab and b.ab
    passes = [[1.0, 1.001, 0.999, 1.0]] * 5
    timing = {name: [[factor * one for one in passes[0]] for _ in range(5)] for name, factor in (("A", 1.0), ("B", 0.9))}
    cells = [
        cell.model_copy(update={"metrics": {"ttft_s": metric(timing[cell.ab.variant])}, "ab": cell.ab.model_copy(update={"rounds": [1, 2, 3, 4, 5], **ratio})})
        for cell, ratio in ((a, {}), (b, {"ratio": 0.9, "blocks": 10}))
        if cell.ab
    ]
    row = only(compare(result(cells), metrics=["time"]))
    assert row.evidence is not None and row.evidence.basis == "alternated" and row.evidence.counts == (5, 5)
    assert row.verdict == "faster" and WITHIN_RUN not in row.notes
    alone = [cell.model_copy(update={"ab": cell.ab.model_copy(update={"rounds": [1, 2, None, None, None]})}) for cell in cells if cell.ab]
    few = only(compare(result(alone), metrics=["time"]))
    assert few.evidence is not None and few.evidence.counts == (2, 2) and WITHIN_RUN in few.notes


@pytest.mark.parametrize(("median", "interval"), [(1e308, (5e-324, 1e308)), (1.0, (1e-320, 1e300))])
def test_intervals_that_cannot_be_are_left_out(median: float, interval: tuple[float, float]) -> None:
    cell = timed(1.0)
    odd = cell.model_copy(update={"metrics": {"ttft_s": metric([[1.0]], median=median, ci95=interval)}})
    row = only(compare(result([odd]), result([odd]), metrics=["time"]))
    assert row.evidence is not None and row.evidence.interval is None


def test_negative_bytes_of_a_file_have_no_ratio() -> None:
    old, new = (timed(1.0, memory=size) for size in (200 << 20, -5))
    assert only(compare(result([old]), result([new])), "peak_live_bytes").ratio is None


def test_the_forest_draws_the_band_that_was_asked_for() -> None:
    from matplotlib.patches import Rectangle

    from cpbench.plot.forest import BAND, draw

    chart = draw(compare(result([timed(1.0)]), result([timed(1.1)]), metrics=["time"], noise=0.07))
    assert chart is not None
    bands = [patch for patch in chart.axes[0].patches if isinstance(patch, Rectangle) and to_hex(patch.get_facecolor()) == BAND]
    assert [(round(band.get_x(), 6), round(band.get_width(), 6)) for band in bands] == [(round(1 / 1.07, 6), round(1.07 - 1 / 1.07, 6))]
    assert "within 7%" in chart.get_suptitle()
