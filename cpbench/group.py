"""One process group from start to end: hand it a job, pass on what rank 0 reports, and say why it ended if that was early.

The events are lines that rank 0 appends to a file; deadlines run from the last of them. What an ended group means for the sweep
(which cells go on, what is recorded) is decided in driver.py.
"""

from __future__ import annotations

import json
import re
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpbench.cell import Cell
from cpbench.errors import CpbenchError
from cpbench.launch import Handle, Launcher
from cpbench.measure.history import Owner
from cpbench.results import Status

POLL_SECONDS = 0.05
END_SECONDS = 20.0  # for torchrun to notice that a rank has failed
TAIL_LINES, TAIL_WIDTH = 40, 400
PEER_GONE = re.compile(r"Connection (closed by peer|reset by peer)|Broken pipe|DistNetworkError|DistBackendError")
SECONDARY = {signal.SIGTERM, signal.SIGABRT}  # how ranks end because another one has


@dataclass(frozen=True)
class JobCell:
    """A cell of a job; `index` names it in the events. `other`: the cell whose passes alternate with its own, if one's do."""

    index: int
    cell: Cell
    verify: bool
    other: JobCell | None = None

    def to_dict(self) -> dict[str, Any]:
        entry = {"index": self.index, "cell": self.cell.to_dict(), "verify": self.verify}
        return entry | {"other": self.other.to_dict()} if self.other else entry


@dataclass(frozen=True)
class Job:
    """What the ranks of one group do: the content of JOB.json."""

    world_size: int
    round: int
    device: str
    threads: int
    oversubscribed: bool
    cores: int
    timing: dict[str, Any]
    cell_timeout: float
    cells: tuple[JobCell, ...]
    weights: str | None = None  # the folder of the checkpoint that cells name
    prompt: tuple[int, ...] | None = None  # the tokens of the prompt that cells name
    memory_limit: int | None = None  # bytes that a rank may have
    timed: bool = True  # else nothing is measured but memory
    trace: str | None = None  # the folder for the traces of a profile
    target: dict[str, Any] | None = None  # of a projection, whose compute is measured

    def to_dict(self, events: Path) -> dict[str, Any]:
        fields = {name: value for name, value in vars(self).items() if name != "cells"}
        return {**fields, "events": str(events), "cells": [cell.to_dict() for cell in self.cells]}

    def timeout(self, index: int) -> float:
        """Seconds for the cell of this index, and for the one that is measured with it."""
        return self.cell_timeout * (2 if any(cell.index == index and cell.other for cell in self.cells) else 1)


@dataclass
class GroupFailed(Exception):  # noqa: N818 - it says what happened
    """The group ended before its job was done. `index` is the cell it was in, if it was in one."""

    status: Status
    reason: str
    index: int | None = None
    rank: int | None = None
    log_tail: tuple[str, ...] = ()
    owners: tuple[Owner, ...] = ()  # who had the memory that ran out, the largest first
    history: dict[str, Any] | None = None  # of the pass in which it did, as the rank wrote it


def run_group(launcher: Launcher, job: Job, folder: Path, start_timeout: float, check: Callable[[], None]) -> Generator[dict[str, Any], None, None]:
    """Start a group and yield its events until it has ended; whatever happens, its processes are gone afterwards.

    `check` is called at every poll and may raise. Raises GroupFailed.
    """
    events, path, logs = folder / "events.jsonl", folder / "job.json", folder / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        events.touch()
        path.write_text(json.dumps(job.to_dict(events)), encoding="utf-8")
        handle = launcher.start(path, job.world_size, job.threads, logs)
    except OSError as error:
        raise GroupFailed("crash", f"the ranks cannot be started: {error.strerror} ({error.filename or folder})") from error
    watch = _Watch(job, start_timeout, time.monotonic())
    lines = _Lines(events)
    try:
        while True:
            code = handle.poll()  # before reading: what an ended group wrote is read below
            for event in lines.new():
                watch.saw(event, time.monotonic())
                yield event
            check()  # after reading: what was finished is kept
            if watch.finished:
                return  # ranks have nothing left to say; waiting for torchrun to notice would take most of a second
            late = time.monotonic() > watch.deadline
            failed_ranks = _rank_failures(events)
            if code is not None or (late and failed_ranks):
                raise _diagnose(watch, failed_ranks, code, handle, logs)
            if late:
                handle.kill()  # so that the logs of ranks on other hosts are here
                raise watch.too_late(logs)
            if failed_ranks:
                watch.hurry(time.monotonic())
            time.sleep(POLL_SECONDS)
    finally:
        handle.kill()


