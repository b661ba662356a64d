"""What figures show: the values, marks, names and axes that are drawn, and not pixels."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

import cpbench
from cpbench import plot
from cpbench.errors import CpbenchError
from cpbench.frame import Results
from cpbench.plot.canvas import Chart, svg, write
from cpbench.plot.entries import Entry, read_entries
from cpbench.plot.scales import Scale, lay_out_x, lay_out_y
from cpbench.plot.style import COLOURS, styles
from cpbench.recommend import Candidate, advise
from cpbench.records import not_measured
from cpbench.report.rows import group_rows
from cpbench.results import CellResult, Peak, ResultFile
from cpbench.where import parse_where
from tests.cli import samples

K = 1024
SAMPLES = {"healthy": samples.healthy, "troubled": samples.troubled, "on_gpus": samples.on_gpus, "batches": samples.batches, "variants": samples.variants}
LENGTHS = (4 * K, 32 * K, 1024 * K)


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """A warning of matplotlib's is a mistake of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def results(*files: ResultFile) -> Results:
    return Results(files, tuple(f"{'abc'[number]}.json" for number in range(len(files))))


def grid(*layouts: tuple[str, str], lengths: tuple[int, ...] = LENGTHS, **changes: Any) -> list[CellResult]:
    """Cells whose time grows with the length and shrinks with the ranks."""
    cells = [samples.make_cell(layout, strategy, seq, **changes) for seq in lengths for layout, strategy in layouts]
    return [samples.measured(cell, [cell.lengths[0] / K / cell.world_size * (1 + 0.01 * n) for n in range(5)], memory=cell.lengths[0] << 10) for cell in cells]


RING = (("cp1", "none"), ("cp2", "ring"), ("cp2", "ulysses"))


def lines(axes: Axes, style: str = "-") -> list[Line2D]:
    return [line for line in axes.lines if line.get_linestyle() == style and len(line.get_xydata()) > 1]  # type: ignore[arg-type]


def markers(axes: Axes, marker: str) -> list[Line2D]:
    return [line for line in axes.lines if line.get_marker() == marker and len(line.get_xydata()) == 1]  # type: ignore[arg-type]


def names(chart: Chart) -> list[str]:
    return [text.get_text() for legend in chart.legends for text in legend.get_texts()]


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def ticks(axes: Axes) -> list[str]:
    axes.figure.draw_without_rendering()
    return [label.get_text() for label in axes.get_xticklabels()]


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_drawn_without_a_warning(name: str) -> None:
    for chart in plot.figures(results(SAMPLES[name]())).values():
        assert svg(chart).startswith("<svg")


def test_time_against_length_is_what_was_measured() -> None:
    chart = plot.figure(results(samples.result(grid(*RING))), "time")
    (axes,) = chart.axes
    assert [label for label in ticks(axes) if label] == ["4k", "32k", "1M"]
    assert axes.get_xscale() == axes.get_yscale() == "log"
    assert next(line.get_xydata().tolist() for line in lines(axes)) == [[seq, pytest.approx(seq / K * 1.02)] for seq in LENGTHS]  # type: ignore[union-attr]
    assert names(chart) == ["cp1", "cp2 ring", "cp2 ulysses"]
    assert [len(container[2][0].get_segments()) for container in axes.containers] == [3, 3, 3]  # every point has its interval
    assert chart.get_suptitle() == "TTFT\nqwen3-tiny, 1 layer, float32 on cpu"


def test_failed_cells_are_crosses_at_the_top_named_and_break_the_line() -> None:
    cells = grid(*RING)
    cells[4] = not_measured(samples.make_cell("cp2", "ring", 32 * K), "oom", "out of memory", cells[4])
    cells[8] = not_measured(samples.make_cell("cp2", "ulysses", 1024 * K), "timeout", "took too long")
    chart = plot.figure(results(samples.result(cells)), "time")
    (axes,) = chart.axes
    crosses = [line.get_xydata()[0].tolist() for line in markers(axes, "x")]  # type: ignore[index]
    assert [x for x, _ in crosses] == [32 * K, 1024 * K] and all(0.9 < y < 1 for _, y in crosses)
    assert texts(axes) == ["oom", "timeout"]
    assert names(chart) == ["cp1", "cp2 ring, oom at 32k", "cp2 ulysses, timeout at 1M", "failed: no value"]
    assert math.isnan(lines(axes)[1].get_xydata()[1][1])  # type: ignore[index]
    highest = max(point[1] for line in lines(axes) for point in line.get_xydata() if not math.isnan(point[1]))  # type: ignore[union-attr]
    assert axes.transData.transform((1, highest))[1] < axes.transAxes.transform((0, 0.94))[1]


