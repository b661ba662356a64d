"""What the torch profiler writes, read: a Chrome trace as events with a begin and an end. What they mean is timeline.py's affair.

Times are microseconds since the trace's own base, as in the file: the base of all ranks of a machine is the same (`baseTimeNanoseconds`).
Only the standard library is needed, so that the driver reads traces without PyTorch.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpbench.atomic import replace_file
from cpbench.errors import UNREADABLE, CpbenchError

SUFFIX = ".pt.trace.json.gz"  # what TensorBoard's plugin and HolisticTraceAnalysis look for
OPERATOR, ANNOTATION, KERNEL, COPY, FILL = "cpu_op", "user_annotation", "kernel", "gpu_memcpy", "gpu_memset"
ON_DEVICE = (KERNEL, COPY, FILL)
LAUNCHES = ("cuda_runtime", "cuda_driver")
_PATH = re.compile(r"[a-z0-9_]+([./][a-z0-9_]+)*")  # annotations of PyTorch's own have colons, spaces, capitals: `gloo:send`, `ProfilerStep#1`


@dataclass(frozen=True, slots=True)
class Event:
    """One stretch of time on one thread or stream."""

    name: str
    category: str
    start: float
    end: float
    thread: tuple[Any, Any]  # process and thread, or device and stream
    correlation: int | None = None  # of a launch and what it launched

    @property
    def is_span(self) -> bool:
        """Whether this is one of cpbench's own spans, whose name is a path."""
        return self.category == ANNOTATION and _PATH.fullmatch(self.name) is not None


def read_trace(file: Path) -> dict[str, Any]:
    """A trace as it was written. Raises CpbenchError (exit code 4) where the file is not one."""
    try:
        data = json.loads(gzip.decompress(file.read_bytes()), strict=False)
    except OSError as error:
        raise CpbenchError(f"{file} cannot be read: {error.strerror or error}.", "Profile the cell again.", UNREADABLE) from error
    except (ValueError, EOFError, zlib.error) as error:
        raise CpbenchError(f"{file} is not a trace.", "It was cut or edited: profile the cell again.", UNREADABLE) from error
    if not isinstance(data, dict) or not isinstance(data.get("traceEvents"), list):
        raise CpbenchError(f"{file} is not a trace.", 'A trace has a list "traceEvents".', UNREADABLE)
    return data


def write_trace(file: Path, data: dict[str, Any]) -> None:
    """Write a trace in one step. Raises CpbenchError where that cannot be done."""
    replace_file(file, gzip.compress(json.dumps(data, separators=(",", ":")).encode(), compresslevel=6))


def events_of(data: dict[str, Any]) -> Iterator[Event]:
    """The complete events of a trace (`ph` X), in the order of the file."""
    for entry in data["traceEvents"]:
        if entry.get("ph") == "X" and "dur" in entry:
            start = float(entry["ts"])
            correlation = (entry.get("args") or {}).get("correlation")
            place = (entry.get("pid"), entry.get("tid"))
            yield Event(str(entry["name"]), str(entry.get("cat")), start, start + float(entry["dur"]), place, correlation)
