"""Where processes meet: whether somebody listens, PyTorch's TCPStore of texts, in which the processes of a launch leave words for one another, and
its FileStore, by which those of one machine that have no process group wait for each other.

What the words are is decided in cluster/. No call of a store waits, and each raises ConnectionError where it is gone.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from torch._C._distributed_c10d import FileStore, PrefixStore, TCPStore

from cpbench.errors import CpbenchError

MEET_SECONDS = 60.0  # for the first rank of a group to listen; its process may still be importing
ANSWER_SECONDS = 30.0  # a store that says nothing for so long is gone
WORK = timedelta(days=1)  # what a process of a meeting may do before it comes; who starts them has a deadline of its own
Value = TypeVar("Value")


class Store:
    """Texts by name, for all processes that are connected."""

    def __init__(self, store: Any) -> None:
        self._store = store

    def set(self, name: str, text: str) -> None:
        self._ask(lambda: self._store.set(name, text))

    def get(self, name: str) -> str | None:
        """None where nobody has set it yet."""
        found: bytes | None = self._ask(lambda: self._store.get(name) if self._store.check([name]) else None)
        return None if found is None else found.decode("utf-8")

    def add(self, name: str) -> int:
        """Count one more of this name; how many there are with it."""
        return int(self._ask(lambda: self._store.add(name, 1)))

    def _ask(self, call: Callable[[], Value]) -> Value:
        try:
            return call()
        except RuntimeError as error:  # what torch's errors of stores are
            raise ConnectionError(str(error).splitlines()[0]) from error


def connect(address: str, port: int, *, serve: bool, seconds: float) -> Store:
    """The store at an address, opened here or awaited for so many seconds. Raises CpbenchError where it cannot be."""
    try:
        store = TCPStore(address, port, None, serve, timedelta(seconds=seconds), wait_for_workers=False)
    except (RuntimeError, ValueError) as error:
        text = str(error)
        if serve:
            taken = "EADDRINUSE" in text or "in use" in text
            raise CpbenchError(
                f"Port {port} {'is in use on' if taken else 'cannot be opened on'} the host of rank 0.",
                "Set MASTER_PORT to another port, the same for all ranks.",
            ) from error
        raise CpbenchError(
            f"The host of rank 0 cannot be reached at {address}:{port} within {seconds:g} s.",
            f"It must be up and accept connections there: check MASTER_ADDR and MASTER_PORT, the firewall, and that every node knows {address}.",
        ) from error
    store.set_timeout(timedelta(seconds=ANSWER_SECONDS))
    return Store(PrefixStore("cpbench", store))


class Meeting:
    """So many processes of one machine, which wait for each other over a file that they can all write to."""

    def __init__(self, path: Path, size: int) -> None:
        self._store, self._size, self._met = FileStore(str(path), size), size, 0
        self._store.set_timeout(WORK)

    def wait(self) -> None:
        """Return when every process has called so often."""
        self._met += 1
        there = f"met {self._met}"
        if self._store.add(f"come {self._met}", 1) == self._size:
            self._store.set(there, "")
        self._store.wait([there])


def await_listener(address: str, port: int, seconds: float = MEET_SECONDS) -> None:
    """Wait until somebody listens there, which torch itself does for half an hour. Raises ConnectionError that says what was tried."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            with socket.create_connection((address, port), timeout=max(0.1, deadline - time.monotonic())):
                return
        except OSError as error:
            if time.monotonic() >= deadline:
                why = error.strerror or str(error)
                raise ConnectionError(f"cannot meet the other ranks at {address}:{port}, whose ports must be open to all nodes ({why})") from error
            time.sleep(0.05)
