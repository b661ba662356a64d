"""`cpbench plot`: which files it writes and names, and what it says of flags and files that it cannot use."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpbench.results import ResultFile

from . import samples
from .conftest import Cpbench, Golden


def write(result: ResultFile, name: str) -> None:
    Path(name).write_text(result.model_dump_json(by_alias=True))


def test_the_default_set_is_written_beside_the_file(cpbench_command: Cpbench) -> None:
    Path("runs").mkdir()
    write(samples.troubled(), "runs/r.json")
    ran = cpbench_command("plot", "runs/r.json")
    written = [f"runs/r-{name}.svg" for name in ("time", "throughput", "memory", "efficiency", "split", "heatmap", "pareto")]
    assert (ran.code, ran.out.split()) == (0, written)
    assert ran.err == ""
    assert all(Path(name).read_text().startswith("<?xml") for name in written)


def test_what_cannot_be_filled_is_said_once_and_not_with_quiet(cpbench_command: Cpbench) -> None:
    write(samples.healthy(), "a.json")
    assert cpbench_command("plot", "a.json").err == "Not drawn: heatmap (needs times of two layouts and two lengths).\n"
    assert cpbench_command("plot", "a.json", "-q").err == ""


def test_formats_folder_and_figures_are_as_asked(cpbench_command: Cpbench) -> None:
    write(samples.healthy(), "a.json")
    ran = cpbench_command("plot", "a.json", "--figure", "memory,time", "--format", "png,svg", "-o", "deep/er")
    assert (ran.code, ran.err) == (0, "")
    assert sorted(ran.out.split()) == sorted(f"deep/er/a-{name}.{kind}" for name in ("memory", "time") for kind in ("png", "svg"))
    assert Path("deep/er/a-time.png").read_bytes().startswith(b"\x89PNG")


def test_two_files_have_a_forest_plot_and_the_same_bytes_again(cpbench_command: Cpbench) -> None:
    write(samples.healthy(), "old.json")
    write(samples.healthy(), "new.json")
    ran = cpbench_command("plot", "old.json", "new.json", "--figure", "forest", "-q")
    assert (ran.code, ran.out, ran.err) == (0, "old-forest.svg\n", "")
    before = Path("old-forest.svg").read_bytes()
    cpbench_command("plot", "old.json", "new.json", "--figure", "forest")
    assert Path("old-forest.svg").read_bytes() == before and b"new.json against old.json" in before


def test_one_figure_of_fields(cpbench_command: Cpbench) -> None:
    write(samples.healthy(), "a.json")
    ran = cpbench_command("plot", "a.json", "--x", "cp", "--y", "peak_bytes", "--by", "strategy", "--where", "strategy==ring or cp==1")
    assert (ran.code, ran.out, ran.err) == (0, "a-peak_bytes-cp.svg\n", "")
    page = Path("a-peak_bytes-cp.svg").read_text()
    assert "ring" in page and "ulysses" not in page


def test_help(cpbench_command: Cpbench, golden: Golden) -> None:
    golden("help_plot", cpbench_command("plot", "--help").out)


BAD = {
    "unknown figure": "a.json --figure heatmp",
    "figure that cannot be filled": "a.json --figure time,heatmap",
    "no figure": "a.json --figure ,",
    "unknown format": "a.json --format pdf",
    "unknown x": "a.json --x sequence",
    "unknown y": "a.json --y ttft",
    "unknown facet": "a.json --facet modl",
    "figures and fields": "a.json --figure time --x cp",
    "filter that does not parse": "a.json --where seq>=",
    "filter of an unknown field": "a.json --where sequence>1",
    "filter that leaves nothing": "a.json --where cp==16",
    "no file": "nowhere.json",
    "nothing in it": "empty.json",
    "cut": "cut.json",
    "folder that is a file": "a.json -o cut.json",
}


def test_errors(cpbench_command: Cpbench, golden: Golden) -> None:
    write(samples.healthy(), "a.json")
    write(samples.result([]), "empty.json")
    Path("cut.json").write_text('{"schema": "cpbench.result"')
    said = []
    for name, arguments in BAD.items():
        ran = cpbench_command("plot", *arguments.split())
        said.append(f"# {name}\n$ cpbench plot {arguments}\n{ran.out}{ran.err}exit {ran.code}\n")
    golden("errors_plot", "\n".join(said))
    assert not list(Path().rglob("*.svg"))


@pytest.mark.parametrize("value", [1e308, 5e-324, 0.0, -1.0])
def test_absurd_values_are_no_traceback(value: float, cpbench_command: Cpbench) -> None:
    result = samples.troubled()
    for cell in result.cells:
        for metric in cell.metrics.values():
            metric.median, metric.ci95 = value, (value, value)
        cell.world_size, cell.key["lengths"] = 10**9, [2**53]
        if cell.memory:
            cell.memory.peak_live_bytes = 2**53
    result.cells[0].metrics["ttft_s"].median = 1e-300  # a ratio to it is infinite
    write(result, "absurd.json")
    assert cpbench_command("plot", "absurd.json").code in (0, 3)
