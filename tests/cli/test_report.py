"""`cpbench report`: where the page goes, what it says, and what is not overwritten. How it looks and behaves is tested in tests/browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cpbench.results import ResultFile

from . import samples
from .conftest import Cpbench, Golden
from .test_output import write


def embedded(file: Path) -> dict[str, Any]:
    """The data in a page."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text(encoding="utf-8"), re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def unpacked(stored: dict[str, list[Any]]) -> list[Any]:
    """Records as they were before report/packed.py."""

    def filled(part: Any, own: Iterator[Any]) -> Any:
        if isinstance(part, dict):
            return {name: filled(one, own) for name, one in part.items()}
        return [filled(one, own) for one in part] if isinstance(part, list) else next(own) if part == "" else part

    return [filled(stored["patterns"][pattern], iter(own)) for pattern, *own in stored["each"]]


def outline(file: Path) -> str:
    """What a page says, line by line: the numbers of texts as the texts."""
    data = embedded(file)
    texts = data["texts"]
    lines = [f"# {texts[data['title']]}"]
    lines += [" | ".join(texts[tile[name]] for name in ("name", "value", "about")) for tile in data["tiles"]]
    for tables in data["best"]:
        for table in tables["tables"]:
            lines += ["", texts[table["title"]], *(" | ".join(texts[number] for number in row) for row in (table["head"], *table["rows"]))]
    for name in ("cells", "changes"):
        table = data[name]["rows"] if name == "changes" and data[name] else data[name]
        if table:
            lines += ["", f"## {name}", " | ".join(texts[column["name"]] for column in table["columns"])]
            lines += [" | ".join(texts[number] for number in row[1]) for row in unpacked(table["rows"])]
    for drawer in unpacked(data["drawers"])[2:3]:
        lines += ["", f"## {texts[drawer['title']]}", *_drawer(drawer["sections"], texts)]
    return "\n".join(lines)


def _drawer(sections: list[dict[str, Any]], texts: list[str]) -> list[str]:
    lines = []
    for section in sections:
        lines.append(f"### {texts[section['title']]}")
        lines += [texts[number] for number in section.get("lines", [])]
        facts = section.get("facts", [])
        lines += [f"{texts[facts[at]]}: {texts[facts[at + 1]]}" for at in range(0, len(facts), 2)]
        table = section.get("table")
        lines += [" | ".join(texts[number] for number in row) for row in (table["head"], *table["rows"])] if table else []
        bars = section.get("bars")
        lines += [f"{[texts[name] for name in bars['names']]} {[[texts[label], parts] for label, parts in bars['rows']]}"] if bars else []
        lines += [texts[number] for number in section.get("log", [])]
    return lines


def test_help(cpbench_command: Cpbench, golden: Golden) -> None:
    golden("help_report", cpbench_command("report", "--help").out)


@pytest.mark.parametrize("name", ["healthy", "troubled", "on_gpus", "batches"])
def test_a_page(name: str, cpbench_command: Cpbench, golden: Golden, tmp_path: Path) -> None:
    file = write(getattr(samples, name)(), tmp_path / "r.json")
    ran = cpbench_command("report", str(file))
    assert (ran.code, ran.err) == (0, "")
    assert re.fullmatch(rf"Report: {tmp_path}/r\.html \(\S+ KiB\)\n", ran.out)
    golden(f"report_{name}", outline(tmp_path / "r.html"))


def test_a_page_of_two_results(cpbench_command: Cpbench, golden: Golden, tmp_path: Path) -> None:
    new = samples.healthy()
    new.cells = [*new.cells[:2], samples.measured(samples.make_cell("cp2", "ring"), [5.4, 5.5, 5.6]), *new.cells[4:]]
    files = [write(samples.healthy(), tmp_path / "a.json"), write(new, tmp_path / "b.json")]
    assert cpbench_command("report", *map(str, files), "-o", "both.html").code == 0
    golden("report_two", outline(tmp_path / "both.html"))


def test_a_search_for_the_longest_sequence_has_a_page(cpbench_command: Cpbench, tmp_path: Path) -> None:
    result = samples.healthy()
    result.run.kind = "maxseq"
    cells = [cell.model_copy(update={"metrics": {}}) for cell in result.cells]
    assert cpbench_command("report", str(write(result.model_copy(update={"cells": cells}), tmp_path / "r.json"))).code == 0
    assert "Longest sequence that fits" in outline(tmp_path / "r.html")


def test_without_a_cell_there_is_a_page_too(cpbench_command: Cpbench, tmp_path: Path) -> None:
    assert cpbench_command("report", str(write(samples.result([]), tmp_path / "r.json"))).code == 0
    assert "0 of 0 ok" in outline(tmp_path / "r.html")


