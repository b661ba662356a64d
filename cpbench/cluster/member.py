"""One process of a launch: for every group of ranks that it is in, it starts the rank as a process of its own, watches it, and says how it ended.

So a rank that dies costs its group and not the launch, and every group is fresh. The first process does the same from the driver
(inside.py), all others in `Member.serve`. Groups are numbered; what is said of group 3 has names that begin with `3/`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cpbench.cluster.roster import Roster, interface_towards
from cpbench.distributed.store import Store
from cpbench.errors import INTERRUPTED, CpbenchError
from cpbench.launch import ProcessTree, end_with_parent, rank_environment

POLL_SECONDS, BEAT_SECONDS = 0.2, 1.0  # a look of one process costs the store some 50 us of a core
DEAF_SECONDS = 60.0  # longer than ending a rank takes
LOG_BYTES = 1 << 16
LAUNCHERS = ("TORCHELASTIC_", "GROUP_", "ROLE_", "PET_")  # variables of who started us, which would mislead a rank
CLOSED = "closed"


@dataclass(frozen=True)
class Order:
    """A group: its job (the text of the file), how many ranks, and where the first one awaits the others."""

    job: str
    ranks: int
    threads: int
    module: str
    address: str
    port: int


@dataclass(frozen=True)
class Report:
    """How a rank ended. `code`: of its process, if it ended by itself; `left`: the process that watched it was told to end."""

    code: int | None
    left: bool
    failure: dict[str, Any] | None
    log: str


class Rank:
    """The process of a rank, and its files in a folder of this host."""

    def __init__(self, order: Order, rank: int, roster: Roster, job: Path, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", order.module, str(job)],
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=environment_of(order, rank, roster, os.environ),
                start_new_session=True,
                preexec_fn=end_with_parent(),  # noqa: PLW1509 - it takes no lock
            )
        self._tree, self._log, self._killed = ProcessTree(self._process, log), log, False

    def code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        self._killed = self._killed or self._process.poll() is None
        self._tree.kill()

    def report(self, failure: Path, *, left: bool = False) -> Report:
        """After its end. `failure`: the file that it leaves where it raised."""
        text = self._log.read_bytes()[-LOG_BYTES:].decode("utf-8", errors="replace")
        found = None
        with contextlib.suppress(OSError, ValueError):
            found = json.loads(failure.read_text(encoding="utf-8"))
        return Report(None if self._killed else self._process.poll(), left, found, text)


def environment_of(order: Order, rank: int, roster: Roster, parent: Mapping[str, str]) -> dict[str, str]:
    """What a rank is told: its place in the group, as torchrun would say it, and the way to the other hosts."""
    seat = roster.seats[rank]
    environment = {name: value for name, value in parent.items() if not name.startswith(LAUNCHERS)}
    other = roster.elsewhere(rank)
    if other and (interface := interface_towards(other)):
        environment.setdefault("GLOO_SOCKET_IFNAME", interface)
    alone = len(parent.get("CUDA_VISIBLE_DEVICES", "").strip(",").split(",")) == 1 and bool(parent.get("CUDA_VISIBLE_DEVICES"))
    return rank_environment(environment, order.threads) | {
        "RANK": str(rank),
        "WORLD_SIZE": str(order.ranks),
        "LOCAL_RANK": "0" if alone else str(seat.local_rank),  # srun can show every process one GPU of its own, which is its first
        "LOCAL_WORLD_SIZE": str(roster.local_world_size(rank, order.ranks)),
        "MASTER_ADDR": order.address,
        "MASTER_PORT": str(order.port),
    }


def failure_file(events: Path, rank: int) -> Path:
    """Where a rank that raised says why (rank_job.py)."""
    return Path(f"{events}.rank{rank}.json")


class Member:
    """A process of a launch that is not the first."""

    def __init__(self, store: Store, roster: Roster, rank: int) -> None:
        self._store, self._roster, self._rank = store, roster, rank
        self._heard = time.monotonic()

    def serve(self) -> int:
        """Take part in groups until the first process has closed the launch. Returns the exit code. Raises CpbenchError where it is gone."""
        previous = signal.signal(signal.SIGTERM, _interrupt)
        try:
            with self._listening(), beating(self._store, self._rank):
                self._groups()
            self._store.add("gone")
        except ConnectionError as error:
            raise CpbenchError(
                f"Rank {self._rank} has lost rank 0: {error}.", "Finished cells are on rank 0's host: start the launch again with --resume."
            ) from error
        finally:
            signal.signal(signal.SIGTERM, previous)
        return 0

    def _groups(self) -> None:
        number = 1
        while self._word(CLOSED) is None:
            text = self._word(f"{number}/order")
            if text is None:
                time.sleep(POLL_SECONDS)
                continue
            order = Order(**json.loads(text))
            if self._rank < order.ranks:
                with tempfile.TemporaryDirectory(prefix="cpbench-") as folder:
                    self._run(number, order, Path(folder))
            number += 1

    def _word(self, name: str) -> str | None:
        word = self._store.get(name)
        self._heard = time.monotonic()
        return word

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """End this process where the store is deaf: a call to a host that lost power waits as long as TCP does, and cannot be interrupted."""
        over = threading.Event()

        def listen() -> None:
            while not over.wait(BEAT_SECONDS):
                if time.monotonic() - self._heard > DEAF_SECONDS:
                    sys.stderr.write(f"error: Rank {self._rank} has not heard of rank 0 for {DEAF_SECONDS:g} s.\n")
                    sys.stderr.flush()
                    os._exit(INTERRUPTED)  # its rank ends with it

        threading.Thread(target=listen, name="listen", daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def _run(self, number: int, order: Order, folder: Path) -> None:
        """The rank of one group, from start to end."""
        job, events = folder / "job.json", folder / "events.jsonl"
        job.write_text(json.dumps({**json.loads(order.job), "events": str(events)}), encoding="utf-8")
        rank, left = Rank(order, self._rank, self._roster, job, folder / "stderr.log"), True
        try:
            while rank.code() is None and self._word(f"{number}/stop") is None:
                time.sleep(POLL_SECONDS)
            left = False
        finally:
            rank.kill()
            report = rank.report(failure_file(events, self._rank), left=left)
            with contextlib.suppress(ConnectionError):
                self._store.set(f"{number}/ended/{self._rank}", json.dumps(asdict(report)))


@contextlib.contextmanager
def beating(store: Store, rank: int) -> Iterator[None]:
    """Say once a second that this process is alive; from a thread, because ending a rank can take seconds."""
    over = threading.Event()

    def beat() -> None:
        count = 0
        with contextlib.suppress(ConnectionError):
            while not over.is_set():
                store.set(f"beat/{rank}", str(count := count + 1))
                over.wait(BEAT_SECONDS)

    thread = threading.Thread(target=beat, name="beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
