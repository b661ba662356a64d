"""Profiling under Nsight Systems: the command lines, one report per rank, and the NVTX summary that `nsys stats` makes of a report.

Ranks run as ever, each below an `nsys profile` of its own that records from the begin of the traced steps to their end. What NVTX ranges
are called is decided in spans.py; the reports themselves are for the Nsight Systems GUI.
"""

from __future__ import annotations

import csv
import io
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from cpbench.errors import CpbenchError
from cpbench.launch import Handle, Torchrun
from cpbench.tracing.record import NvtxRange, Profile
from cpbench.tracing.spans import DOMAIN, TRACED

REPORT_SECONDS = 120.0  # for nsys to write its report after the rank has ended
POLL_SECONDS = 0.1
RANGE, CALLS, TOTAL, ON_GPU = "Range", "Instances", "Total Time (ns)", "Total Proj Time (ns)"
CAPTURE = {
    "cuda": ("--trace=cuda,nvtx", "--capture-range=cudaProfilerApi"),
    "cpu": ("--trace=nvtx,osrt", "--capture-range=nvtx", f"--nvtx-capture={TRACED.name}@{DOMAIN}", "--env-var=NSYS_NVTX_PROFILER_REGISTER_ONLY=0"),
}


def profile_command(folder: Path, device: str) -> list[str]:
    """What stands before the command line of every rank."""
    flags = [*CAPTURE[device], "--sample=none", "--cpuctxsw=none", "--capture-range-end=stop", "--force-overwrite=true"]
    return ["nsys", "profile", *flags, f"--output={folder}/rank%q{{RANK}}"]


def report(folder: Path, rank: int) -> Path:
    """The report of a rank."""
    return folder / f"rank{rank}.nsys-rep"


def launcher(folder: Path, device: str, world_size: int) -> Nsys:
    """Starts ranks under Nsight Systems. Raises CpbenchError with the command line where it is not installed."""
    made = Nsys(profile_command(folder, device))
    if shutil.which("nsys") is None:
        line = shlex.join(["torchrun", *made.command(Path("JOB.json"), world_size, Path("LOGS"))[3:]])
        raise CpbenchError("Nsight Systems (nsys) is not on the PATH.", f"Put it there, or leave --nsys out. What it would run: {line}")
    return made


class Nsys(Torchrun):
    """torchrun whose ranks run below another command."""

    def __init__(self, prefix: list[str]) -> None:
        super().__init__()
        self.prefix = prefix

    def command(self, job: Path, world_size: int, log_dir: Path) -> list[str]:
        *launcher, _, module, path = super().command(job, world_size, log_dir)
        return [*launcher, "--no-python", *self.prefix, sys.executable, "-m", module, path]

    def start(self, job: Path, world_size: int, threads: int, log_dir: Path) -> Handle:
        return _Reporting(super().start(job, world_size, threads, log_dir), job)


class _Reporting:
    """Processes that may write their reports before they are ended, if their ranks were done."""

    def __init__(self, handle: Handle, job: Path) -> None:
        self._handle, self._job = handle, job

    def poll(self) -> int | None:
        return self._handle.poll()

    def output(self) -> str:
        return self._handle.output()

    def kill(self) -> None:
        deadline = time.monotonic() + (REPORT_SECONDS if self._done() else 0)
        while self._handle.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        self._handle.kill()

    def _done(self) -> bool:
        events = Path(json.loads(self._job.read_text(encoding="utf-8"))["events"])
        return '{"event": "end"}' in events.read_text(encoding="utf-8")


def ranges_of(file: Path, rank: int, device: str) -> list[NvtxRange]:
    """The ranges of our domain in a report, those that took longest first. Raises CpbenchError where nsys cannot say."""
    if not file.exists():
        raise CpbenchError(f"nsys left no {file.name}", "See what it says when it runs by hand.")
    on_gpu = {range_: nanoseconds for range_, _, nanoseconds in _rows(_stats(file, "nvtx_gpu_proj_sum"), ON_GPU)} if device == "cuda" else {}
    found = [
        NvtxRange(range=name, rank=rank, calls=calls, seconds=total / 1e9, gpu_seconds=on_gpu[name] / 1e9 if name in on_gpu else None)
        for name, calls, total in _rows(_stats(file, "nvtx_sum"), TOTAL)
    ]
    return sorted(found, key=lambda one: -one.seconds)


def profile_of(ranges: Iterable[NvtxRange]) -> Profile:
    """What of a profile Nsight Systems knows. On CPU it captures the first traced step only."""
    ranges = list(ranges)
    steps = [one.calls for one in ranges if one.range == TRACED.name]
    if not steps:
        raise CpbenchError(f"the reports of nsys have no range {DOMAIN}:{TRACED.name}", "Is the nvtx package installed?")
    return Profile(tool="nsys", steps=min(steps), nvtx=ranges)


def _stats(file: Path, name: str) -> str:
    with tempfile.TemporaryDirectory(prefix="cpbench-") as folder:  # else the database would lie among the reports
        command = ["nsys", "stats", f"--report={name}", "--format=csv", f"--sqlite={folder}/{file.stem}.sqlite", "--force-export=true", str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise CpbenchError(f"nsys stats ended with exit code {done.returncode}: {' '.join(last)}", f"Run it by hand: {shlex.join(command)}.")
    return done.stdout


def _rows(text: str, column: str) -> Iterator[tuple[str, int, int]]:
    """(path, calls, nanoseconds) of the ranges of our domain. What nsys says before the header is not CSV."""
    lines = text.splitlines()
    header = next((number for number, line in enumerate(lines) if RANGE in line and column in line), len(lines))
    for row in csv.DictReader(io.StringIO("\n".join(lines[header:]))):
        domain, _, path = (row[RANGE] or "").strip().partition(":")
        if domain == DOMAIN and path:
            calls = next(value for name, value in row.items() if name.endswith(CALLS))
            yield path, int(calls), int(float(row[column]))
