"""The fault matrix: what can happen to a sweep, and what must come of it. The test runs each line once, benchmarks/fault_matrix.py often.

A line is a real command with real processes: two ranks, and three cells of which the second meets the fault. It passes if the exit code is
right, every finished cell is on disk with its status, the record or the message says what happened, and neither a process nor a lock is left.
"""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from cpbench.reading import read

ROOT = Path(__file__).parents[2]
CELLS = ("allgather", "ring", "ulysses")
QUICK = ("baseline=false", "timing.min_samples=1", "timing.max_samples=1", "device=cpu")
COMMAND = ["sweep", "--seq", "64", "--cp", "2", "--strategy", ",".join(CELLS), *(part for setting in QUICK for part in ("--set", setting))]
LINE_SECONDS = 300.0  # for one command
END_SECONDS = 20.0  # for the ranks of a driver that was killed
MARK = "FAULT_MATRIX_LINE"  # in the environment of every process of a line


@dataclass(frozen=True)
class Fault:
    """`plant` is what faulty_driver.py and faulty_worker.py know it by. `statuses` are those of the cells on disk, `says` what is told of it."""

    name: str
    plant: str
    exit_code: int
    statuses: str
    says: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    continued: bool = False  # whether --resume then measures the rest


FAULTS = (
    Fault("exception on one rank", "raise", 5, "ok crash ok", ("RuntimeError: planted fault", "faulty_worker")),
    Fault("SIGKILL of one rank", "kill", 5, "ok crash ok", ("rank 1 was killed by SIGKILL",)),
    Fault("SIGKILL of torchrun", "kill torchrun", 5, "ok crash ok", ("torchrun was killed by SIGKILL",)),
    Fault("SIGKILL of the driver", "kill the driver", -9, "ok", continued=True),
    Fault("hang in a collective", "hang", 5, "ok timeout ok", ("not done after 15 s", "in faulty"), ("--cell-timeout", "15s")),
    Fault("out of memory on one rank", "oom", 5, "ok oom ok", ("rank 1 ran out of memory",)),
    Fault("wrong numbers", "wrong", 5, "ok wrong ok", ("ignores the tokens of other ranks",)),
    Fault("wrong traffic", "traffic", 5, "ok wrong ok", ("traffic differs from its formula",)),
    Fault("port taken", "port", 0, "ok ok ok", ("before they were ready; trying once more",)),
    Fault("disk full", "disk full", 5, "ok", ("The result cannot be written",)),
    Fault("read-only folder", "read-only", 2, "", ("cannot be written",)),
    Fault("Ctrl-C while planning", "ctrl-c in planning", 130, ""),
    Fault("Ctrl-C while ranks start", "ctrl-c in a start", 130, "interrupted interrupted interrupted"),
    Fault("Ctrl-C between two cells", "ctrl-c between cells", 130, "ok interrupted interrupted"),
    Fault("Ctrl-C in verification", "ctrl-c in verification", 130, "ok interrupted interrupted"),
    Fault("Ctrl-C in a timed pass", "ctrl-c in timing", 130, "ok interrupted interrupted"),
    Fault("the clock jumps", "clock", 0, "ok ok ok"),
    Fault("two sweeps into one file", "two sweeps", 0, "ok ok ok", ("exit code 2", "r.json", "exists", "being written by another cpbench")),
)


@dataclass(frozen=True)
class Outcome:
    """What came of a line. `problems` is empty where it passed."""

    seconds: float
    exit_code: int
    statuses: str
    processes: int
    locks: int
    problems: tuple[str, ...]


def run_fault(fault: Fault, folder: Path) -> Outcome:
    """Run one line of the matrix; its files are below `folder`."""
    output, mark = folder / "results" / "r.json", uuid.uuid4().hex
    output.parent.mkdir()
    begin = time.monotonic()
    code, text = _command([sys.executable, "-m", "tests.dist.faulty_driver", fault.plant, *COMMAND, *fault.limits, "-o", str(output)], folder, mark)
    processes = _left_processes(mark)
    locks = sum(map(_is_locked, output.parent.glob("*.jsonl"))) + sum(1 for _ in output.parent.glob(".*"))
    seconds = time.monotonic() - begin
    file = output if output.exists() else output.with_suffix(".jsonl")
    cells = read(file).cells if file.exists() else []
    statuses = " ".join(cell.status for cell in cells)
    told = "\n".join([text, *(cell.reason or "" for cell in cells), *(line for cell in cells if cell.failure for line in cell.failure.log_tail)])
    times = [sample for cell in cells for metric in cell.metrics.values() if metric.unit == "s" for one in metric.rounds for sample in one]
    checks = {
        f"exit code {code}, not {fault.exit_code}": code == fault.exit_code,
        f"cells on disk: {statuses or 'none'}, not {fault.statuses or 'none'}": statuses == fault.statuses,
        f"nothing says {[words for words in fault.says if words not in told]}": all(words in told for words in fault.says),
        "a traceback": "Traceback" not in text,
        f"{len(processes)} processes left": not processes,
        f"{locks} locks left": locks == 0,
        f"times {times}": all(0 < sample < seconds for sample in times) and all(bool(cell.metrics) == (cell.status == "ok") for cell in cells),
    }
    if fault.continued:
        code, text = _command([sys.executable, "-m", "cpbench", "sweep", "--resume", "-o", str(output)], folder, mark)
        rest = [cell.status for cell in read(output).cells] if output.exists() else []
        checks[f"continued with exit code {code} and {rest}: {text[-300:]}"] = code == 0 and rest == ["ok"] * len(CELLS)
    problems = tuple(problem for problem, fine in checks.items() if not fine)
    return Outcome(seconds, code if not fault.continued else fault.exit_code, statuses, len(processes), locks, problems)


def _command(command: list[str], folder: Path, mark: str) -> tuple[int, str]:
    """Exit code and all that was printed. The command has a session of its own, as in a terminal of its own."""
    environment = os.environ | {MARK: mark, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    with (folder / "printed.txt").open("w+b") as printed:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=printed, stderr=printed, start_new_session=True)
        try:
            code = process.wait(LINE_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            code = process.wait()
        printed.seek(0)
        return code, printed.read().decode(errors="replace")


def _left_processes(mark: str) -> list[psutil.Process]:
    """Those that are still there after the time to end. They are ended now."""
    deadline = time.monotonic() + END_SECONDS
    while (left := list(_marked(mark))) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process in left:
        process.kill()
    return left


def _marked(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == mark:
                yield process
        except (psutil.Error, OSError):
            continue  # it has ended, or is somebody else's


def _is_locked(file: Path) -> bool:
    with file.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
