"""A real profile of two ranks: files that the tools they are for can read, phases that add up, and Nsight Systems played by a script."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cpbench.reading import read
from cpbench.results import CellResult
from cpbench.tracing import spans

from .test_sweep_end_to_end import ENVIRONMENT, cpbench

PROFILE = ["profile", "--set", "device=cpu", "--model", "qwen3-tiny", "--seq", "2k", "--cp", "2", "--strategy", "ring", "--set", "timing.max_samples=5"]
KNOWN = {span.name for span in vars(spans).values() if isinstance(span, spans.Span)} | {"pass_kv"}
PLUGIN_SECONDS = 60.0
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the profile p.json, made once."""
    made = tmp_path_factory.mktemp("profile")
    done = cpbench(*PROFILE, "-o", "p.json", folder=made)
    assert done.returncode == 0, done.stderr
    assert "Phases of rank" in done.stdout
    return made


@pytest.fixture
def cell(folder: Path) -> CellResult:
    (cell,) = read(folder / "p.json").cells
    return cell


def test_phases_add_up_to_the_step_by_the_clock(cell: CellResult) -> None:
    assert cell.profile and cell.profile.steps == 2
    for rank in cell.profile.ranks:
        phases = [phase for phase in cell.profile.phases if phase.rank == rank.rank]
        assert sum(phase.time_s for phase in phases) == pytest.approx(rank.step_s, rel=0.03)
        assert rank.compute_s + rank.exposed_comm_s + rank.idle_s == pytest.approx(rank.step_s, rel=0.03)
        assert 0 < rank.exposed_comm_s <= rank.comm_s < rank.step_s


def test_phases_are_known_spans_and_the_work_is_where_it_belongs(cell: CellResult) -> None:
    assert cell.profile
    for rank in range(2):
        phases = {phase.phase: phase for phase in cell.profile.phases if phase.rank == rank}
        assert {name for path in phases if path != spans.TRACED.name for name in path.split("/")} <= KNOWN
        assert {"embed", "layer/attention/project", "layer/attention/kernel", "layer/mlp", "head"} <= set(phases)
        busiest = max(phases.values(), key=lambda phase: phase.compute_s).phase
        assert busiest in ("layer/attention/kernel", "layer/mlp", "layer/attention/project", "head")
        assert phases["layer/attention/kernel"].exposed_comm_s == 0
    assert {"aten::mm", "aten::_scaled_dot_product_flash_attention_for_cpu"} <= {kernel.name for kernel in cell.profile.kernels}


def test_traces_are_small_and_say_nothing_of_the_machine(folder: Path, cell: CellResult) -> None:
    traces = [folder / name for name in cell.artifacts if name.endswith(".pt.trace.json.gz")]
    assert [trace.relative_to(folder).as_posix() for trace in traces] == [f"p.traces/rank{rank}.pt.trace.json.gz" for rank in range(2)]
    assert sorted((folder / "p.traces").iterdir()) == traces  # tools read all that is in the folder
    assert sum(trace.stat().st_size for trace in traces) < 5 * MEGABYTE
    for number, trace in enumerate(traces):
        data = json.loads(gzip.decompress(trace.read_bytes()))
        assert data["distributedInfo"]["rank"] == number
        assert not {"host_name", "traceName"} & set(data)