def test_a_report_is_renewed_and_nothing_else_is(cpbench_command: Cpbench, tmp_path: Path) -> None:
    file = write(samples.healthy(), tmp_path / "r.json")
    other = tmp_path / "mine.html"
    other.write_text("<p>mine</p>")
    assert cpbench_command("report", str(file)).code == cpbench_command("report", str(file)).code == 0
    ran = cpbench_command("report", str(file), "-o", "mine.html")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == "error: mine.html exists and is not a report.\nhint:  Choose another file with -o, or overwrite it with --force.\n"
    assert other.read_text() == "<p>mine</p>"
    assert cpbench_command("report", str(file), "-o", "mine.html", "--force").code == 0
    assert other.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_result_is_never_overwritten(force: tuple[str, ...], cpbench_command: Cpbench, tmp_path: Path) -> None:
    file = write(samples.healthy(), tmp_path / "r.json")
    before = file.read_bytes()
    ran = cpbench_command("report", "r.json", "-o", str(file), *force)
    assert ran.code == 2 and "is a result that the report is about" in ran.err
    assert file.read_bytes() == before


def test_what_cannot_be_a_page_is_said_in_two_lines(cpbench_command: Cpbench, golden: Golden, tmp_path: Path) -> None:
    file = write(samples.healthy(), tmp_path / "r.json")
    (tmp_path / "cut.json").write_text(file.read_text()[:2000])
    (tmp_path / "foreign.json").write_text('{"schema": "something"}')
    (tmp_path / "newer.json").write_text(file.read_text().replace('"schema_version":1', '"schema_version":99'))
    (tmp_path / "folder").mkdir()
    asked = ["nothing.json", "cut.json", "foreign.json", "newer.json", "", "r.json r.json r.json", "r.json -o folder", "r.json -o r.json/x.html", "folder"]
    said = []
    for line in asked:
        ran = cpbench_command("report", *(line.split() or [""]))
        assert ran.out == "" and ran.code in (2, 4) and len(ran.err.splitlines()) == 2
        said.append(f"$ cpbench report {line}\n{ran.err}exit code {ran.code}\n")
    golden("errors_report", "\n".join(said))


def _nested(depth: int) -> Any:
    deep: Any = "x"
    for _ in range(depth):
        deep = {"a": deep}
    return deep


@pytest.mark.parametrize("strange", [None, 0, -1, "x", [], [1], {}, {"a": None}, {"a": {"b": [1e308, {}]}}, 1e308, _nested(100), _nested(450)], ids=str)
def test_values_of_any_kind_are_shown_or_refused(strange: Any, cpbench_command: Cpbench, tmp_path: Path) -> None:
    """Parts of a file that may hold anything, holding it."""
    data = json.loads(samples.healthy().model_dump_json(by_alias=True))
    cell = data["cells"][1]
    cell["traffic"] = {"predicted": strange, "recorded": {"cp": strange, "tp": {"send": strange}}, "rank": strange, "source": strange}
    cell["experts"], data["environment"]["packages"], data["environment"]["running"] = {"a": strange}, strange, strange
    cell["key"] |= {"layout": strange, "strategy": strange, "model": strange, "layers": strange}
    data["run"]["scenario"] = {"limits": strange}
    cell["metrics"]["ttft_s"] |= {"rounds": [[], [1e308, -1e308]], "median": 1e-308}
    (tmp_path / "r.json").write_text(json.dumps(data))
    ran = cpbench_command("report", "r.json")
    assert ran.code == 0 or (ran.code == 4 and len(ran.err.splitlines()) == 2), ran.err
    assert ran.code == 4 or len(unpacked(embedded(tmp_path / "r.html")["drawers"])) == len(data["cells"])


def test_texts_from_a_file_stay_inside_the_data(cpbench_command: Cpbench, tmp_path: Path) -> None:
    result: ResultFile = samples.healthy()
    result.cells[1].warnings = ["</script><script>alert(1)</script><!--"]
    name = "<img src=x onerror=alert(1)>.json"
    assert cpbench_command("report", str(write(result, tmp_path / name)), "-o", "r.html").code == 0
    page = (tmp_path / "r.html").read_text()
    assert "<script>alert" not in page and "<img src=x" not in page and page.count("<!--") == 0
    assert "</script><script>alert(1)</script><!--" in embedded(tmp_path / "r.html")["texts"]


def test_nothing_in_common_is_said_after_the_page_is_written(cpbench_command: Cpbench, tmp_path: Path) -> None:
    write(samples.healthy(), tmp_path / "a.json")
    other = samples.healthy()
    cells = [cell.model_copy(update={"key": {**cell.key, "dtype": "bfloat16"}}) for cell in other.cells]
    write(other.model_copy(update={"cells": cells}), tmp_path / "b.json")
    ran = cpbench_command("report", "a.json", "b.json", "-o", "r.html")
    assert ran.code == 3 and ran.out.startswith("Report: r.html")
    assert ran.err == "error: Nothing in a.json and b.json can be compared.\nhint:  They differ in dtype float32 and bfloat16.\n"
    data = embedded(tmp_path / "r.html")
    assert data["texts"][data["changes"]["summary"]] == "Nothing could be compared. They differ in dtype float32 and bfloat16."
