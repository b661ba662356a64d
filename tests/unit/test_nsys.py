"""Nsight Systems without Nsight Systems: its command lines, and what is read from what it prints."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import pytest

from cpbench.errors import CpbenchError
from cpbench.tracing import nsys
from cpbench.tracing.nsys import Nsys, profile_command

NVTX_SUM = """Generating SQLite file rank0.sqlite from rank0.nsys-rep
Processing [rank0.sqlite] with [/opt/nsys/reports/nvtx_sum.py]...
Time (%),Total Time (ns),Instances,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),Style,Range
60.0,2000000,2,1000000.0,1000000.0,900000,1100000,1.0,PushPop,cpbench:harness/traced
30.0,1500000,8,187500.0,187500.0,1,2,1.0,PushPop,cpbench:layer/attention
5.0,300,1,300.0,300.0,300,300,0.0,PushPop,:aten::mm
"""
GPU_SUM = """
Range,Style,Total Proj Time (ns),Total Range Time (ns),Range Instances,Proj Avg (ns)
cpbench:layer/attention,PushPop,700000,1500000,8,87500.0
"""
REPORTS = {"nvtx_sum": NVTX_SUM, "nvtx_gpu_proj_sum": GPU_SUM}


@pytest.fixture
def report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(nsys, "_stats", lambda file, name: REPORTS[name])
    file = tmp_path / "rank1.nsys-rep"
    file.touch()
    return file


def test_ranks_run_below_nsys_and_their_reports_have_names(tmp_path: Path) -> None:
    command = Nsys(profile_command(tmp_path, "cuda")).command(Path("job.json"), 2, Path("logs"))
    after = command[command.index("--no-python") + 1 :]
    assert after == [
        "nsys",
        "profile",
        "--trace=cuda,nvtx",
        "--capture-range=cudaProfilerApi",
        "--sample=none",
        "--cpuctxsw=none",
        "--capture-range-end=stop",
        "--force-overwrite=true",
        f"--output={tmp_path}/rank%q{{RANK}}",
        sys.executable,
        "-m",
        "cpbench.worker",
        "job.json",
    ]
    assert "--nvtx-capture=harness/traced@cpbench" in profile_command(tmp_path, "cpu")
    assert nsys.report(tmp_path, 3).name == "rank3.nsys-rep"


def test_where_nsys_is_missing_the_command_line_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(CpbenchError) as caught:
        nsys.launcher(Path("results/x.traces"), "cuda", 2)
    assert caught.value.exit_code == 2
    assert caught.value.message == "Nsight Systems (nsys) is not on the PATH."
    assert "torchrun --standalone --nproc-per-node 2 " in caught.value.hint
    assert "--output=results/x.traces/rank%q{RANK}" in caught.value.hint


def test_only_our_ranges_are_imported_and_the_longest_comes_first(report: Path) -> None:
    found = nsys.ranges_of(report, 1, "cuda")
    assert [(one.range, one.rank, one.calls, one.gpu_seconds) for one in found] == [("harness/traced", 1, 2, None), ("layer/attention", 1, 8, 7e-4)]
    assert [one.seconds for one in found] == pytest.approx([2e-3, 1.5e-3])
    assert [one.gpu_seconds for one in nsys.ranges_of(report, 1, "cpu")] == [None, None]
    profile = nsys.profile_of(found)
    assert (profile.tool, profile.steps, profile.phases, profile.nvtx) == ("nsys", 2, [], found)


def test_reports_without_our_ranges_are_refused(report: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REPORTS, "nvtx_sum", "SKIPPED: rank0.sqlite does not contain NV Tools Extension (NVTX) data.\n")
    assert nsys.ranges_of(report, 1, "cpu") == []
    with pytest.raises(CpbenchError, match="have no range cpbench:harness/traced"):
        nsys.profile_of([])
    with pytest.raises(CpbenchError, match=r"nsys left no rank2\.nsys-rep"):
        nsys.ranges_of(report.with_name("rank2.nsys-rep"), 2, "cpu")


class Writing:
    """Processes that end after they were asked so many times whether they have."""

    def __init__(self, polls: int) -> None:
        self.polls, self.killed_after = polls, -1

    def poll(self) -> int | None:
        self.polls -= 1
        return 0 if self.polls < 0 else None

    def kill(self) -> None:
        self.killed_after = self.polls

    def output(self) -> str:
        return "said"


@pytest.mark.parametrize(("events", "left"), [('{"event": "ready"}\n{"event": "end"}\n', -1), ('{"event": "ready"}\n', 2)])
def test_reports_are_written_before_processes_are_ended_if_the_ranks_were_done(events: str, left: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    (tmp_path / "events.jsonl").write_text(events)
    (tmp_path / "job.json").write_text(json.dumps({"events": str(tmp_path / "events.jsonl")}))
    inner = Writing(3)
    handle = nsys._Reporting(inner, tmp_path / "job.json")
    handle.kill()
    assert (inner.killed_after, handle.output()) == (left, "said")
