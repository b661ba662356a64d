"""The journal: whatever moment the power fails, what was finished can be read."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpbench import journal
from cpbench.errors import CpbenchError
from cpbench.journal import Journal
from cpbench.reading import read
from cpbench.records import merge_record, not_measured
from cpbench.results import CellResult, ResultFile, Run
from tests.unit.fakes import made, record

CELLS = [planned.cell for planned in made()[1].cells]
RUN = Run(id="r", name="n", argv=[], scenario={}, started="2026-01-01T00:00:00+00:00", cpbench_version="0")


def done(index: int = 0) -> CellResult:
    return merge_record(CELLS[index], None, record())


def result(*cells: CellResult) -> ResultFile:
    return ResultFile(schema_name="cpbench.result", run=RUN, environment={"a": 1}, cells=list(cells))


def full_journal(folder: Path) -> bytes:
    opened = Journal(folder / "r.json", RUN, {"a": 1}, [not_measured(CELLS[2], "unsupported", "no")])
    opened.add_cell(done(0))
    opened.add_environment({"a": 1, "b": {"c": "é"}})
    opened.add_cell(done(1))
    opened.add_cell(merge_record(CELLS[0], done(0), record()))
    opened.close()
    return opened.path.read_bytes()


def test_a_journal_reads_like_a_result(tmp_path: Path) -> None:
    full_journal(tmp_path)
    found = read(tmp_path / "r.jsonl")
    assert [cell.status for cell in found.cells] == ["unsupported", "ok", "ok"]
    assert found.environment == {"a": 1, "b": {"c": "é"}} and not found.run.complete
    assert len(found.cells[1].metrics["ttft_s"].rounds) == 2  # the last entry of a cell counts


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return full_journal(tmp_path_factory.mktemp("whole"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_journal_cut_at_any_byte_reads_up_to_the_last_whole_line(tmp_path: Path, whole: bytes, data: st.DataObject) -> None:
    size = data.draw(st.integers(0, len(whole)))
    file = tmp_path / "cut.jsonl"
    file.write_bytes(whole[:size])
    lines = [json.loads(line) for line in whole[:size].split(b"\n")[:-1]]
    tail = whole[:size].split(b"\n")[-1]
    if not lines and not (tail and size == len(whole.split(b"\n")[0])):
        with pytest.raises(CpbenchError) as caught:
            read(file)
        assert caught.value.exit_code == 4
        return
    finished = {entry["cell"]["id"] for entry in lines if entry["type"] == "cell"}
    assert finished <= {cell.id for cell in read(file).cells}


def test_the_end_is_one_json_file_and_nothing_else(tmp_path: Path) -> None:
    opened = Journal(tmp_path / "deep" / "er" / "r.json", RUN, {})
    opened.finish(result(done()))
    assert [path.name for path in opened.output.parent.iterdir()] == ["r.json"]
    assert read(opened.output) == result(done())


def test_an_existing_file_or_journal_is_not_overwritten(tmp_path: Path) -> None:
    for name in ("r.json", "r.jsonl"):
        file = tmp_path / name
        file.write_text("precious")
        with pytest.raises(CpbenchError, match="exists") as caught:
            Journal(tmp_path / "r.json", RUN, {})
        assert file.read_text() == "precious" and caught.value.exit_code == 2 and "--resume" in caught.value.hint
        file.unlink()


def test_a_resumed_journal_is_written_anew_so_that_a_cut_line_is_not_continued(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(full_journal(tmp_path)[:-20])
    kept = read(path)
    opened = Journal(tmp_path / "r.json", kept.run, kept.environment, kept.cells, resume=True)
    opened.add_cell(done(1))
    opened.close()
    assert [cell.id for cell in read(path).cells] == [cell.id for cell in kept.cells]


def test_two_sweeps_do_not_write_one_file(tmp_path: Path) -> None:
    first = Journal(tmp_path / "r.json", RUN, {})
    with pytest.raises(CpbenchError, match="another cpbench"):
        Journal(tmp_path / "r.json", RUN, {}, resume=True)
    first.add_cell(done())
    first.close()
    Journal(tmp_path / "r.json", RUN, {}, resume=True).close()


def test_a_folder_that_cannot_be_written_and_a_wrong_name_are_found_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CpbenchError, match="cannot be written") as caught:
        Journal(tmp_path / "file" / "r.json", RUN, {})
    assert caught.value.exit_code == 2
    with pytest.raises(CpbenchError, match=r"does not end in \.json"):
        Journal(tmp_path / "r.txt", RUN, {})


def test_a_full_disk_gives_one_sentence_and_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Journal(tmp_path / "r.json", RUN, {})
    opened.add_cell(done(0))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journal.os, "fsync", full)
    for act in (lambda: opened.add_cell(done(1)), lambda: opened.finish(result(done(0), done(1)))):
        with pytest.raises(CpbenchError) as caught:
            act()
        assert caught.value.message == "The result cannot be written: the disk is full."
        assert str(tmp_path / "r.jsonl") in caught.value.hint and caught.value.exit_code == 5
    assert [cell.id for cell in read(tmp_path / "r.jsonl").cells] == [CELLS[0].id]
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]


def test_of_sweeps_that_start_at_once_one_gets_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, others = journal._write, []

    def late(file: object, text: str) -> None:
        """Another one starts when this one has looked and not yet written."""
        monkeypatch.setattr(journal, "_write", write)
        others.append(Journal(tmp_path / "r.json", RUN, {}, [done(0)]))
        write(file, text)  # type: ignore[arg-type]

    monkeypatch.setattr(journal, "_write", late)
    with pytest.raises(CpbenchError, match="exists"):
        Journal(tmp_path / "r.json", RUN, {})
    others[0].add_cell(done(1))
    assert [cell.id for cell in read(tmp_path / "r.jsonl").cells] == [CELLS[0].id, CELLS[1].id]
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]


def test_a_journal_that_was_replaced_while_its_lock_was_waited_for_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Journal(tmp_path / "r.json", RUN, {}).close()
    lock, others = journal._lock, []

    def late(file: object, path: Path) -> None:
        monkeypatch.setattr(journal, "_lock", lock)
        others.append(Journal(tmp_path / "r.json", RUN, {}, resume=True))
        lock(file, path)  # type: ignore[arg-type]

    monkeypatch.setattr(journal, "_lock", late)
    with pytest.raises(CpbenchError, match="another cpbench"):
        Journal(tmp_path / "r.json", RUN, {}, resume=True)
    others[0].add_cell(done(1))
    assert [cell.id for cell in read(tmp_path / "r.jsonl").cells] == [CELLS[1].id]
