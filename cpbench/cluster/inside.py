"""The driver's side of a launch that it is inside of: groups of ranks on processes that are there, behind the same interface as torchrun.

The job of a group goes through the store, so the hosts share no files; what ranks elsewhere leave (failures, logs) is put where the
driver looks for it. A process that has said nothing for some seconds is lost, and with it the launch: `LostRank` says so.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import count
from pathlib import Path

from cpbench.cluster.member import CLOSED, Order, Rank, Report, failure_file
from cpbench.cluster.roster import Roster
from cpbench.distributed.store import Store
from cpbench.launch import LostRank

LOOK_SECONDS, SILENT_SECONDS = 0.2, 15.0
KILL_SECONDS, CLOSE_SECONDS = 10.0, 5.0


class Inside:
    """Starts groups on the processes of a launch; `module` is what their ranks run."""

    def __init__(self, store: Store, roster: Roster, numbers: Iterator[int], module: str) -> None:
        self._store, self._roster, self._numbers, self._module = store, roster, numbers, module

    def start(self, job: Path, world_size: int, threads: int, log_dir: Path) -> Group:
        """The first ranks of the launch; the others wait. Raises LostRank where the store is gone."""
        number = next(self._numbers)
        order = Order(job.read_text(encoding="utf-8"), world_size, threads, self._module, self._roster.seats[0].address, free_port())
        try:
            self._store.set(f"{number}/order", json.dumps(asdict(order)))
        except ConnectionError as error:
            raise _store_gone(error) from error
        own = Rank(order, 0, self._roster, job, log_dir / "0" / "stderr.log")
        return Group(self._store, number, world_size, own, job, log_dir)


class Group:
    """A group on the processes of a launch: the handle that the driver polls."""

    def __init__(self, store: Store, number: int, ranks: int, own: Rank, job: Path, log_dir: Path) -> None:
        self._store, self._number, self._own, self._log_dir = store, number, own, log_dir
        self._events = Path(json.loads(job.read_text(encoding="utf-8"))["events"])
        self._open = set(range(ranks))  # ranks that have not ended
        self._reports: dict[int, Report] = {}
        self._pulse = {rank: ("", time.monotonic()) for rank in range(1, ranks)}  # the last beat, and when it was new
        self._next_look = 0.0
        self._stopping = False

    def poll(self) -> int | None:
        """None while a rank runs; then 0, or 1 where one failed. Raises LostRank."""
        try:
            return self._poll()
        except ConnectionError as error:
            raise _store_gone(error) from error

    def kill(self) -> None:
        """End every rank, and return when all of them say that they have ended, or some are lost."""
        self._own.kill()
        deadline = time.monotonic() + KILL_SECONDS
        try:
            self._stop()
            while self._open and time.monotonic() < deadline and not self._lost():
                self._look()
                time.sleep(0.02 if self._open else 0)
        except ConnectionError:
            return  # nobody to be told; ranks end with the processes that watch them

    def output(self) -> str:
        """Ranks that a signal ended, in the words of torchrun's summary, which group.py reads."""
        killed = [(rank, report.code) for rank, report in self._reports.items() if report.code is not None and report.code < 0]
        return "".join(f"  rank      : {rank}\n  exitcode  : {code}\n" for rank, code in killed)

    def _poll(self) -> int | None:
        if self._open and time.monotonic() >= self._next_look:
            self._look()
            self._next_look = time.monotonic() + LOOK_SECONDS
            failed = [rank for rank, report in self._reports.items() if report.code]
            gone = [rank for rank, report in self._reports.items() if report.left]
            if gone:
                raise LostRank(f"rank {gone[0]} was ended from outside")
            if failed:
                self._stop()  # the others would wait for a peer that is gone
            if self._open and (lost := self._lost()):
                raise LostRank(f"rank {lost[0]} has not been heard of for {SILENT_SECONDS:g} s")
        if self._open:
            return None
        return int(any(report.code != 0 for report in self._reports.values()))

    def _look(self) -> None:
        """Take note of ranks that have ended, and of signs of life."""
        if 0 in self._open and self._own.code() is not None:
            self._reports[0] = self._own.report(failure_file(self._events, 0))
            self._open.discard(0)
        now = time.monotonic()
        for rank in sorted(self._open - {0}):
            if text := self._store.get(f"{self._number}/ended/{rank}"):
                self._ended(rank, Report(**json.loads(text)))
                continue
            beat = self._store.get(f"beat/{rank}") or ""
            if beat != self._pulse[rank][0]:
                self._pulse[rank] = beat, now

    def _ended(self, rank: int, report: Report) -> None:
        """Put what a rank elsewhere left where ranks of this host put it."""
        self._reports[rank] = report
        self._open.discard(rank)
        log = self._log_dir / str(rank) / "stderr.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(report.log, encoding="utf-8")
        if report.failure is not None:
            file = failure_file(self._events, rank)
            file.with_suffix(".part").write_text(json.dumps(report.failure), encoding="utf-8")
            file.with_suffix(".part").replace(file)

    def _lost(self) -> list[int]:
        """Ranks whose process has been silent for too long."""
        now = time.monotonic()
        return [rank for rank in sorted(self._open - {0}) if now - self._pulse[rank][1] > SILENT_SECONDS]

    def _stop(self) -> None:
        if not self._stopping:
            self._store.set(f"{self._number}/stop", "1")
            self._stopping = True
        self._own.kill()


class Launch:
    """The launch as its first process knows it (launch.py says who asks)."""

    def __init__(self, store: Store, roster: Roster) -> None:
        self._store, self._roster, self._numbers = store, roster, count(1)
        self.nodes, self.ranks_per_node = roster.nodes, roster.ranks_per_node

    def launcher(self, module: str) -> Inside:
        return Inside(self._store, self._roster, self._numbers, module)

    def close(self) -> None:
        """Send the other processes home, and wait a moment: where this one holds the store, they could not read that they may go."""
        try:
            self._store.set(CLOSED, "1")
            deadline, others = time.monotonic() + CLOSE_SECONDS, len(self._roster.seats) - 1
            while int(self._store.get("gone") or 0) < others and time.monotonic() < deadline:
                time.sleep(0.05)
        except ConnectionError:
            return  # they have ended with the store


def free_port() -> int:
    """A port of this host that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _store_gone(error: ConnectionError) -> LostRank:
    return LostRank(f"the launcher's store is gone ({error})")
