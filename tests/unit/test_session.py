"""The files of a profile: what is read, what is left, and what becomes of traces that cannot be used."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from cpbench.errors import CpbenchError
from cpbench.measure.history import History, history_file
from cpbench.results import CellResult
from cpbench.tracing.chrome import SUFFIX, read_trace, write_trace
from cpbench.tracing.session import Session

from .traces import CLOCK, rank, trace

MEMORY = ["p.memory/rank0.json", "p.memory/rank1.json", "p.memory/memory.svg"]


def result() -> CellResult:
    return CellResult(id="x", key={"device": "cpu", "layout": "cp2", "strategy": "ring"}, status="ok", world_size=2)


def traced(folder: Path, *traces: dict[str, Any]) -> Session:
    """The session of two ranks, which have left their memory over time and these traces."""
    session = Session(folder / "p.json")
    session.folder.mkdir()
    for number in range(2):
        history = History("live tensors", ((0.0, 100), (1.0, 300)), (), {"layer/attention": 200 + number})
        history_file(session.folder, number).write_text(json.dumps(history.to_dict()))
    for number, one in enumerate(traces):
        write_trace(session.folder / f"rank{number}{SUFFIX}", one)
    return session


def test_a_session_reads_what_the_ranks_wrote_and_leaves_a_timeline(tmp_path: Path) -> None:
    done = traced(tmp_path, rank(), rank(shift=3)).finished(result(), {"traced_s": CLOCK})
    assert done.artifacts == [*MEMORY, "p.traces/rank0.pt.trace.json.gz", "p.traces/rank1.pt.trace.json.gz", "p.timeline.json.gz"]
    assert done.profile and len(done.profile.ranks) == 2 and not done.warnings
    peaks = {(phase.phase, phase.rank): phase.peak_bytes for phase in done.profile.phases}
    assert peaks == {("layer/attention", 0): 200, ("layer/attention", 1): 201, ("harness/traced", 0): 300, ("harness/traced", 1): 300}
    assert all((tmp_path / name).exists() for name in done.artifacts)
    assert sorted(path.name for path in (tmp_path / "p.traces").iterdir()) == ["rank0.pt.trace.json.gz", "rank1.pt.trace.json.gz"]
    assert CellResult.model_validate_json(done.model_dump_json()) == done


def test_ranks_on_different_clocks_have_a_profile_and_no_timeline(tmp_path: Path) -> None:
    done = traced(tmp_path, rank(), rank(shift=5000)).finished(result(), {"traced_s": CLOCK})
    assert done.profile and len(done.artifacts) == len(MEMORY) + 2
    assert done.warnings == ["no timeline of all ranks: step 0 of rank 1 begins 0.0049 s after that of rank 0 has ended, so their clocks differ"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "rank1.pt.trace.json.gz cannot be read"),
        (b"not a gzip file", "rank1.pt.trace.json.gz cannot be read"),
        (gzip.compress(b"{", mtime=0)[:-9], "rank1.pt.trace.json.gz is not a trace"),
        (gzip.compress(b"[1]", mtime=0), "rank1.pt.trace.json.gz is not a trace"),
        (gzip.compress(json.dumps(trace()).encode()), "rank1.pt.trace.json.gz has 0 of 2 traced steps"),
    ],
)
def test_a_trace_that_cannot_be_used_is_a_warning(content: bytes | None, said: str, tmp_path: Path) -> None:
    session = traced(tmp_path, rank())
    if content is not None:
        (session.folder / f"rank1{SUFFIX}").write_bytes(content)
    done = session.finished(result(), {"traced_s": CLOCK})
    assert done.profile is None and done.status == "ok"
    (warning,) = done.warnings
    assert warning.startswith("no profile: ") and said in warning


def test_a_rank_without_memory_over_time_is_a_warning(tmp_path: Path) -> None:
    session = traced(tmp_path, rank(), rank())
    history_file(session.folder, 1).unlink()
    done = session.finished(result(), {"traced_s": CLOCK})
    assert done.profile and done.warnings == ["no memory over time: No such file or directory"]


def test_cells_that_failed_are_left_as_they_are(tmp_path: Path) -> None:
    failed = result().model_copy(update={"status": "oom"})
    assert Session(tmp_path / "p.json").finished(failed, {"traced_s": CLOCK}) is failed
    assert read_trace(write(tmp_path / "a.gz", trace())) == trace()


def write(file: Path, data: dict[str, Any]) -> Path:
    write_trace(file, data)
    return file


def test_the_folder_is_made_before_and_gone_afterwards_if_nothing_came(tmp_path: Path) -> None:
    session = Session(tmp_path / "deep" / "p.json")
    with session.opened():
        assert session.folder.is_dir()
    assert not session.folder.exists()
    with session.opened():
        write_trace(session.folder / f"rank0{SUFFIX}", trace())
    assert session.folder.exists()
    with pytest.raises(CpbenchError, match="has files of another profile"), session.opened():
        pass
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CpbenchError, match=r"file/p\.traces cannot be written: Not a directory"), Session(tmp_path / "file" / "p.json").opened():
        pass
