"""Published results: those that come with cpbench, and files that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpbench.errors import CpbenchError
from cpbench.plan import unsupported
from cpbench.projection.light import light
from cpbench.projection.limits import limits_of
from cpbench.projection.links import Links, Topology
from cpbench.projection.profile import load_profile
from cpbench.projection.published import Study, load_study, study_names

STUDY: dict[str, Any] = {
    "schema": "cpbench.study",
    "title": "a title",
    "source": "a source",
    "target": "prefill",
    "dtype": "bfloat16",
    "known": ["something"],
    "unknown": ["something else"],
    "machines": {"a box": {"device": "h100", "gpus_per_node": 8, "title": "8 H100"}},
    "rows": [
        {
            "table": "1",
            "machine": "a box",
            "model": "qwen3-8b",
            "layout": "cp2",
            "strategy": "ring",
            "partition": "zigzag",
            "tokens": 64,
            "value": 5,
            "unit": "ms",
        }
    ],
}


def study(path: Path, row: dict[str, Any] | None = None, **changes: Any) -> Study:
    file = path / "study.json"
    file.write_text(json.dumps(STUDY | {"rows": [STUDY["rows"][0] | (row or {})]} | changes))
    return load_study(file)


def test_rows_have_seconds_or_a_change_and_a_cell(tmp_path: Path) -> None:
    one = study(tmp_path)
    row = one.rows[0]
    assert (row.seconds, row.change, one.baseline(row), one.machine(row).device) == (0.005, None, None, "h100")
    cell = one.cell(row)
    assert (str(cell.layout), cell.strategy, cell.layers, cell.lengths, cell.target) == ("cp2", "ring", 36, (64,), "prefill")
    assert study(tmp_path, {"unit": "iterations/s"}).rows[0].seconds == 0.2
    assert one.cell(row) == study(tmp_path, {"unit": "s"}).cell(row)
    assert study(tmp_path, target="attention").cell(row).layers == 1
    changed = study(tmp_path, {"value": -10, "unit": "%", "baseline": "cp4"})
    assert (changed.rows[0].seconds, changed.rows[0].change) == (None, -0.1)
    baseline = changed.baseline(changed.rows[0])
    assert baseline is not None and str(baseline.layout) == "cp4"
    assert study(tmp_path, {"value": -2, "unit": "GB", "baseline": "cp4"}).rows[0].change is None


@pytest.mark.parametrize("name", study_names())
def test_published_rows_are_cells_that_can_run_and_no_faster_than_light(name: str) -> None:
    found = load_study(name)
    assert len({row.model_dump_json() for row in found.rows}) == len(found.rows)
    for row in found.rows:
        cell, machine = found.cell(row), found.machine(row)
        assert unsupported(cell) is None
        device = load_profile(machine.device)
        limits = limits_of(device, Links(device.links, Topology(cell.world_size, machine.gpus_per_node)), found.dtype)
        if row.seconds is not None:
            assert 0.1 < light(cell, limits).seconds / row.seconds < 1, row


def test_what_is_shipped_is_what_was_printed() -> None:
    rows = {name: [(row.layout, row.partition, row.tokens, row.value) for row in load_study(name).rows] for name in study_names()}
    assert ("cp8", "zigzag", 65_536, 63.0) in rows["ring-flash-attention"]
    assert ("cp4tp8", "zigzag", 128_000, 10950) in rows["meta-context-parallel"]
    assert ("tp16sp/ep16", "contiguous", 36_000, -7) in rows["sglang-tp-sp"]
    assert [len(rows[name]) for name in ("ring-flash-attention", "meta-context-parallel", "sglang-tp-sp")] == [8, 11, 4]


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"value": -5}, {}, "a time is more than 0"),
        ({"is_rate": True}, {}, "a rate is a time of cp1"),
        ({"unit": "%"}, {}, "a time has no baseline, and a change has one"),
        ({"unit": "hours"}, {}, "wrong at rows.0.unit"),
        ({"extra": 1}, {}, "wrong at rows.0.extra"),
        ({"machine": "another"}, {}, "row 0: it has no machine 'another'"),
        ({"model": "qwen3-9b"}, {}, "row 0: Unknown model 'qwen3-9b'"),
        ({"strategy": "rings"}, {}, "row 0: Unknown strategy 'rings'"),
        ({"layout": "xp2"}, {}, "row 0: Layout 'xp2'"),
        ({"layout": "tp3"}, {}, "row 0: .*tp=3"),
        ({"partition": "replicated"}, {}, "ring cannot use the replicated partition"),
        ({}, {"machines": {"a box": {"device": "h9000", "gpus_per_node": 8, "title": "8"}}}, "Unknown device 'h9000'"),
        ({}, {"unknown": []}, "wrong at unknown"),
        ({}, {"schema": "cpbench.result"}, "is not a study"),
    ],
)
def test_a_study_that_is_wrong_is_refused_in_one_sentence(tmp_path: Path, row: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CpbenchError, match=message) as caught:
        study(tmp_path, row, **changes)
    assert caught.value.exit_code == 4 and caught.value.hint and "\n" not in caught.value.message


def test_a_file_that_is_none(tmp_path: Path) -> None:
    for name, content in (("not.json", b"{"), ("text.json", b"\xff\xfe"), ("large.json", b" " * (1 << 20) + b" ")):
        (tmp_path / name).write_bytes(content)
    for name in ("not.json", "text.json", "large.json", "missing.json"):
        with pytest.raises(CpbenchError) as caught:
            load_study(tmp_path / name)
        assert caught.value.exit_code == 4
    with pytest.raises(CpbenchError, match="Unknown study 'ring-flash'") as caught:
        load_study("ring-flash")
    assert caught.value.exit_code == 2 and "ring-flash-attention" in caught.value.hint
