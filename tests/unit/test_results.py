"""Reading result files: what is not one is refused in a sentence, and the committed schema is the one in force."""

import json
from pathlib import Path

import pytest

import cpbench
from cpbench.errors import UNREADABLE, CpbenchError
from cpbench.reading import read
from cpbench.results import ResultFile, json_schema

ROOT = Path(__file__).parents[2]
RUN = {"id": "1", "name": "sweep", "argv": [], "scenario": {}, "started": "2026-01-01T00:00:00+00:00", "cpbench_version": "0"}
CELL = {"id": "a", "key": {"layout": "cp1"}, "status": "ok"}
GOOD = {"schema": "cpbench.result", "schema_version": 1, "run": RUN, "environment": {}, "cells": [CELL]}


def stored(tmp_path, data, name="r.json"):
    (tmp_path / name).write_text(data if isinstance(data, str) else json.dumps(data))
    return tmp_path / name


def test_the_committed_schema_is_current():
    committed = json.loads((ROOT / "results" / "schema.json").read_text())
    assert committed == json.loads(json.dumps(json_schema())), "regenerate it: python -m cpbench.results > results/schema.json"


def test_a_result_reads_back(tmp_path):
    result = read(stored(tmp_path, GOOD))
    assert result.cell("a").status == "ok"
    assert result.cell("b") is None
    written = stored(tmp_path, result.model_dump_json(by_alias=True), "again.json")
    assert read(written) == result


def test_load_takes_patterns_and_paths(tmp_path):
    stored(tmp_path, GOOD, "a.json")
    stored(tmp_path, GOOD, "b.json")
    assert [type(result) for result in cpbench.load(tmp_path / "*.json")] == [ResultFile, ResultFile]
    assert len(cpbench.load([tmp_path / "a.json"])) == 1


def test_a_journal_cut_in_its_last_line_reads(tmp_path):
    header = {"type": "header", "result": {key: value for key, value in GOOD.items() if key != "cells"}}
    lines = [json.dumps(header), json.dumps({"type": "cell", "cell": CELL}), '{"type": "cell", "cell": {"id": "b", "ke']
    assert [cell.id for cell in read(stored(tmp_path, "\n".join(lines), "r.jsonl")).cells] == ["a"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("", "not a complete JSON file"),
        (json.dumps(GOOD)[:-20], "not a complete JSON file"),
        ("[" * 100_000, "not a complete JSON file"),
        ("[1, 2]", "not a cpbench result"),
        ({"schema": "other"}, "not a cpbench result"),
        ({**GOOD, "schema_version": 99}, "schema version 99"),
        ({**GOOD, "surprise": 1}, "surprise"),
        ({**GOOD, "cells": [{**CELL, "status": "fine"}]}, "cells.0.status"),
        (json.dumps(GOOD).replace('"cells": [', '"cells": [NaN, '), "cells.0"),
    ],
)
def test_what_is_not_a_result_is_refused_in_one_sentence(tmp_path, data, message):
    with pytest.raises(CpbenchError, match=message) as caught:
        read(stored(tmp_path, data))
    assert caught.value.exit_code == UNREADABLE
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_a_missing_file_names_the_nearest(tmp_path):
    stored(tmp_path, GOOD, "sweep-1.json")
    with pytest.raises(CpbenchError, match="does not exist") as caught:
        read(tmp_path / "sweep-2.json")
    assert "sweep-1.json" in caught.value.hint
