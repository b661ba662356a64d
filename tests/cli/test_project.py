"""`cpbench project`: held against stored outputs, files that are read again, and what it refuses."""

import json
import re
from pathlib import Path

import pytest

import cpbench
from cpbench.environment import detect_machine
from cpbench.errors import UNREADABLE, USAGE
from cpbench.plot.entries import read_entries
from cpbench.records import not_measured
from cpbench.results import ResultFile

from .samples import make_cell, measured, result
from .test_report import outline

MODEL = ["--model", "qwen3-8b", "--seq", "32k"]
CASES = {
    "cells": [*MODEL, "--cp", "4", "--tp", "2", "--strategy", "ring,ulysses"],
    "top": [*MODEL, "--layouts", "tp4sp,cp2tp2,cp4", "--strategy", "ring", "--top", "2"],
    "gpus": [*MODEL, "--gpus", "4", "--strategy", "ring", "--dry-run"],
    "all_devices": [*MODEL, "--nodes", "1", "--gpus-per-node", "2", "--strategy", "ring", "--dry-run"],
    "nodes": [*MODEL, "--layouts", "cp16,cp2tp8", "--strategy", "allgather", "--nodes", "2", "--link", "200G", "--hardware", "h100"],
    "too_large": ["--model", "qwen3-32b", "--seq", "256k", "--layouts", "cp2,cp2tp2", "--strategy", "ring", "--hardware", "a100"],
    "chunks": [*MODEL, "--layouts", "pp2cp2", "--strategy", "ring", "--chunk", "8k"],
    "explain": [*MODEL, "--layouts", "cp2tp2", "--strategy", "ring", "--explain"],
    "dry_run": [*MODEL, "--cp", "2", "--tp", "2", "--strategy", "ring", "--dry-run"],
}


@pytest.mark.parametrize("name", CASES)
def test_projections(cpbench_command, golden, name):
    ran = cpbench_command("project", *CASES[name], "-q", "-o", "here.json")
    assert ran.code == 0, ran.err
    golden(f"project_{name}", ran.out)


def test_help(cpbench_command, golden):
    golden("help_project", cpbench_command("project", "--help").out)


def test_what_is_done_is_said_while_it_is_done(cpbench_command):
    ran = cpbench_command("project", *MODEL, "--layouts", "cp2", "--strategy", "ring", "-o", "here.json")
    assert ran.code == 0
    assert "prefill of qwen3-8b on NVIDIA H200 SXM 141 GB" in ran.err
    assert "layers 36 (default: all)" in ran.err
    assert "1/1 cp2 ring: projected " in ran.err


def test_a_file_of_projections_is_shown_as_it_was_printed(cpbench_command):
    ran = cpbench_command("project", *MODEL, "--layouts", "cp2,tp2", "--strategy", "ring", "-q", "-o", "here.json")
    shown = cpbench_command("show", "here.json")
    assert ran.out == f"{shown.out}Result: here.json\n"


def test_json_is_the_result(cpbench_command):
    ran = cpbench_command("project", *MODEL, "--layouts", "cp2", "--strategy", "ring", "--json", "-q", "-o", "here.json")
    found = ResultFile.model_validate_json(ran.out)
    assert found.run.kind == "projection"
    cell = found.cells[0]
    assert cell.projection is not None and cell.projection.hardware == "h200"
    assert all(name.startswith("projected_") for name in cell.metrics)
    assert json.loads(ran.out) == json.loads(Path("here.json").read_text())


def test_an_explained_layer_is_drawn_beside_the_result_and_is_data(cpbench_command, tmp_path):
    ran = cpbench_command("project", *MODEL, "--layouts", "cp4", "--strategy", "ring", "--explain", "--json", "-o", "here.json")
    assert ran.code == 0, ran.err
    assert "<svg" in (tmp_path / "here-timeline.svg").read_text()
    assert "Figure: here-timeline.svg" in ran.err
    found = json.loads(ran.out)["explained"]
    assert (found["layer"], found["layers"]) == (0, 36)
    assert {one["rank"] for one in found["stretches"]} == {int(rank) for rank in found["alike"]}
    assert {one["lane"] for one in found["stretches"]} == {"compute", "cp"}
    assert "layer/attention/kernel" in {one["name"] for one in found["stretches"]}
    assert found["ranks"][0]["ends_s"] > found["ranks"][0]["exposed_s"] == 0