def test_the_timeline_has_both_ranks(folder: Path, cell: CellResult) -> None:
    events = json.loads(gzip.decompress((folder / cell.artifacts[-1]).read_bytes()))["traceEvents"]
    names = {event["pid"]: event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert {"rank 0: CPU", "rank 1: CPU"} <= set(names.values())
    steps = {(names[event["pid"]], event["name"]) for event in events if event.get("cat") == "user_annotation" and event["name"] == spans.TRACED.name}
    assert steps == {("rank 0: CPU", spans.TRACED.name), ("rank 1: CPU", spans.TRACED.name)}


def test_tensorboard_reads_the_folder(folder: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("torch_tb_profiler") is None:
        pytest.skip("TENSORBOARD WAS NOT ASKED: torch-tb-profiler is not installed, the extra `tensorboard` brings it")
    with _tensorboard(folder / "p.traces", tmp_path / "log") as ask:
        (run,) = ask("runs")["runs"]
        assert {"Overview", "Operator", "Trace", "Distributed"} <= set(ask("views", run=run))
        assert ask("workers", run=run, view="Overview") == ["rank0", "rank1"]
        overview = ask("overview", run=run, worker="rank0", span="default")
        assert [row[0] for row in overview["steps"]["rows"]] == ["1", "2"]
        overlap = ask("distributed/overlap", run=run, worker="All", span="default")
        assert set(overlap["data"]["all"]) == {"rank0", "rank1"}


@contextmanager
def _tensorboard(folder: Path, log: Path) -> Iterator[Any]:
    """TensorBoard on a free port, ready; yields a function that asks PyTorch's plugin."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1", "--port", str(port), "--load_fast=false"]
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)

    def ask(what: str, **query: str) -> Any:
        address = f"http://127.0.0.1:{port}/data/plugin/pytorch_profiler/{what}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(address, timeout=20) as answer:
            return json.loads(answer.read())

    def is_ready() -> bool:
        try:
            known = ask("runs")
        except OSError:  # not listening yet
            return False
        return bool(known["runs"]) and not known["loading"]

    try:
        deadline = time.monotonic() + PLUGIN_SECONDS
        while not is_ready():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.3)
        yield ask
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_holistic_trace_analysis_reads_the_folder(folder: Path) -> None:
    if importlib.util.find_spec("hta") is None:
        pytest.skip("HOLISTIC TRACE ANALYSIS WAS NOT ASKED: it is not installed")
    from hta.trace_analysis import TraceAnalysis

    files = {rank: str(folder / "p.traces" / f"rank{rank}.pt.trace.json.gz") for rank in range(2)}
    assert set(TraceAnalysis(trace_files=files).t.traces) == {0, 1}


NSYS = """#!{python}
import os, sys
if sys.argv[1] == "profile":
    flags = [word for word in sys.argv[2:] if word.startswith("--")]
    command = sys.argv[2 + len(flags):]
    output = next(word for word in flags if word.startswith("--output=")).removeprefix("--output=").replace("%q{{RANK}}", os.environ["RANK"])
    pid = os.fork()
    if pid == 0:
        os.environ["NVTX_INJECTION64_PATH"] = "/nowhere/libToolsInjection64.so"
        os.execvp(command[0], command)
    _, status = os.waitpid(pid, 0)
    import time
    time.sleep(1.0)
    open(output + ".nsys-rep", "w").write(" ".join(flags))
    sys.exit(os.waitstatus_to_exitcode(status))
print("Processing [" + sys.argv[-1] + "]...")
print("Time (%),Total Time (ns),Instances,Avg (ns),Med (ns),Min (ns),Max (ns),StdDev (ns),Style,Range")
print("90.0,2000000,1,2000000.0,2000000.0,2000000,2000000,0.0,PushPop,cpbench:harness/traced")
"""


def test_under_nsight_systems_every_rank_leaves_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script writes its report a moment after the rank has ended, as nsys does: nobody may end it before."""
    script = tmp_path / "bin" / "nsys"
    script.parent.mkdir()
    script.write_text(NSYS.format(python=sys.executable))
    script.chmod(0o755)
    monkeypatch.setitem(ENVIRONMENT, "PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    done = cpbench(*PROFILE, "--nsys", "-o", "n.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (cell,) = read(tmp_path / "n.json").cells
    assert cell.profile and (cell.profile.tool, cell.profile.steps, cell.profile.phases) == ("nsys", 1, [])
    assert [(one.range, one.rank, one.seconds) for one in cell.profile.nvtx] == [("harness/traced", rank, pytest.approx(2e-3)) for rank in range(2)]
    memory, reports = ["n.memory/rank0.json", "n.memory/rank1.json", "n.memory/memory.svg"], ["n.traces/rank0.nsys-rep", "n.traces/rank1.nsys-rep"]
    assert cell.artifacts == [*memory, *reports]
    assert all("--nvtx-capture=harness/traced@cpbench" in (tmp_path / name).read_text() for name in reports)
    assert not cell.warnings or all("profile" not in warning for warning in cell.warnings)
