"""`show` and `upgrade`: filters, formats and files, held against stored outputs, and what goes wrong in one sentence."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import pandas as pd
import pytest

from cpbench.frame import CELL_COLUMNS, METRIC_COLUMNS, load
from cpbench.reading import MAX_FILE_BYTES
from cpbench.results import ResultFile

from . import samples
from .conftest import Cpbench, Golden


def write(result: ResultFile, name: str) -> str:
    Path(name).write_text(result.model_dump_json(by_alias=True))
    return name


@pytest.fixture
def files(cpbench_command: Cpbench) -> list[str]:
    """Two results in the folder in which commands run."""
    return [write(samples.healthy(), "healthy.json"), write(samples.troubled(), "troubled.json")]


def test_filters(files: list[str], cpbench_command: Cpbench, golden: Golden) -> None:
    said = []
    for where in ("strategy==ring and seq==36k", "status==ok and ttft_s<60", "layout in (cp4, cp8) and not strategy==allgather"):
        ran = cpbench_command("show", *files, "--where", where)
        assert (ran.code, ran.err) == (0, "")
        said.append(f"$ cpbench show {' '.join(files)} --where '{where}'\n{ran.out}")
    golden("show_where", "\n".join(said))


def test_markdown(files: list[str], cpbench_command: Cpbench, golden: Golden) -> None:
    ran = cpbench_command("show", *files, "--format", "md", "--where", "cp>1")
    assert (ran.code, ran.err) == (0, "")
    golden("show_markdown", ran.out)


def test_text_from_a_file_is_no_markdown(cpbench_command: Cpbench) -> None:
    result = samples.troubled()
    result.cells[2].reason = "a | b [x](http://example.com) <img src=x> `code`\n# heading\x1b[31m"
    out = cpbench_command("show", write(result, "r.json"), "--format", "md").out
    line = next(line for line in out.splitlines() if "example" in line)
    assert r"a \| b \[x\](http://example.com) \<img src=x\> \`code\`" in line and r"\# heading" in line
    assert "\x1b" not in out


def test_csv(files: list[str], cpbench_command: Cpbench, golden: Golden) -> None:
    ran = cpbench_command("show", "healthy.json", "--format", "csv", "--where", "layout==cp4")
    assert (ran.code, ran.err) == (0, "")
    golden("show_csv", ran.out)
    everything = list(csv.DictReader(io.StringIO(cpbench_command("show", *files, "--format", "csv").out)))
    assert list(everything[0]) == [*CELL_COLUMNS, *METRIC_COLUMNS]
    assert len(everything) == len(load(files).to_frame())


def test_csv_computes_nothing_in_a_spreadsheet(cpbench_command: Cpbench) -> None:
    result = samples.troubled()
    result.cells[2].reason = '=HYPERLINK("http://example.com")\x1b\nnext'
    result.cells[2].key["model"] = "@SUM(A1)"
    rows = list(csv.DictReader(io.StringIO(cpbench_command("show", write(result, "r.json"), "--format", "csv").out)))
    row = next(row for row in rows if row["status"] == "crash")
    assert row["reason"] == '\'=HYPERLINK("http://example.com")��next'
    assert row["model"] == "'@SUM(A1)"


def test_json_holds_what_is_kept(files: list[str], cpbench_command: Cpbench) -> None:
    one = ResultFile.model_validate(json.loads(cpbench_command("show", "--json", files[0], "--where", "strategy==ring").out))
    assert [cell.key["layout"] for cell in one.cells] == ["cp2", "cp4", "cp8"]
    both = json.loads(cpbench_command("show", *files, "--format", "json").out)
    assert [ResultFile.model_validate(file) for file in both] == [samples.healthy(), samples.troubled()]


def test_parquet_reads_back(files: list[str], cpbench_command: Cpbench) -> None:
    ran = cpbench_command("show", *files, "-o", "r.parquet")
    assert (ran.code, ran.out, ran.err) == (0, "", "Written: r.parquet\n")
    frame, expected = pd.read_parquet("r.parquet"), load(files).to_frame()
    assert list(frame.columns) == list(expected.columns)
    assert list(frame["median"].dropna()) == list(expected["median"].dropna())
    assert list(frame.layout.cat.categories) == list(expected.layout.cat.categories)


def test_parquet_without_pyarrow(files: list[str], cpbench_command: Cpbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    ran = cpbench_command("show", *files, "-o", "r.parquet")
    assert ran == (2, "", "error: Parquet needs pyarrow, which is not installed.\nhint:  Run pip install 'cpbench[parquet]', or use --format csv.\n")
    assert not Path("r.parquet").exists()


@pytest.mark.parametrize(("name", "start"), [("r.md", "## healthy.json"), ("r.csv", "file,run,cell"), ("r.json", "[{"), ("r.txt", "healthy.json\nTTFT of")])
def test_the_name_of_the_output_says_the_format(name: str, start: str, files: list[str], cpbench_command: Cpbench) -> None:
    assert cpbench_command("show", *files, "-o", name).code == 0
    assert Path(name).read_text(encoding="utf-8").startswith(start)
    forced = cpbench_command("show", *files, "-o", "other", "--format", {"txt": "text"}.get(name[2:], name[2:]))
    assert (forced.code, Path("other").read_bytes()) == (0, Path(name).read_bytes())


def test_speed_up_is_that_of_the_whole_file(files: list[str], cpbench_command: Cpbench) -> None:
    out = cpbench_command("show", files[0], "--where", "cp==8").out
    assert "0.95x" in out and "compare with cp1 none, which the filter leaves out." in out


def test_upgrade_says_what_it_did(files: list[str], cpbench_command: Cpbench) -> None:
    ran = cpbench_command("upgrade", *files)
    assert ran == (0, "".join(f"{file} has version 1, the newest: unchanged.\n" for file in files), "")


WRONG = {
    "no filter": (2, "show healthy.json --where ''"),
    "half a filter": (2, "show healthy.json --where 'seq>='"),
    "code instead of a filter": (2, "show healthy.json --where \"__import__('os').getcwd()\""),
    "one equals sign": (2, "show healthy.json --where cp=4"),
    "unknown field": (2, "show healthy.json --where stratgy==ring"),
    "a word for a number": (2, "show healthy.json --where 'seq>=long'"),
    "an order of texts": (2, "show healthy.json --where 'strategy<ring'"),
    "nothing is left": (3, "show healthy.json --where 'seq>1M'"),
    "unknown format": (2, "show healthy.json --format cvs"),
    "two formats": (2, "show healthy.json --format csv --json"),
    "parquet on the terminal": (2, "show healthy.json --format parquet"),
    "output that exists": (2, "show healthy.json -o troubled.json"),
    "output in a file": (2, "show healthy.json -o troubled.json/r.csv"),
    "one file of two is missing": (4, "show healthy.json healty.json"),
    "an integer that nothing holds": (4, "show long.json"),
    "half a character": (4, "show half.json"),
    "lengths that are none": (4, "show lengths.json"),
    "too large": (4, "show large.json"),
    "upgrade of a newer file": (4, "upgrade newer.json"),
    "upgrade of a journal": (4, "upgrade r.jsonl"),
    "upgrade of a foreign file": (4, "upgrade foreign.json"),
}


def test_bad_input(files: list[str], cpbench_command: Cpbench, golden: Golden) -> None:
    import shlex

    text = Path(files[0]).read_text()
    data = json.loads(text)
    Path("long.json").write_text(text.replace('"rank":0', f'"rank":{"9" * 400}', 1))
    Path("half.json").write_text(text.replace("Example CPU", "\\ud800"))
    Path("lengths.json").write_text(text.replace("[36864]", '"36k"', 1))
    Path("newer.json").write_text(json.dumps({**data, "schema_version": 99}))
    Path("r.jsonl").write_text(json.dumps({"type": "header", "result": {name: value for name, value in data.items() if name != "cells"}}))
    Path("foreign.json").write_text("{}")
    with Path("large.json").open("wb") as large:
        large.truncate(MAX_FILE_BYTES + 1)
    before = sorted(path.name for path in Path().iterdir())
    said = []
    for what, (code, command) in WRONG.items():
        ran = cpbench_command(*shlex.split(command))
        assert (ran.code, ran.out, len(ran.err.splitlines())) == (code, "", 2), f"{what}: {ran}"
        said.append(f"# {what}: {code}\n$ cpbench {command}\n{ran.err}")
    golden("errors_show", "\n".join(said))
    assert sorted(path.name for path in Path().iterdir()) == before
