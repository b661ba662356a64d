"""One timeline of all ranks, for Perfetto: their traces in one file, every process under the name of its rank.

Ranks are put on one clock by the base time that PyTorch writes; nothing is shifted to make it look right. Steps begin behind a barrier,
so where those of two ranks do not coincide the clocks differ, and there is no timeline. Pure: the files are read and written elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cpbench.tracing.timeline import Step

BASE = "baseTimeNanoseconds"
PIDS_PER_RANK = 1000
_FLOWS = ("s", "t", "f")


def unaligned(traces: Sequence[Mapping[str, Any]], steps: Sequence[Sequence[Step]]) -> str | None:
    """Why the ranks are not on one clock, or None if they are. `steps`: of every rank."""
    if len({len(mine) for mine in steps}) > 1:
        return "the ranks did not trace the same number of steps"
    shifts = _shifts(traces)
    for number, together in enumerate(zip(*steps, strict=True)):
        starts = [step.start + shift for step, shift in zip(together, shifts, strict=True)]
        ends = [step.end + shift for step, shift in zip(together, shifts, strict=True)]
        late = max(range(len(starts)), key=lambda rank: starts[rank])
        early = min(range(len(ends)), key=lambda rank: ends[rank])
        if starts[late] >= ends[early]:
            apart = (starts[late] - ends[early]) / 1e6
            return f"step {number} of rank {late} begins {apart:.3g} s after that of rank {early} has ended, so their clocks differ"
    return None


def merged(traces: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The traces of all ranks, in rank order, as one."""
    events = [event for rank, (trace, shift) in enumerate(zip(traces, _shifts(traces), strict=True)) for event in _of_rank(rank, trace, shift, len(traces))]
    return {"schemaVersion": 1, "displayTimeUnit": "ms", BASE: traces[0].get(BASE, 0), "traceEvents": events}


def _shifts(traces: Sequence[Mapping[str, Any]]) -> list[float]:
    """Microseconds from the base of the first trace to that of each."""
    bases = [int(trace.get(BASE, 0)) for trace in traces]
    return [(base - bases[0]) / 1e3 for base in bases]


def _of_rank(rank: int, trace: Mapping[str, Any], shift: float, ranks: int) -> list[dict[str, Any]]:
    """The events of one rank under process numbers of its own, and what the processes are called."""
    processes: dict[Any, int] = {}
    names: dict[Any, str] = {}
    events = []
    for event in trace["traceEvents"]:
        process = event.get("pid")
        pid = processes.setdefault(process, rank * PIDS_PER_RANK + len(processes))
        if event.get("ph") == "M" and event["name"].startswith("process_"):
            if event["name"] == "process_labels":
                names[process] = str(event["args"].get("labels", ""))
            continue
        moved = {**event, "pid": pid}
        if "ts" in event:
            moved["ts"] = event["ts"] + shift
        if event.get("ph") in _FLOWS and isinstance(event.get("id"), int):
            moved["id"] = event["id"] * ranks + rank
        events.append(moved)
    titles = [(pid, f"rank {rank}: {names.get(process) or process or 'marks'}") for process, pid in processes.items()]
    named = [{"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": title}} for pid, title in titles]
    ordered = [{"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}} for pid, _ in titles]
    return [*named, *ordered, *events]