def swept(tmp_path):
    """A sweep of one layer in which two cells had no ranks."""
    options = {"config": make_cell("cp1", "none").config}
    cells = [
        measured(make_cell("cp2", "ring", **options), [4.5, 4.6]),
        not_measured(make_cell("cp4", "ring", **options), "skipped", "needs 4 ranks"),
        not_measured(make_cell("cp8", "ulysses", **options), "skipped", "needs 8 ranks"),
    ]
    found = result(cells)
    found = found.model_copy(update={"run": found.run.model_copy(update={"scenario": {"model": "qwen3-tiny", "seq": [36864], "cp": [2, 4, 8]}})})
    (tmp_path / "swept.json").write_text(found.model_dump_json(by_alias=True))


def test_skipped_cells_of_a_sweep_are_projected(cpbench_command, golden, tmp_path):
    swept(tmp_path)
    ran = cpbench_command("project", "swept.json", "--hardware", "cpu", "--gpus-per-node", "8", "-o", "here.json")
    assert ran.code == 0, ran.err
    assert "2 cells that swept.json skipped" in ran.err
    golden("project_skipped", ran.out)


def test_skipped_cells_that_were_edited_are_refused(cpbench_command, tmp_path):
    swept(tmp_path)
    data = json.loads((tmp_path / "swept.json").read_text())
    data["cells"][1]["key"]["layout"] = 7
    (tmp_path / "edited.json").write_text(json.dumps(data))
    ran = cpbench_command("project", "edited.json")
    assert ran.code == UNREADABLE
    assert "edited.json does not say what its skipped cells are." in ran.err


def incomplete(tmp_path):
    (tmp_path / "mine.json").write_text('{"schema": "cpbench.device", "schema_version": 1, "name": "mine"}')


