"""Starting the ranks of one world size, and ending all of them: the torchrun command line behind a small interface.

Nothing here knows what the ranks do. `Launcher` is a protocol, so that the driver is tested without processes and a test can start
another worker module. Inside a launch that somebody else has started, its processes are the ranks (cluster/).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import cpbench
from cpbench.errors import INTERRUPTED, CpbenchError

if TYPE_CHECKING:
    import psutil

PR_SET_PDEATHSIG = 1
KILL_SECONDS = 10.0
WORKER = "cpbench.worker"


class LostRank(CpbenchError):  # noqa: N818 - it says what happened
    """A process of the launch that this one is inside of has gone: nothing more can be measured in it."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"The launch is over: {reason}.", "What has finished is kept: start the launch again, and continue with --resume.", INTERRUPTED)
        self.reason = reason


class Handle(Protocol):
    """The processes of one world size."""

    def poll(self) -> int | None:
        """None while it runs, then the exit code."""

    def kill(self) -> None:
        """End every process of it now, and return when they are gone. Harmless where they have ended."""

    def output(self) -> str:
        """What the launcher itself printed (the ranks print to files in the log folder)."""


class Launcher(Protocol):
    """Starts ranks. Logs of a rank go to `log_dir/**/<rank>/stderr.log`."""

    def start(self, job: Path, world_size: int, threads: int, log_dir: Path) -> Handle: ...


class Launch(Protocol):
    """A launch of several processes that this one is the first of."""

    nodes: int
    ranks_per_node: int

    def launcher(self, module: str) -> Launcher:
        """What starts groups of ranks on its processes."""


LAUNCH: ContextVar[Launch | None] = ContextVar("launch", default=None)


def inside_launch(module: str = WORKER) -> Launcher | None:
    """What starts ranks on the processes of the launch that this one is inside of; None where it is in none."""
    launch = LAUNCH.get()
    return launch.launcher(module) if launch else None


class Torchrun:
    """`python -m torch.distributed.run --standalone`, one process per rank on this machine."""

    def __init__(self, module: str = WORKER, environment: Mapping[str, str] | None = None) -> None:
        self.module = module
        self.environment = dict(environment or {})

    def command(self, job: Path, world_size: int, log_dir: Path) -> list[str]:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size), "--max-restarts", "0"]
        return [*launcher, "--redirects", "3", "--log-dir", str(log_dir), "-m", self.module, str(job)]

    def start(self, job: Path, world_size: int, threads: int, log_dir: Path) -> Handle:
        log_dir.mkdir(parents=True, exist_ok=True)
        output = log_dir / "launcher.log"
        with output.open("wb") as stream:
            process = subprocess.Popen(
                self.command(job, world_size, log_dir),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env=rank_environment(os.environ, threads) | self.environment,
                start_new_session=True,  # Ctrl-C reaches the driver only, which then ends the ranks
                preexec_fn=end_with_parent(),  # noqa: PLW1509 - it takes no lock, so threads of the display cannot block it
            )
        return ProcessTree(process, output, job)


class ProcessTree:
    """A started launcher and everything below it."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path, job: Path | None = None) -> None:
        self._process = process
        self._output = output
        self._job = job  # in the command line of every rank

    def poll(self) -> int | None:
        return self._process.poll()

    def output(self) -> str:
        return self._output.read_text(encoding="utf-8", errors="replace") if self._output.exists() else ""

    def kill(self) -> None:
        """torchrun gives every rank its own session, so killing a process group is not enough: the tree is stopped, listed, and killed."""
        code = self._process.poll()
        if code is not None and code >= 0:
            return  # torchrun ends after its ranks
        family = self._family() if code is None else self._orphans()
        for process in family:
            _quietly(process.kill)
        self._process.wait(timeout=KILL_SECONDS)
        deadline = time.monotonic() + KILL_SECONDS
        while any(map(_alive, family)) and time.monotonic() < deadline:
            time.sleep(0.01)

    def _family(self) -> list[psutil.Process]:
        """The launcher and everything below it. It is stopped, so that it starts nothing while it is being listed."""
        import psutil

        try:
            root = psutil.Process(self._process.pid)
            root.suspend()
            return [*root.children(recursive=True), root]
        except psutil.NoSuchProcess:
            return []

    def _orphans(self) -> list[psutil.Process]:
        """Ranks whose launcher was killed: those that still import torch have not asked yet to end with it."""
        import psutil

        if self._job is None:
            return []
        return [process for process in psutil.process_iter(["cmdline"]) if str(self._job) in (process.info["cmdline"] or [])]


def rank_environment(parent: Mapping[str, str], threads: int) -> dict[str, str]:
    """The environment of the ranks: the parent's, with their number of threads, and what is set here unless the user has set it.

    gloo talks over the loopback interface. glibc keeps freed memory, as CUDA's caching allocator does: by default it returns every
    large tensor to the system, and fresh pages take a third of the time of a pass that is not attention (measured: 0.85 against 0.55 s). What
    is compiled is compiled by the rank itself: pools of workers of all ranks would compete for the cores, and outlive their ranks.
    """
    environment = {
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": str(1 << 33),
        "MALLOC_TRIM_THRESHOLD_": str(1 << 36),
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        **parent,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
    }
    package = Path(cpbench.__file__).resolve().parent.parent
    if package.name not in ("site-packages", "dist-packages"):  # run from a checkout: the ranks must find the same one
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(package), parent.get("PYTHONPATH")]))
    return environment


def end_with_parent() -> Callable[[], None] | None:
    """For a process before it starts, on Linux: let the kernel end it if this one is killed without a chance to do so."""
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None).prctl  # looked up before the fork
    parent = os.getpid()

    def preexec() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return preexec


def _alive(process: psutil.Process) -> bool:
    """A zombie holds nothing any more; when it is reaped is the init process's affair."""
    import psutil

    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _quietly(kill: Callable[[], None]) -> None:
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        kill()
