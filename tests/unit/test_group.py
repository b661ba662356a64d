"""Following a group: partly written lines, what torchrun's summary says, and what must not get into a record."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from cpbench.group import GroupFailed, Job, _clean, _killed_ranks, _Lines, _rank_failures, run_group
from tests.unit.fakes import FakeLauncher

# printed by torch 2.13 for two ranks of which rank 1 killed itself; the host name is replaced
SUMMARY = """
======================================================
worker FAILED
------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-21_04:49:21
  host      : localhost
  rank      : 0 (local_rank: 0)
  exitcode  : -15 (pid: 3716)  (SIGTERM)
  error_file: <N/A>
  traceback : Signal 15 (SIGTERM) received by PID 3716
------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-21_04:49:21
  host      : localhost
  rank      : 1 (local_rank: 1)
  exitcode  : -9 (pid: 3717)  (SIGKILL)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 3717
======================================================
"""


def test_torchruns_summary_names_the_rank_that_was_killed_and_not_those_it_ended_itself() -> None:
    assert _killed_ranks(SUMMARY) == [(1, 9)]
    assert _killed_ranks(SUMMARY.replace("-9", "1")) == []
    assert _killed_ranks(SUMMARY.replace("-15", "-6")) == [(1, 9), (0, 6)]
    assert _killed_ranks("") == []


def test_a_rank_whose_peer_is_gone_is_not_the_cause_though_it_is_heard_of_first(tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    for rank, reason in enumerate(["RuntimeError: Connection closed by peer [10.0.0.2]:5000", "ValueError: the cause"]):
        file = tmp_path / f"events.jsonl.rank{rank}.json"
        file.write_text(json.dumps({"rank": rank, "status": "crash", "reason": reason}))
        os.utime(file, (1000 + rank, 1000 + rank))
    assert [failure["rank"] for failure in _rank_failures(events)] == [1, 0]


def test_lines_are_read_once_and_only_when_they_are_whole(tmp_path: Path) -> None:
    file = tmp_path / "events"
    file.write_text('{"a": 1}\n{"a"')
    lines = _Lines(file)
    assert list(lines.new()) == [{"a": 1}]
    assert list(lines.new()) == []
    with file.open("a") as more:
        more.write(': 2}\n[]\n{"a": NaN}\n')
    assert list(lines.new()) == [{"a": 2}, {"a": None}]


def test_log_lines_are_short_and_do_not_name_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "secret-host-7")
    assert _clean("[secret-host-7]:29500 failed  \n") == "[<host>]:29500 failed"
    assert len(_clean("x" * 10_000)) == 400


def test_ranks_that_cannot_be_started_are_a_crash(tmp_path: Path) -> None:
    (tmp_path / "full").write_text("")
    job = Job(1, 0, "cpu", 1, False, 1, {}, 1.0, ())
    with pytest.raises(GroupFailed) as caught:
        next(run_group(FakeLauncher(), job, tmp_path / "full" / "1", 1.0, lambda: None))
    assert caught.value.status == "crash" and caught.value.reason.startswith("the ranks cannot be started: Not a directory")