def test_cells_that_fail_at_one_length_do_not_hide_each_other() -> None:
    many = [("cp1", "none"), *((f"cp{n}", "ring") for n in (2, 4, 8)), *((f"cp{n}", "allgather") for n in (2, 4, 8))]
    cells = grid(*many, lengths=(4 * K,)) + [not_measured(samples.make_cell(*one, 8 * K), "oom", "x") for one in many]
    chart = plot.figure(results(samples.result([*cells, *grid(("cp8", "ulysses"), lengths=(8 * K,))])), "time")
    heights = [line.get_xydata()[0][1] for line in markers(chart.axes[0], "x")]  # type: ignore[index]
    assert len(set(heights)) == len(many) and min(heights) > 0.4


def test_oversubscribed_derived_and_projected_values_look_different() -> None:
    cells = grid(("cp1", "none"), ("cp2", "ring"), ("cp4", "ring"), lengths=(4 * K, 8 * K))
    for cell, kind in zip(cells[:2], ("derived", "projected"), strict=True):
        cell.metrics[f"{kind}_ttft_s"] = cell.metrics.pop("ttft_s")
    chart = plot.figure(results(samples.result(cells)), "time")
    (axes,) = chart.axes
    first = [line for line in axes.lines if line.get_linestyle() == "None" and line.get_xydata()[0][0] == 4 * K]  # type: ignore[arg-type,index]
    looks = [(line.get_fillstyle(), line.get_markerfacecolor()) for line in first if line.get_marker() in "os^"]
    assert looks == [("left", COLOURS[0]), ("full", "white"), ("full", "white")]
    assert names(chart)[3:] == ["hollow: more threads than cores", "derived, not measured", "projected, not measured"]


def test_projected_values_are_joined_by_dots() -> None:
    cells = grid(("cp2", "ring"))
    for cell in cells:
        cell.metrics["projected_ttft_s"] = cell.metrics.pop("ttft_s")
    (axes,) = plot.figure(results(samples.result(cells)), "time").axes
    assert (len(lines(axes, ":")), len(lines(axes, "-"))) == (1, 0)


def test_one_length_is_a_row_for_each_layout() -> None:
    chart = plot.figure(results(samples.healthy()), "time")
    (axes,) = chart.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cp1", "cp2 allgather", "cp2 ring", "cp2 ulysses", "cp4 ring", "cp8 ring"]
    assert texts(axes) == ["4.53 s", "4.60 s", "4.60 s", "4.50 s", "4.66 s", "4.75 s"]
    assert (axes.get_xlim()[0] == 0 and axes.get_title() == "") or axes.get_title(loc="left") == "36k"


def test_memory_has_the_capacity_as_a_line_where_it_is_in_reach() -> None:
    near, far = (samples.result(grid(*RING, device="cuda", dtype="bfloat16"), device="cuda") for _ in range(2))
    near.environment["gpu_memory_bytes"], far.environment["gpu_memory_bytes"] = 3 << 30, 100 << 30
    assert "capacity 3.00 GiB" in texts(plot.figure(results(near), "memory").axes[0])
    assert "capacity 100 GiB, beyond this axis" in texts(plot.figure(results(far), "memory").axes[0])
    limited = samples.result(grid(*RING))
    limited.run.scenario["limits"] = {"memory": 2 << 30}
    assert "capacity 2.00 GiB" in texts(plot.figure(results(limited), "memory").axes[0])
    assert not texts(plot.figure(results(samples.result(grid(*RING))), "memory").axes[0])  # the memory of a host is not one rank's


def test_throughput_has_the_peak_of_the_device() -> None:
    cells = grid(*RING)
    for cell in cells:
        cell.peak = Peak(flops=4e11, source="a data sheet", is_limit=True)
    assert any(text.startswith("peak of the device 0.4") for text in texts(plot.figure(results(samples.result(cells)), "throughput").axes[0]))
    cells[0].peak = Peak(flops=9e11, source="another one", is_limit=True)
    assert not texts(plot.figure(results(samples.result(cells)), "throughput").axes[0])


