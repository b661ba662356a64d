"""The command line with one planted fault: `python -m tests.dist.faulty_driver FAULT ARGUMENTS`. Its ranks are those of faulty_worker.py."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cpbench import cli, driver, plan
from cpbench.journal import Journal
from cpbench.launch import Torchrun

DAC_OVERRIDE = 1 << 1  # the capability by which root writes where modes forbid it
CAPABILITIES = 0x20080522  # version 3
ROOM = 100  # bytes that are left on a full disk


class PortTaken(Torchrun):
    """At its first start the port of the rendezvous is somebody else's."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.others = [socket.create_server(("127.0.0.1", 0))]

    def command(self, job: Path, world_size: int, log_dir: Path) -> list[str]:
        command = super().command(job, world_size, log_dir)
        if not self.others:
            return command
        port = self.others.pop().detach()  # open until the process ends
        number = socket.socket(fileno=os.dup(port)).getsockname()[1]
        place = command.index("--standalone")
        return [*command[:place], "--nnodes", "1", "--master-addr", "127.0.0.1", "--master-port", str(number), *command[place + 1 :]]


def after_the_first_cell(act: Any, add_cell: Any = Journal.add_cell) -> None:
    """Do something once the first cell is on disk."""
    cells = []

    def add(journal: Journal, cell: Any) -> None:
        add_cell(journal, cell)
        cells.append(cell)
        if len(cells) == 1:
            act(journal)

    Journal.add_cell = add  # type: ignore[method-assign]


def fill_the_disk(journal: Journal) -> None:
    """Files of this process may not grow beyond what the journal has now, and a little."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (journal.path.stat().st_size + ROOM, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def start_another(arguments: list[str]) -> None:
    """The same sweep again, and its continuation, while this one runs."""
    for again in (arguments, ["sweep", "--resume", *arguments[-2:]]):
        done = subprocess.run([sys.executable, "-m", "cpbench", *again], capture_output=True, text=True, check=False)
        print(f"exit code {done.returncode}: {done.stderr}", file=sys.stderr)


def make_read_only(folder: Path) -> None:
    """For this process too where it is root's."""
    folder.chmod(0o555)
    if os.geteuid() == 0:
        head, sets = (ctypes.c_uint32 * 2)(CAPABILITIES, 0), (ctypes.c_uint32 * 6)()
        libc = ctypes.CDLL(None)
        libc.capget(head, sets)
        sets[0] &= ~DAC_OVERRIDE
        libc.capset(head, sets)


def interrupt_planning(make_plan: Any = plan.make_plan) -> None:
    def make(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return make_plan(*arguments)

    plan.make_plan = make


def main(fault: str, arguments: list[str]) -> int:
    from tests.dist.faulty_worker import JumpingClock

    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal; what a script starts in the background ignores it
    if fault == "ctrl-c in planning":
        interrupt_planning()
    if fault == "disk full":
        after_the_first_cell(fill_the_disk)
    if fault == "two sweeps":
        after_the_first_cell(lambda _: start_another(arguments))
    if fault == "read-only":
        make_read_only(Path(arguments[-1]).parent)
    if fault == "clock":
        time.time = JumpingClock()
    launcher = PortTaken if fault == "port" else Torchrun
    ranks = ("tests.dist.faulty_worker", {"FAULT": fault, "DRIVER": str(os.getpid())})
    driver.Torchrun = lambda: launcher(*ranks)  # type: ignore[assignment,misc]
    return cli.run(arguments)


if __name__ == "__main__":
    os.environ["FAULT"] = sys.argv[1]
    sys.exit(main(sys.argv[1], sys.argv[2:]))