@contextmanager
def group_folders() -> Iterator[Path]:
    """Where the folders of groups are while a run lasts. Raises CpbenchError where there is no room for them."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="cpbench-", ignore_cleanup_errors=True)
    except OSError as error:
        raise CpbenchError(f"No temporary folder can be made: {error.strerror}.", "Set TMPDIR to a folder that you can write.") from error
    with folder as name:
        yield Path(name)


class _Watch:
    """Where the group is, and until when something must happen."""

    def __init__(self, job: Job, start_timeout: float, now: float) -> None:
        self.job, self.start_timeout = job, start_timeout
        self.running: int | None = None
        self.seconds = 0.0  # that what is running may take
        self.ready = self.finished = self._hurried = False
        self.deadline = now + start_timeout

    def saw(self, event: dict[str, Any], now: float) -> None:
        kind = event.get("event")
        if kind == "start":
            self.running, self.seconds = event["index"], self.job.timeout(event["index"])
            self.deadline = now + self.seconds
        elif kind == "turn":
            self.running = event["index"]
        elif kind == "done":
            self.running, self.deadline = None, now + self.start_timeout
        elif kind == "ready":
            self.ready, self.deadline = True, now + self.start_timeout
        elif kind == "end":
            self.finished = True

    def hurry(self, now: float) -> None:
        """A rank has failed: the others have a moment to end, not the rest of the cell's time."""
        if not self._hurried:
            self._hurried, self.deadline = True, min(self.deadline, now + END_SECONDS)

    def too_late(self, logs: Path) -> GroupFailed:
        tail = _all_tails(logs, self.job.world_size)
        if self.running is not None:
            return GroupFailed("timeout", f"not done after {self.seconds:g} s", self.running, None, tail)
        what = "the ranks went silent between two cells" if self.ready else "the ranks were not ready"
        return GroupFailed("crash", f"{what} for {self.start_timeout:g} s", None, None, tail)


class _Lines:
    """The complete lines that were appended to a file since the last look."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0

    def new(self) -> Iterator[dict[str, Any]]:
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        complete = data[: data.rfind(b"\n") + 1]
        self._offset += len(complete)
        for line in complete.splitlines():
            try:
                event = json.loads(line, parse_constant=lambda _: None)  # NaN is no number
            except ValueError as error:
                raise GroupFailed("crash", f"rank 0 wrote an event that is not JSON: {line[:80]!r}") from error
            if isinstance(event, dict):
                yield event


def _rank_failures(events: Path) -> list[dict[str, Any]]:
    """What ranks that raised left behind, the cause first: out of memory, then what is not about a peer that is gone, then the earliest."""
    found = []
    for file in events.parent.glob(f"{events.name}.rank*.json"):
        try:
            found.append((file.stat().st_mtime_ns, json.loads(file.read_text(encoding="utf-8"))))
        except (OSError, ValueError):
            continue  # still being written: the next poll reads it
    found.sort(key=lambda item: (item[1].get("status") != "oom", bool(PEER_GONE.search(str(item[1].get("reason")))), item[0]))
    return [failure for _, failure in found]


def _diagnose(watch: _Watch, failed_ranks: list[dict[str, Any]], code: int | None, handle: Handle, logs: Path) -> GroupFailed:
    """Why a group ended: a rank that a signal killed, a rank that raised, or nothing that anyone saw."""
    first = failed_ranks[0] if failed_ranks else None
    killed = _killed_ranks(handle.output())
    if killed and not (first and first.get("status") == "oom"):
        rank, number = killed[0]
        if number not in SECONDARY or first is None:
            hint = "; often the system had no memory left" if number == signal.SIGKILL else ""
            return GroupFailed("crash", f"rank {rank} was killed by {_signal_name(number)}{hint}", watch.running, rank, _tail(logs, rank))
    if first:
        rank = int(first["rank"])
        index = first.get("index") if first.get("index") is not None else watch.running
        tail = tuple(_clean(str(line)) for line in first.get("log_tail") or [])[-TAIL_LINES:] or _tail(logs, rank)
        status: Status = "oom" if first.get("status") == "oom" else "crash"
        owners = tuple(Owner(_clean(str(owner["name"])), int(owner["bytes"])) for owner in first.get("owners") or [])
        return GroupFailed(status, _clean(str(first.get("reason") or "no reason given")), index, rank, tail, owners, first.get("history"))
    when = "" if watch.ready else " before they were ready"
    tail = _all_tails(logs, watch.job.world_size) or _last(handle.output())
    ended = f"torchrun was killed by {_signal_name(-code)}" if code is not None and code < 0 else f"the ranks ended with exit code {code}"
    return GroupFailed("crash", f"{ended}{when}", watch.running, None, tail)


def _killed_ranks(output: str) -> list[tuple[int, int]]:
    """(rank, signal) from torchrun's summary, the signals that name a cause first."""
    found = re.findall(r"rank\s*:\s*(\d+).*\n\s*exitcode\s*:\s*-(\d+)", output)
    ranks = [(int(rank), int(number)) for rank, number in found if int(number) != signal.SIGTERM]
    return sorted(ranks, key=lambda item: item[1] in SECONDARY)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _tail(logs: Path, rank: int) -> tuple[str, ...]:
    """The end of a rank's log."""
    files = sorted(logs.glob(f"**/{rank}/stderr.log"), key=lambda file: file.stat().st_mtime_ns)
    return _last(files[-1].read_text(encoding="utf-8", errors="replace")) if files else ()


def _all_tails(logs: Path, world_size: int) -> tuple[str, ...]:
    """A little of every rank's log, where nobody knows which rank it was."""
    share = max(6, TAIL_LINES // world_size)
    tails = {rank: _tail(logs, rank)[-share:] for rank in range(min(world_size, 8))}
    return tuple(f"[rank {rank}] {line}" for rank, lines in tails.items() for line in lines)


def _last(text: str) -> tuple[str, ...]:
    return tuple(_clean(line) for line in text.splitlines() if line.strip())[-TAIL_LINES:]


def _clean(line: str) -> str:
    """One line for a result file: short, and without the name of this host, which is never recorded."""
    host = socket.gethostname()
    line = line.replace(host, "<host>") if len(host) > 3 and host != "localhost" else line
    return line.rstrip()[:TAIL_WIDTH]
