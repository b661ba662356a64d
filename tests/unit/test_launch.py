"""The torchrun command line and environment, and that a tree of processes is really gone. Starts `sleep`, never torchrun."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from cpbench.launch import ProcessTree, Torchrun, _alive, rank_environment


def test_the_command_line() -> None:
    command = Torchrun().command(Path("/tmp/job.json"), 4, Path("/tmp/logs"))
    assert command == [
        *[sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "--max-restarts", "0"],
        *["--redirects", "3", "--log-dir", "/tmp/logs", "-m", "cpbench.worker", "/tmp/job.json"],
    ]
    assert Torchrun("tests.other").command(Path("j"), 1, Path("l"))[-2:] == ["tests.other", "j"]


def test_ranks_inherit_the_environment_with_their_threads_and_the_loopback_interface() -> None:
    made = rank_environment({"PATH": "/bin", "OMP_NUM_THREADS": "64"}, 3)
    assert made["PATH"] == "/bin" and made["OMP_NUM_THREADS"] == "3" and made["PYTHONUNBUFFERED"] == "1"
    assert made["GLOO_SOCKET_IFNAME"] == ("lo0" if sys.platform == "darwin" else "lo")
    assert rank_environment({"GLOO_SOCKET_IFNAME": "eth7"}, 1)["GLOO_SOCKET_IFNAME"] == "eth7"


def tree(tmp_path: Path, script: str, job: Path | None = None) -> tuple[ProcessTree, Path]:
    output = tmp_path / "out"
    with output.open("wb") as stream:
        process = subprocess.Popen([sys.executable, "-c", script], stdout=stream, start_new_session=True)
    return ProcessTree(process, output, job), output


def test_kill_ends_children_in_sessions_of_their_own(tmp_path: Path) -> None:
    script = (
        "import subprocess, time; c = subprocess.Popen(['sleep', '60'], start_new_session=True); print(c.pid, flush=True);"
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    )
    handle, output = tree(tmp_path, script)
    deadline = time.monotonic() + 10
    while not handle.output().strip() and time.monotonic() < deadline:
        time.sleep(0.01)
    child = int(output.read_text())
    assert handle.poll() is None and psutil.pid_exists(child)
    begin = time.monotonic()
    handle.kill()
    assert time.monotonic() - begin < 1.0 and handle.poll() == -9
    assert not psutil.pid_exists(child) or not _alive(psutil.Process(child))
    handle.kill()  # harmless


def test_an_ended_process_keeps_its_exit_code(tmp_path: Path) -> None:
    handle, _ = tree(tmp_path, "raise SystemExit(3)")
    deadline = time.monotonic() + 10
    while handle.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    handle.kill()
    assert handle.poll() == 3


def test_ranks_of_a_launcher_that_was_killed_are_found_by_their_job(tmp_path: Path) -> None:
    job = tmp_path / "job.json"
    rank_command = f"[sys.executable, '-c', 'import time; time.sleep(60)', {str(job)!r}]"
    script = f"import subprocess, sys, time; print(subprocess.Popen({rank_command}).pid, flush=True); time.sleep(60)"
    handle, output = tree(tmp_path, script, job)
    deadline = time.monotonic() + 20
    while not handle.output().strip() and time.monotonic() < deadline:
        time.sleep(0.01)
    rank = psutil.Process(int(output.read_text()))
    handle._process.kill()
    handle._process.wait()
    assert _alive(rank)
    handle.kill()
    assert not _alive(rank)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's parent-death signal is Linux's")
def test_the_launcher_ends_when_the_driver_is_killed(tmp_path: Path) -> None:
    script = (
        "import time, cpbench.launch as l; from pathlib import Path; l.Torchrun.command = lambda *a: ['sleep', '60'];"
        f"h = l.Torchrun().start(Path('j'), 1, 1, Path({str(tmp_path)!r})); print(h._process.pid, flush=True); time.sleep(60)"
    )
    driver = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    launcher = psutil.Process(int(driver.stdout.readline()))
    driver.kill()
    driver.wait()
    deadline = time.monotonic() + 10
    while _alive(launcher) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _alive(launcher)
    driver.stdout.close()
