"""What reading untrusted input may do and cost: no file written outside a folder, no code run, 2 s of a processor, 500 MB.

Python's audit events say what is done; what is imported, and what libraries build at first use, is done before anyone looks.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import resource
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from rich.cells import cell_len

SECONDS = 2.0
BYTES = 500 << 20
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {"os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "shutil.rmtree", "shutil.move"}
RUNS = {"exec", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "os.spawn", "subprocess.Popen", "pickle.find_class"}
RUNS |= {"marshal.loads", "ctypes.dlopen", "socket.connect", "socket.bind", "import"}


class Finding(BaseException):
    """Not an Exception: nothing that reads input may take it for a mistake in the input."""


class _State:
    folder: Path | None = None  # where may be written; None: nobody looks
    installed = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _State.folder is None:
        return
    if event == "open":
        path, mode, flags = arguments
        writes = (isinstance(mode, str) and any(letter in mode for letter in "wax+")) or bool((flags or 0) & WRITES)
        if not writes or isinstance(path, int):
            return
    elif event in CHANGES:
        path = arguments[0]
    elif event in RUNS:
        raise Finding(f"{event} {str(arguments)[:200]}")
    else:
        return
    if not Path(os.fsdecode(path)).absolute().is_relative_to(_State.folder):
        raise Finding(f"{event} {path!r}, which is outside of the folder")


def _too_slow(*_: object) -> None:
    raise Finding(f"more than {SECONDS:g} s of a processor")


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Raise Finding for what may not be done inside; MemoryError where it takes too much."""
    if not _State.installed:
        sys.addaudithook(_audit)
        _State.installed = True
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGPROF, _too_slow)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + BYTES, hard))
    begin = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    _State.folder = folder.absolute()
    try:
        yield
    finally:
        _State.folder = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    if (seconds := time.process_time() - begin) > SECONDS:
        raise Finding(f"{seconds:.1f} s of a processor")


def import_everything() -> None:
    """What cpbench imports where it is needed, so that an import afterwards is one that the input asked for."""
    import cpbench

    cell_len("\u4e2d\u0301")  # rich reads its table of widths when it meets the first wide character
    for module in pkgutil.walk_packages(cpbench.__path__, "cpbench."):
        if not module.name.endswith("__main__"):
            with suppress(ImportError):  # what is not installed
                importlib.import_module(module.name)
