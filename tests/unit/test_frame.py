"""The tidy frame and the files behind it: names, columns and values, and cells that a filter leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

import cpbench
from cpbench.errors import NOTHING_COMPARABLE, UNREADABLE, CpbenchError
from cpbench.frame import CELL_COLUMNS, METRIC_COLUMNS, Results, load, short_names, value_kind
from cpbench.results import Metric, ResultFile
from tests.cli import samples

ROOT = Path(__file__).parents[2]


def results(*files: ResultFile) -> Results:
    return Results(files, tuple(f"{number}.json" for number in range(len(files))))


def only(frame: pd.DataFrame, **values: object) -> pd.Series:  # type: ignore[type-arg]
    for name, value in values.items():
        frame = frame[frame[name] == value]
    assert len(frame) == 1
    return frame.iloc[0]


def test_one_row_per_cell_and_metric() -> None:
    file = samples.troubled()
    frame = results(file).to_frame()
    assert list(frame.columns) == [*CELL_COLUMNS, *METRIC_COLUMNS]
    assert not frame.duplicated(["file", "cell", "metric"]).any()
    assert list(frame.cell.unique()) == [cell.id for cell in file.cells]
    nothing = frame[frame.metric.isna()]
    assert set(nothing.status) == {"unsupported", "crash", "wrong", "oom", "skipped", "interrupted"}
    assert nothing[["median", "n", "rounds", "unit"]].isna().all(axis=None)


def test_values_are_those_of_the_file() -> None:
    file = samples.healthy()
    frame = results(file).to_frame()
    row = only(frame, layout="cp4", strategy="ring", metric="ttft_s")
    metric = file.cells[4].metrics["ttft_s"]
    assert (row["median"], row.ci_low, row.ci_high) == (metric.median, *(metric.ci95 or ()))
    assert (row.n, row.rounds, row.unit, row.better, row.value_kind) == (5, 1, "s", "lower", "measured")
    assert (row.cp, row.tp, row.world_size, row.sp, row.seq, row.batch, row.prefix, row.lengths) == (4, 1, 4, False, 36864, 1, 0, "36864")
    assert (row.model, row.kernel, row.partition, row.oversubscribed, row.options) == ("qwen3-tiny", "cpu_flash", "zigzag", True, "")


def test_memory_traffic_and_numerics_are_metrics_known_once() -> None:
    file = samples.healthy()
    frame = results(file).to_frame()
    known = [("peak_live_bytes", 93 << 20, "B"), ("numerics_ratio", 1.02, "1"), ("comm_bytes", file.cells[4].traffic["bytes"], "B")]
    for metric, value, unit in known:
        row = only(frame, layout="cp4", metric=metric)
        assert (row["median"], row.unit, row.n, row.rounds) == (value, unit, 1, 1)
        assert pd.isna(row.ci_low) and pd.isna(row.ci_high)


def test_batches_options_and_labels() -> None:
    frame = results(samples.batches()).to_frame()
    row = only(frame, strategy="allgather/2", metric="ttft_s")
    assert (row.seq, row.batch, row.lengths, row.prefix, row.options) == (36864, 3, "1003,517,36864", 32768, "chunk=8192 head_groups=2")
    assert only(frame, layout="cp8u4", metric="ttft_s").ulysses == 4


def test_layout_and_strategy_are_ordered_as_they_appear() -> None:
    frame = results(samples.on_gpus(), samples.healthy()).to_frame()
    assert list(frame.layout.cat.categories) == ["tp2", "cp2tp2", "cp4tp2", "cp1", "cp2", "cp4", "cp8"]
    assert list(frame.strategy.cat.categories) == ["none", "ring", "allgather", "ulysses"]
    assert frame.layout.cat.ordered and frame.strategy.cat.ordered
    assert list(frame.file.unique()) == ["0.json", "1.json"]


def test_a_layout_of_a_newer_cpbench_has_no_sizes() -> None:
    file = samples.result([samples.measured(samples.make_cell("cp1", "none"), [1.0])])
    file.cells[0].key["layout"] = "zz4"
    row = only(results(file).to_frame(), metric="ttft_s")
    assert row.layout == "zz4" and pd.isna(row.cp) and pd.isna(row.tp)


def test_no_cells_make_an_empty_frame() -> None:
    frame = results(samples.result([])).to_frame()
    assert frame.empty and list(frame.columns) == [*CELL_COLUMNS, *METRIC_COLUMNS]


def test_values_that_were_not_measured_are_marked_by_their_names() -> None:
    assert [value_kind(name) for name in ("ttft_s", "derived_ttft_s", "projected_ttft_s")] == ["measured", "derived", "projected"]
    file = samples.healthy()
    file.cells[0].metrics["projected_ttft_s"] = Metric(unit="s", rounds=[[1.0]], median=1.0, n=1)
    assert only(results(file).to_frame(), metric="projected_ttft_s").value_kind == "projected"


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ("strategy==ring", ["cp2", "cp4", "cp8"]),
        ("ttft_s<4.55 or cp==8", ["cp1", "cp2", "cp8"]),
        ("oversubscribed==true", ["cp4", "cp8"]),
        ("file==0.json and world_size>=8", ["cp8"]),
    ],
)
def test_where_keeps_cells(where: str, kept: list[str]) -> None:
    everything = results(samples.healthy())
    assert [cell.key["layout"] for cell in everything.where(where)[0].cells] == kept
    assert len(everything[0].cells) == 6


def test_a_filter_that_keeps_nothing_says_what_there_is() -> None:
    with pytest.raises(CpbenchError, match=r"keeps no cell of 0\.json") as caught:
        results(samples.healthy()).where("strategy==rng")
    assert (caught.value.exit_code, caught.value.hint) == (NOTHING_COMPARABLE, "strategy is none, allgather, ring, ulysses.")


def test_results_are_the_list_that_they_were(tmp_path: Path) -> None:
    for name in "ba":
        (tmp_path / f"{name}.json").write_text(samples.healthy().model_dump_json(by_alias=True))
    found = cpbench.load(tmp_path / "*.json")
    assert found.names == ("a.json", "b.json")
    assert [file.run.name for file in found] == ["sweep", "sweep"]
    assert isinstance(found[1:], Results) and found[1:].names == ("b.json",)
    assert found[0] == samples.healthy()
    assert repr(found) == "Results(a.json: 6 cells, b.json: 6 cells)"


def test_a_pattern_leaves_out_what_is_no_result_and_a_path_does_not(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text("{}")
    with pytest.raises(CpbenchError, match="is not a cpbench result"):
        load(tmp_path / "*.json")
    (tmp_path / "r.json").write_text(samples.healthy().model_dump_json(by_alias=True))
    assert load(str(tmp_path / "*.json")).names == ("r.json",)
    with pytest.raises(CpbenchError, match=r"schema\.json is not a cpbench result"):
        load([tmp_path / "schema.json"])
    (tmp_path / "cut.json").write_text('{"schema": "cpbench.result"')
    with pytest.raises(CpbenchError, match=r"cut\.json is not a complete"):
        load(tmp_path / "*.json")
    with pytest.raises(CpbenchError, match="does not exist") as caught:
        load(tmp_path / "nothing*.json")
    assert caught.value.exit_code == UNREADABLE


def test_files_that_are_called_alike_are_told_apart() -> None:
    assert short_names(["x/a.json", "y/a.json", "y/b.json"]) == ("x/a.json", "y/a.json", "b.json")
    assert short_names(["a.json", "y/a.json"]) == ("a.json", "y/a.json")


@pytest.mark.parametrize(
    "change",
    [
        {"lengths": "36k"},
        {"lengths": [-1]},
        {"lengths": [1.5]},
        {"lengths": [True]},
        {"lengths": [2**53 + 1]},
        {"prefixes": {"0": 1}},
        {"options": ["chunk"]},
    ],
)
def test_a_hostile_key_is_refused_when_it_is_read(change: dict[str, object], tmp_path: Path) -> None:
    data = json.loads(samples.healthy().model_dump_json(by_alias=True))
    data["cells"][0]["key"] |= change
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(CpbenchError, match=r"breaks the result schema at cells\.0\.key") as caught:
        load(tmp_path / "r.json")
    assert caught.value.exit_code == UNREADABLE


def test_counts_that_no_column_holds_are_not_known() -> None:
    file = samples.healthy()
    file.cells[0].world_size = file.cells[0].metrics["ttft_s"].n = 10**29
    row = only(results(file).to_frame(), layout="cp1", metric="ttft_s")
    assert pd.isna(row.n) and pd.isna(row.world_size)


def test_the_html_of_results_escapes_and_is_cut() -> None:
    file = samples.troubled()
    file.cells[2].reason = "<script>alert(1)</script>"
    file.cells[0].warnings.append("<img src=x onerror=alert(1)>")
    many = samples.result([samples.measured(samples.make_cell("cp1", "none", 1024 + number), [1.0]) for number in range(203)])
    html = Results((file, many), ("<b>.json", "many.json"))._repr_html_()
    assert "<script" not in html and "<img" not in html and "<b>" not in html
    assert "&lt;script&gt;" in html and "cp2" in html
    assert "3 more rows" in html
    assert Results((), ())._repr_html_() == "<p>No results.</p>"


def test_importing_cpbench_imports_nothing_heavy() -> None:
    code = "import sys, cpbench; sys.stdout.write(' '.join(sys.modules)); assert set(cpbench.__all__) <= set(dir(cpbench))"
    modules = set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, timeout=60).stdout.split())
    assert not {"torch", "pandas", "matplotlib", "scipy", "numpy", "pydantic", "rich"} & modules
    assert cpbench.plot.figures(cpbench.load(ROOT / "results" / "samples" / "cpu_36k.json"), ["memory"]).keys() == {"memory"}
    with pytest.raises(AttributeError):
        _ = cpbench.nothing


def test_the_folder_of_results_loads_whole() -> None:
    assert "cpu_36k.json" in load(ROOT / "results" / "**" / "*.json").names
