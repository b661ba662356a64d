"""Older schema versions, by a step made for the test: version 0 had the cells' status in capitals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpbench import migrations
from cpbench.errors import UNREADABLE, CpbenchError
from cpbench.reading import read
from cpbench.results import SCHEMA_VERSION
from cpbench.upgrade import upgrade_file
from tests.cli import samples


def lower(data: dict[str, Any]) -> dict[str, Any]:
    return {**data, "cells": [{**cell, "status": cell["status"].lower()} for cell in data["cells"]]}


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of version -1, two steps behind; the older one renames what the run is called."""
    monkeypatch.setitem(migrations.STEPS, 0, lower)
    monkeypatch.setitem(migrations.STEPS, -1, lambda data: {**data, "run": {**data["run"], "name": data["run"]["name"].lower()}})
    data = json.loads(samples.healthy().model_dump_json(by_alias=True))
    data["run"]["name"] = "SWEEP"
    file = tmp_path / "old.json"
    file.write_text(json.dumps({**data, "schema_version": -1, "cells": [{**cell, "status": "OK"} for cell in data["cells"]]}))
    return file


def test_older_versions_are_read_step_by_step(old: Path) -> None:
    assert read(old) == samples.healthy()


def test_upgrade_rewrites_once(old: Path) -> None:
    assert upgrade_file(old) == f"{old} had version -1 and has {SCHEMA_VERSION} now."
    assert json.loads(old.read_text())["schema_version"] == SCHEMA_VERSION
    assert read(old) == samples.healthy()
    content = old.read_bytes()
    assert upgrade_file(old) == f"{old} has version {SCHEMA_VERSION}, the newest: unchanged."
    assert old.read_bytes() == content
    assert list(old.parent.iterdir()) == [old]


def test_a_damaged_old_file_stays_as_it_is(old: Path) -> None:
    content = old.read_text().replace('"status"', '"state"', 1)
    old.write_text(content)
    with pytest.raises(CpbenchError, match="breaks version 0 of the result schema") as caught:
        upgrade_file(old)
    assert (caught.value.exit_code, old.read_text()) == (UNREADABLE, content)


def test_a_file_that_cannot_be_written_stays_as_it_is(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    content = old.read_text()
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CpbenchError, match="cannot be written: No space left") as caught:
        upgrade_file(old)
    assert "nothing was changed" in caught.value.hint
    assert (old.read_text(), list(old.parent.iterdir())) == (content, [old])


@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, -7, 0.5, "1", None, True])
def test_versions_that_there_are_none_of(version: object, tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text(json.dumps({**json.loads(samples.healthy().model_dump_json(by_alias=True)), "schema_version": version}))
    with pytest.raises(CpbenchError, match="schema version") as caught:
        upgrade_file(file)
    assert caught.value.exit_code == UNREADABLE


def test_a_version_is_not_taken_for_granted(tmp_path: Path) -> None:
    data = json.loads(samples.healthy().model_dump_json(by_alias=True))
    del data["schema_version"]
    (tmp_path / "r.json").write_text(json.dumps(data))
    with pytest.raises(CpbenchError, match="schema version None"):
        read(tmp_path / "r.json")


def test_a_journal_is_not_rewritten(tmp_path: Path) -> None:
    journal = tmp_path / "r.jsonl"
    data = json.loads(samples.healthy().model_dump_json(by_alias=True))
    journal.write_text(json.dumps({"type": "header", "result": {name: value for name, value in data.items() if name != "cells"}}))
    with pytest.raises(CpbenchError, match="journal of a run that has not ended"):
        upgrade_file(journal)