def test_efficiency_is_that_of_the_table_and_starts_at_the_baseline() -> None:
    file = samples.result(grid(("cp1", "none"), ("cp2", "ring"), ("cp2tp2", "ring"), ("cp4", "ring"), ("tp2", "none"), lengths=(4 * K,)))
    chart = plot.figure(results(file), "efficiency")
    (axes,) = chart.axes
    table = {row.label: row.efficiency for group in group_rows(file.cells, samples.CORES) for row in group.rows}
    drawn = {name: line.get_xydata().tolist() for name, line in zip(names(chart), lines(axes), strict=False)}  # type: ignore[union-attr]
    assert drawn["cpN ring"] == [[1, 1.0], [2, pytest.approx(table["cp2 ring"])], [4, pytest.approx(table["cp4 ring"])]]
    assert drawn["cpNtp2 ring"] == [[1, 1.0], [4, pytest.approx(table["cp2tp2 ring"])]]
    assert names(chart)[:3] == ["cpN ring", "cpNtp2 ring", "tpN"]
    assert "ideal" in texts(axes)


def test_split_adds_up_to_the_marked_pass() -> None:
    chart = plot.figure(results(samples.healthy()), "split")
    (axes,) = chart.axes
    bars = [(bar.get_x(), bar.get_width()) for bar in axes.patches]  # type: ignore[attr-defined]
    assert bars[2:4] == [(0, pytest.approx(0.9 * 4.61)), (pytest.approx(0.9 * 4.61), pytest.approx(0.461))]
    assert texts(axes) == ["0%", "10%", "10%", "10%", "10%", "10%"]


