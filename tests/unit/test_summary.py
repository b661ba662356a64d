"""A result read for a comparison: it is the same comparison, and a file that is broken where it matters is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpbench.comparison import compare
from cpbench.errors import UNREADABLE, CpbenchError
from cpbench.reading import MAX_DIGITS, read, read_summary
from cpbench.records import TIME_METRIC
from cpbench.summary import TIMES, ResultSummary
from tests.cli import samples

SAMPLE = Path(__file__).parents[2] / "results" / "samples" / "cpu_36k.json"


@pytest.fixture
def data() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(samples.healthy().model_dump_json(by_alias=True))
    return found


def stored(folder: Path, data: object) -> Path:
    file = folder / "r.json"
    file.write_text(data if isinstance(data, str) else json.dumps(data))
    return file


def test_the_comparison_is_that_of_the_whole_files(tmp_path: Path, data: dict[str, Any]) -> None:
    data["cells"][1]["metrics"]["ttft_s"] = {**data["cells"][1]["metrics"]["ttft_s"], "rounds": [[2.0]], "median": 2.0}
    data["cells"][2]["status"] = "oom"
    pairs = [(stored(tmp_path, data), stored(tmp_path, samples.healthy().model_dump_json(by_alias=True))), (SAMPLE, SAMPLE)]
    for old, new in pairs:
        assert isinstance(read_summary(old), ResultSummary)
        short, whole = (compare(reader(old), reader(new)) for reader in (read_summary, read))
        assert short.to_frame().equals(whole.to_frame())
        assert short.counts == whole.counts
        assert short.environment == whole.environment


def test_all_times_are_in_a_summary() -> None:
    assert set(TIMES) == set(TIME_METRIC.values())


def test_what_is_not_compared_is_not_read(tmp_path: Path, data: dict[str, Any]) -> None:
    data["cells"][0] |= {"ranks": "none", "warnings": 3}
    cell = read_summary(stored(tmp_path, data)).cells[0]
    assert set(cell.metrics) == {"ttft_s"}
    assert not hasattr(cell, "ranks")
    with pytest.raises(CpbenchError, match="ranks"):
        read(tmp_path / "r.json")


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("cells", 0, "status"), "fine"),
        (("cells", 0, "metrics", "ttft_s", "median"), "long"),
        (("cells", 0, "metrics", "ttft_s", "surprise"), 1),
        (("cells", 0, "memory", "rank"), None),
        (("cells", 0, "key", "lengths"), ["x"]),
        (("run", "started"), 3),
        (("surprise",), 1),
    ],
)
def test_what_is_compared_is_checked(tmp_path: Path, data: dict[str, Any], where: tuple[Any, ...], value: object) -> None:
    place: Any = data
    for part in where[:-1]:
        place = place[part]
    place[where[-1]] = value
    with pytest.raises(CpbenchError, match="breaks the result schema at") as error:
        read_summary(stored(tmp_path, data))
    assert error.value.exit_code == UNREADABLE


def test_json_is_checked_everywhere(tmp_path: Path, data: dict[str, Any]) -> None:
    text = json.dumps(data).replace('"ranks": [', '"ranks": [[', 1)
    with pytest.raises(CpbenchError, match="not a complete JSON file"):
        read_summary(stored(tmp_path, text))


def test_a_journal_is_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "r.jsonl"
    result = samples.healthy()
    header = {"type": "header", "result": json.loads(result.model_dump_json(by_alias=True, exclude={"cells"}))}
    file.write_text(json.dumps(header) + "\n" + json.dumps({"type": "cell", "cell": result.cells[0].model_dump(mode="json")}) + "\n")
    assert read_summary(file) == read(file)


@pytest.mark.parametrize("offset", range(7))
def test_an_integer_beyond_all_floats_is_found_wherever_it_starts(tmp_path: Path, data: dict[str, Any], offset: int) -> None:
    data["environment"] = {"x" * (offset + 1): int("9" * (MAX_DIGITS + 1))}
    with pytest.raises(CpbenchError, match="not a complete JSON file"):
        read(stored(tmp_path, data))
    data["environment"] = {"x" * (offset + 1): int("9" * MAX_DIGITS)}
    assert read(stored(tmp_path, data)).environment
