"""Launches that are not cpbench's own, for tests: two hosts as network namespaces under torchrun, and processes told as by srun."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
ADDRESSES = ("10.213.77.1", "10.213.77.2")
SECONDS = 240.0  # a launch imports torch in every process, on two cores that others use too


class Hosts:
    """Two network namespaces that a cable joins."""

    def __init__(self) -> None:
        self.names = tuple(f"cpbench{os.getpid()}{side}" for side in "ab")
        self.cables = tuple(f"cpb{os.getpid() % 100_000}{side}" for side in "ab")

    def command(self, host: int, *arguments: str) -> list[str]:
        return ["ip", "netns", "exec", self.names[host], *arguments]

    def torchrun(self, host: int, *arguments: str) -> list[str]:
        rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29400", "--rdzv-id", "two"]
        rendezvous += ["--rdzv-conf", f"is_host={int(host == 0)}"]  # this machine's name leads to neither namespace
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--local-addr", ADDRESSES[host]]
        return self.command(host, *launcher, *rendezvous, "-m", "cpbench", *arguments)

    def die(self, host: int) -> None:
        """As power loss: the network is silent from one moment to the next, and then nothing runs any more."""
        ip("-n", self.names[host], "link", "set", self.cables[host], "down")
        for pid in subprocess.run(["ip", "netns", "pids", self.names[host]], capture_output=True, text=True, check=True).stdout.split():
            psutil.Process(int(pid)).kill()

    def up(self, host: int) -> None:
        ip("-n", self.names[host], "link", "set", self.cables[host], "up")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Raises OSError or CalledProcessError where namespaces are not permitted."""
    hosts = Hosts()
    try:
        for name in hosts.names:
            ip("netns", "add", name)
        ip("link", "add", hosts.cables[0], "netns", hosts.names[0], "type", "veth", "peer", "name", hosts.cables[1], "netns", hosts.names[1])
        for name, cable, address in zip(hosts.names, hosts.cables, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
            for link in ("lo", cable):
                ip("-n", name, "link", "set", link, "up")
        yield hosts
    finally:
        for name in hosts.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def srun(rank: int, ranks: int, port: int, *, node: int = 0) -> dict[str, str]:
    """What srun would say to one of `ranks` tasks on this machine."""
    told = {"SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": ranks, "SLURM_LOCALID": rank, "SLURM_NODEID": node, "MASTER_PORT": port}
    return {"SLURM_STEP_NODELIST": "localhost", **{name: str(value) for name, value in told.items()}}


@contextmanager
def started(*commands: tuple[list[str], dict[str, str]], folder: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes side by side, each in a folder of its own (`folder`/0, 1, ...) with its output in `log`; none of them is left afterwards."""
    processes = []
    try:
        for number, (command, environment) in enumerate(commands):
            mine = folder / str(number)
            mine.mkdir(exist_ok=True)
            places = {"PYTHONPATH": str(ROOT), "TMPDIR": str(mine), "COLUMNS": "200"}
            with (mine / "log").open("w") as log:
                processes.append(subprocess.Popen(command, cwd=mine, env=os.environ | places | environment, stdout=log, stderr=subprocess.STDOUT, text=True))
        yield processes
    finally:
        for process in processes:
            if process.poll() is None:
                for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                    one.kill()
            process.wait()


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def timed_passes(folder: Path, index: int) -> int:
    """Passes of a cell that the driver in this folder has been told of by now, in all groups."""
    return sum(file.read_text().count(f'"event": "sample", "index": {index},') for file in folder.glob("cpbench-*/*/events.jsonl"))