def test_heat_map_marks_the_fastest_of_each_length_and_names_failures() -> None:
    cells = grid(*RING)
    cells[7] = not_measured(samples.make_cell("cp2", "ring", 1024 * K), "oom", "x")
    chart = plot.figure(results(samples.result(cells)), "heatmap")
    assert "<image" not in svg(chart), "a page shows no picture in a figure"
    axes = chart.axes[0]
    shown = {(text.get_position(), text.get_text()): text.get_fontweight() for text in axes.texts}
    assert shown[(2, 1), "oom"] == "normal"
    assert [text for (_, text), weight in shown.items() if weight == "bold"] == ["2.04 s", "2.04 s", "16.3 s", "16.3 s", "8m42"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["4k", "32k", "1M"]


def test_pareto_front_is_that_of_the_advice() -> None:
    file = samples.healthy()
    (axes,) = plot.figure(results(file), "pareto").axes
    rows = [row for group in group_rows(file.cells, samples.CORES) for row in group.rows]
    advice = advise([Candidate(row.label, row.time.median, (0, 0), row.memory_bytes) for row in rows if row.time])
    assert advice and texts(axes) == [one.name for one in sorted(advice.front, key=lambda one: one.memory or 0)]


def test_pareto_leaves_out_what_ran_without_context_parallelism() -> None:
    chart = plot.figure(results(samples.batches()), "pareto")
    assert any(not cell.cp_active for cell in samples.batches().cells)
    drawn = [line for axes in chart.axes for line in axes.lines if len(line.get_xydata()) == 1 and line.get_marker() not in ("|", "None")]  # type: ignore[arg-type]
    assert len({(float(line.get_xydata()[0][0]), float(line.get_xydata()[0][1])) for line in drawn if line.get_marker() in "os^Dv"}) == 5  # type: ignore[index]


def test_forest_has_the_ratios_and_verdicts_of_the_comparison() -> None:
    old, new = samples.result(grid(*RING)), samples.result(grid(*RING))
    new.cells[8] = not_measured(samples.make_cell("cp2", "ulysses", 1024 * K), "oom", "x")
    comparison = cpbench.compare(old, new, names=("a.json", "b.json"))
    chart = plot.figures(results(old, new), ["forest"])["forest"]
    assert chart.get_suptitle() == "b.json against a.json\ngrey: within 2%"
    ratios = [row.ratio for row in comparison.rows if row.metric == "ttft_s" and row.ratio]
    drawn = [line.get_xydata()[0][0] for line in chart.axes[0].lines if line.get_marker() in ("o", "s", "D", "P")]  # type: ignore[index]
    assert drawn == [pytest.approx(ratio) for ratio in ratios] and len(drawn) == 8
    assert "broke" in texts(chart.axes[0]) and "broke" in names(chart)


def test_versus_takes_any_field_or_metric() -> None:
    source = results(samples.result(grid(*RING)))
    chart = plot.versus(source, "world_size", "peak_bytes", by="strategy", facet="seq")
    assert [axes.get_title(loc="left") for axes in chart.axes] == ["4k", "32k", "1M"]
    assert names(chart) == ["none", "ring", "ulysses"]
    scatter = plot.versus(source, "peak_bytes", "ttft_s")
    assert [len(line.get_xydata()) for line in scatter.axes[0].lines if line.get_marker() == "o"] == [3] and not lines(scatter.axes[0])  # type: ignore[arg-type]
    words = plot.versus(source, "strategy", by=["cp"], where="seq==4k")
    assert ticks(words.axes[0]) == ["none", "ring", "ulysses"]


def test_what_is_unlike_gets_lines_or_panels_of_its_own() -> None:
    two = plot.figure(results(samples.result(grid(*RING)), samples.result(grid(*RING))), "time")
    assert names(two) == [f"{name} {file}.json" for file in "ab" for name in ("cp1", "cp2 ring", "cp2 ulysses")]
    batches = plot.figure(results(samples.result(grid(*RING[:1]) + grid(*RING[:1], batch=2))), "time")
    assert [axes.get_title(loc="left") for axes in batches.axes] == ["b1", "b2"] and names(batches) == ["cp1"]
    together = plot.versus(results(samples.result(grid(*RING[:1]) + grid(*RING[:1], batch=2))), facet="model")
    assert names(together) == ["cp1 b1", "cp1 b2"]
    dtypes = plot.figure(results(samples.result(grid(*RING) + grid(*RING, dtype="bfloat16"))), "time")
    assert [axes.get_title(loc="left") for axes in dtypes.axes] == ["float32", "bfloat16"]


def test_twelve_layouts_are_told_apart() -> None:
    layouts = [(f"cp{cp}", strategy) for strategy in ("allgather", "ring", "ulysses") for cp in (2, 4, 8)]
    tensor = [(f"tp{tp}{sp}", "none") for tp in (2, 4, 8) for sp in ("", "sp")] + [(f"cp2tp{tp}", "ring") for tp in (2, 4)]
    for some in (layouts, tensor, [*layouts, *tensor]):
        file = samples.result([samples.measured(samples.make_cell(*one), [1.0]) for one in some])
        looks = styles({entry.label: entry for entry in read_entries(results(file))})
        assert len(set(looks.values())) == len(some)
    by_strategy = styles(
        {entry.label: entry for entry in read_entries(results(samples.result([samples.measured(samples.make_cell(*one), [1.0]) for one in layouts])))}
    )
    assert len({look.colour for look in by_strategy.values()}) == 3


def test_panels_and_series_beyond_what_is_readable_are_counted() -> None:
    chart = plot.figure(results(samples.result(grid(*RING, lengths=tuple(K << n for n in range(2, 10))))), "pareto")
    assert len(chart.axes) == 6 and chart.get_suptitle().endswith("; 6 of 8 panels")


@pytest.mark.parametrize(("values", "expected"), [((4096, 36864), ["4k", "36k"]), ((32768, 36864, 1048576), ["32k", "1M"]), ((9000, 1000), ["1000", "9000"])])
def test_ticks_of_lengths(values: tuple[int, ...], expected: list[str]) -> None:
    axes = Chart().subplots()
    lay_out_x(axes, Scale("seq", "tokens", "count"), values, [])
    assert [label for label in ticks(axes) if label] == expected


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("bytes", [3 << 30, 9 << 30], ["0", "2 GiB", "4 GiB", "6 GiB", "8 GiB"]),
        ("bytes", [1 << 30, 64 << 30], ["1 GiB", "2 GiB", "4 GiB", "8 GiB", "16 GiB", "32 GiB", "64 GiB"]),
        ("seconds", [0.02, 30.0], ["100 ms", "1 s", "10 s"]),
        ("seconds", [0.02, 300.0], ["100 ms", "1 s", "10 s", "100 s"]),
    ],
)
def test_ticks_of_values(kind: Any, values: list[float], expected: list[str]) -> None:
    axes = Chart().subplots()
    lay_out_y(axes, Scale("x", "x", kind), values, 0.0)
    axes.figure.draw_without_rendering()
    low, high = axes.get_ylim()
    shown = [label.get_text() for label in axes.get_yticklabels() if low <= label.get_position()[1] <= high]
    assert [one for one in shown if one] == expected or set(expected) <= set(shown)


