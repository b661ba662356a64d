"""Small Chrome traces for tests, as the torch profiler writes them. Times in microseconds."""

from __future__ import annotations

from typing import Any

from cpbench.tracing.chrome import events_of
from cpbench.tracing.timeline import Step, steps_of

PID, MAIN, OTHER = 4000, 4000, 4001
STEP = "harness/traced"
CLOCK = [[100e-6, 101e-6], [102e-6, 105e-6]]  # seconds of both ranks in each step


def entry(category: str, name: str, start: float, end: float, tid: Any = MAIN, pid: Any = PID, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "pid": pid, "tid": tid, "ts": start, "dur": end - start, "args": args}


def span(name: str, start: float, end: float, tid: Any = MAIN) -> dict[str, Any]:
    return entry("user_annotation", name, start, end, tid)


def op(name: str, start: float, end: float, tid: Any = MAIN) -> dict[str, Any]:
    return entry("cpu_op", name, start, end, tid)


def launch(correlation: int, start: float, tid: Any = MAIN, category: str = "cuda_runtime") -> dict[str, Any]:
    return entry(category, "cudaLaunchKernel", start, start + 1, tid, correlation=correlation)


def kernel(name: str, correlation: int, start: float, end: float, stream: int = 7, category: str = "kernel") -> dict[str, Any]:
    return entry(category, name, start, end, stream, pid=0, correlation=correlation)


def trace(*entries: dict[str, Any], base: int = 1_790_857_026_000_000_000) -> dict[str, Any]:
    marks = [
        {"ph": "M", "name": "process_name", "pid": PID, "tid": 0, "ts": 0, "args": {"name": "python3"}},
        {"ph": "M", "name": "process_labels", "pid": PID, "tid": 0, "ts": 0, "args": {"labels": "CPU"}},
        {"ph": "M", "name": "thread_name", "pid": PID, "tid": MAIN, "ts": 0, "args": {"name": "thread 4000 (python3)"}},
        {"ph": "i", "name": "Record Window End", "pid": "", "tid": "", "ts": 9.0, "s": "g"},
    ]
    return {"schemaVersion": 1, "baseTimeNanoseconds": base, "traceEvents": [*marks, *entries]}


def rank(shift: float = 0, attention: float = 30, **options: Any) -> dict[str, Any]:
    """Two steps of 100 us: attention, then half as much communication."""
    entries = []
    for start in (shift, shift + 200):
        end = start + attention * 1.5
        entries += [span(STEP, start, start + 100), span("layer/attention", start, end), op("aten::mm", start, start + attention)]
        entries += [span("layer/attention/cp.all_gather", start + attention, end)]
    return trace(*entries, **options)


def steps(*traces: dict[str, Any]) -> list[list[Step]]:
    return [steps_of(events_of(one)) for one in traces]