ERRORS = {
    "unknown device": (["--hardware", "h201"], USAGE, "'h201'", "h200"),
    "too many ranks": (["--layouts", "cp32", "--strategy", "ring", "--nodes", "2"], USAGE, "cp32 has 32 ranks, and there are 16 devices.", "--nodes 4"),
    "missing constants": (["--hardware", "mine.json"], UNREADABLE, "The device profile mine.json lacks", "calibrate"),
    "no such profile": (["--hardware", "none.json"], UNREADABLE, "none.json cannot be read", "calibrate"),
    "nothing to measure with": (["--compute", "measured", "--hardware", "h200"], USAGE, "Compute of h200 cannot be measured here", "Leave --compute out"),
    "no such compute": (["--compute", "measure"], USAGE, "'measure'", "measured"),
    "nothing shown": (["--top", "0"], USAGE, "--top 0 shows nothing.", "--top 10"),
    "a file and flags": (["swept.json", "--seq", "8k"], USAGE, "swept.json says what is projected, and so do flags.", "Leave the flags out"),
    "a file without skipped cells": (["done.json"], USAGE, "done.json has no cell that was skipped.", "Describe what to project"),
    "no link": (["--link", "500X"], USAGE, "'500X' is not a link.", "400G"),
    "no nodes": (["--nodes", "0"], USAGE, "--nodes 0 is no number from 1 to 65,536.", "--nodes 2"),
    "no devices": (["--gpus-per-node", "many"], USAGE, "--gpus-per-node many is no number", "--gpus-per-node 8"),
    "several to explain": (["--cp", "2,4", "--strategy", "ring", "--explain"], USAGE, "--explain is of one cell, and this describes 2", "--cp 2"),
    "a file to explain": (["swept.json", "--explain"], USAGE, "--explain is of one cell that flags describe", "Leave the file out"),
    "no layer to explain": (["--cp", "2", "--strategy", "ring", "--target", "attention", "--explain"], USAGE, "--explain shows a layer", "--target layer"),
    "measured and explained": (
        ["--cp", "2", "--strategy", "ring", "--explain", "--compute", "measured", "--hardware", "cpu"],
        USAGE,
        "--explain names the parts of a layer",
        "Leave --compute out",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_mistakes_are_one_sentence_and_a_hint(cpbench_command, tmp_path, name):
    arguments, code, message, hint = ERRORS[name]
    swept(tmp_path)
    incomplete(tmp_path)
    (tmp_path / "done.json").write_text(result([measured(make_cell("cp1", "none"), [4.5])]).model_dump_json(by_alias=True))
    ran = cpbench_command("project", *arguments)
    assert ran.code == code, ran.err
    error, said = ran.err.strip().split("\nhint:  ")
    assert error.startswith("error: ") and message in " ".join(error.split())
    assert hint in " ".join(said.split())
    assert not (tmp_path / "results").exists()


def test_a_cell_that_a_profile_cannot_price_costs_itself_only(cpbench_command):
    """Nothing is known of the links between two-core machines, and so nothing of four ranks."""
    ran = cpbench_command("project", "--seq", "2k", "--layouts", "cp2,cp4", "--strategy", "ring", "--hardware", "cpu", "-q", "-o", "here.json")
    assert ran.code == 0, ran.err
    cells = ResultFile.model_validate_json(Path("here.json").read_text()).cells
    assert [cell.status for cell in cells] == ["ok", "unsupported"]
    assert "between nodes" in " ".join(ran.out.split())


def test_work_that_is_measured_here_by_two_real_processes(cpbench_command, machine):
    """Four ranks, of which this machine plays two at a time."""
    machine(detect_machine())
    asked = ["--model", "qwen3-tiny", "--seq", "512", "--layouts", "cp4", "--strategy", "ring", "--layers", "2", "--dtype", "float32"]
    ran = cpbench_command("project", *asked, "--compute", "measured", "--hardware", "cpu", "--gpus-per-node", "8", "-q", "-o", "here.json")
    assert ran.code == 0, ran.err
    (cell,) = ResultFile.model_validate_json(Path("here.json").read_text()).cells
    assert cell.projection is not None and cell.projection.compute.startswith("measured on ")
    assert 0 < cell.metrics["projected_compute_s"].median <= cell.metrics["projected_ttft_s"].median < 60
    assert "Projected: compute measured on" in ran.out


SAMPLE = Path(__file__).parents[2] / "results" / "samples" / "project_h200.json"
MEASURED = SAMPLE.with_name("cpu_36k.json")


def test_figures_of_projections_are_drawn_with_open_markers_and_the_memory_of_their_devices(tmp_path):
    results = cpbench.load(str(SAMPLE))
    charts = cpbench.plot.figures(results)
    assert {"time", "throughput", "memory", "split", "pareto"} <= set(charts)
    for name in ("time", "memory", "pareto"):
        markers = [line for axes in charts[name].axes for line in axes.get_lines() if line.get_marker() not in ("", "None", None)]
        assert markers and {line.get_markerfacecolor() for line in markers} == {"white"}
        assert "projected, not measured" in [text.get_text() for legend in charts[name].legends for text in legend.get_texts()]
    assert {entry.capacity for entry in read_entries(results)} == {141_000_000_000}
    bars = [patch for patch in charts["split"].axes[0].patches if patch.get_width() > 0]
    assert {bar.get_alpha() for bar in bars} == {0.6}
    assert charts["split"].axes[0].get_xlabel() == "projected time"
    assert charts["pareto"].axes[0].get_ylabel() == "projected TTFT"


def test_frames_say_that_values_are_projected():
    frame = cpbench.load(str(SAMPLE)).to_frame()
    assert set(frame["value_kind"]) == {"projected"}
    assert set(frame["metric"]) >= {"projected_ttft_s", "projected_exposed_comm_s", "projected_peak_live_bytes", "projected_light_fraction"}


def test_projections_are_compared_with_each_other_and_with_measured_values_on_request_only(cpbench_command, tmp_path):
    ran = cpbench_command("compare", str(SAMPLE), str(SAMPLE))
    assert ran.code == 0
    assert "p: projected, not measured" in ran.out and "11 same" in ran.out
    measured_file = ResultFile.model_validate_json(MEASURED.read_text())
    projected = cpbench.project("cpu", gpus_per_node=8, model="qwen3-tiny", seq="36k", cp="2", strategies="ring", layers=1, baseline=False)
    (tmp_path / "p.json").write_text(projected[0].model_dump_json(by_alias=True))
    assert measured_file.cell(projected[0].cells[0].id) is not None
    plain = cpbench_command("compare", str(MEASURED), "p.json", "--metric", "time")
    assert "slower" not in plain.out and "faster" not in plain.out
    across = cpbench_command("compare", str(MEASURED), "p.json", "--metric", "time", "--across", "kind,kernel")
    assert re.search(r"^1 (slower|faster|same), 9 only in", across.out, re.MULTILINE) and " p" in across.out


def test_the_page_has_projections_in_columns_of_their_own_and_what_they_rest_on(cpbench_command, golden, tmp_path):
    ran = cpbench_command("report", str(SAMPLE), "-o", "page.html")
    assert ran.code == 0, ran.err
    golden("report_projection", outline(tmp_path / "page.html"))


def test_from_python_what_is_wrong_is_said_as_on_the_command_line():
    with pytest.raises(cpbench.CpbenchError, match="'h201'"):
        cpbench.project("h201", seq="8k", cp="2")
    with pytest.raises(cpbench.CpbenchError, match="is not a link"):
        cpbench.project("h200", link="fast", seq="8k", cp="2")