def test_the_same_data_gives_the_same_bytes(tmp_path: Path) -> None:
    pages = [svg(plot.figure(results(samples.troubled()), name)) for name in ("time", "split") for _ in range(2)]
    assert pages[0] == pages[1] and pages[2] == pages[3] and "<dc:date>" not in pages[0]
    write(plot.figure(results(samples.healthy()), "time"), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_texts_of_a_file_stay_texts() -> None:
    file = samples.result(grid(*RING))
    for cell in file.cells:
        cell.key["model"] = "$\\frac{$</text><script>alert(1)</script>\x00\x1b[31m"
        cell.key["strategy"] = "$\\undefined$ \N{CJK UNIFIED IDEOGRAPH-4E2D}" + "x" * 500
    page = svg(plot.figure(results(file), "time"))
    assert "<script" not in page and "\x1b" not in page and "\x00" not in page
    assert "$\\frac{$&lt;/text&gt;" in page and "x" * 100 not in page


def test_the_readers_settings_are_neither_used_nor_changed() -> None:
    with mpl.rc_context({"font.size": 40.0, "axes.grid": False}):
        before = dict(mpl.rcParams)
        loud = svg(plot.figure(results(samples.healthy()), "time"))
        assert dict(mpl.rcParams) == before
    assert loud == svg(plot.figure(results(samples.healthy()), "time"))


def test_a_notebook_shows_the_figure() -> None:
    assert plot.figure(results(samples.healthy()), "time")._repr_html_().startswith("<svg")


def test_a_filter_changes_no_number() -> None:
    source = results(samples.healthy())
    some = read_entries(source, parse_where("layout==cp4"))
    everything = {str(entry.fields["cell"]): entry for entry in read_entries(source)}
    assert [entry.label for entry in some] == ["cp4 ring"] and isinstance(some[0], Entry)
    assert some[0].metrics["efficiency"] == everything[str(some[0].fields["cell"])].metrics["efficiency"]


def test_only_what_can_be_filled_is_drawn() -> None:
    assert list(plot.figures(results(samples.healthy()))) == ["time", "throughput", "memory", "efficiency", "split", "pareto"]
    one = samples.result([samples.measured(samples.make_cell("cp1", "none"), [4.5])])
    assert list(plot.figures(results(one))) == ["time", "throughput", "memory"]


@pytest.mark.parametrize(
    ("call", "message", "code"),
    [
        (lambda source: plot.figures(source, ["heatmp"]), "Unknown figure 'heatmp'", 2),
        (lambda source: plot.figures(source, ["heatmap"]), "The figure heatmap needs times of two layouts and two lengths", 3),
        (lambda source: plot.versus(source, "sequence"), "Unknown field or metric 'sequence'", 2),
        (lambda source: plot.versus(source, y="seq"), "Unknown metric 'seq'", 2),
        (lambda source: plot.versus(source, by="strateg"), "Unknown field 'strateg'", 2),
        (lambda source: plot.figures(source, where="layout==cp16"), "keeps no cell", 3),
        (lambda source: plot.figures(results(samples.result([]))), "a.json has neither a time nor a memory peak", 3),
    ],
)
def test_errors(call: Any, message: str, code: int) -> None:
    with pytest.raises(CpbenchError) as caught:
        call(results(samples.healthy()))
    assert message in caught.value.message and caught.value.exit_code == code


def test_nothing_but_failures_is_nothing_to_plot() -> None:
    failed = samples.result([not_measured(samples.make_cell("cp2", "ring"), "oom", "x")])
    with pytest.raises(CpbenchError) as caught:
        plot.figures(results(failed))
    assert caught.value.exit_code == 3
    with pytest.raises(CpbenchError):
        plot.versus(results(failed))
