"""Memory over time from CUDA's caching allocator: its own trace of one pass, with spans as phases. Needs no stacks and no pickle.

What the trace names by address is named by category where it is held, else by the span it was allocated in. Memory that never passes
through the allocator (NCCL's buffers, the CUDA context) is not in it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from cpbench.measure.history import History, Level, Owner, Phase, largest_first
from cpbench.measure.out_of_memory import Held
from cpbench.tracing.phases import PhaseLog
from cpbench.tracing.spans import using

MAX_ENTRIES = 1 << 20
BEFORE = "from before the pass"
UNNAMED = "outside of all spans"


def allocator_history(run: Callable[[], object], held: Held) -> History:
    """Run once while the allocator records. The clock of phases is that of the trace: seconds since 1970."""
    phases = PhaseLog(time.time)
    torch.cuda.synchronize()
    start, before = time.time(), torch.cuda.memory_allocated()
    torch.cuda.memory._record_memory_history("all", context=None, max_entries=MAX_ENTRIES, clear_history=True)
    try:
        with using(phases):
            run()
            torch.cuda.synchronize()
        trace = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    finally:
        torch.cuda.memory._record_memory_history(None)
    storages = [(category, tensor.untyped_storage()) for category, tensor in held()]
    known = {storage.data_ptr(): Owner(category, storage.nbytes()) for category, storage in storages}
    return from_trace(trace, (start, before), phases.until(time.time()), known)


def from_trace(trace: Iterable[Mapping[str, Any]], start: Level, phases: Iterable[Phase], held: Mapping[int, Owner]) -> History:
    """The history of a trace as `_snapshot` gives it. `start`: (seconds, bytes) when it began; `held`: what outlives the pass, by address.

    A block counts until the allocator may use it again, which for one that another stream uses is later than when it is freed.
    """
    found = list(phases)
    moves = [entry for entry in trace if entry["action"] in ("alloc", "free_completed") and entry["time_us"] / 1e6 >= start[0]]
    levels, sizes = [start], dict[int, int]()
    for entry in moves:
        address = entry["addr"]
        if entry["action"] == "alloc":
            sizes[address] = change = entry["size"]
        else:
            change = -sizes.pop(address, entry["size"])
        levels.append((entry["time_us"] / 1e6, levels[-1][1] + change))
    highest = max(range(len(levels)), key=lambda index: levels[index][1])
    return History.of("allocator", levels, found, _owners(moves, highest, levels[highest][1], found, held))


def _owners(moves: Sequence[Mapping[str, Any]], moment: int, level: int, phases: Iterable[Phase], held: Mapping[int, Owner]) -> list[Owner]:
    """Who was alive after so many moves. What is held and did not come in the trace was there before, and so was what nobody knows."""
    alive: dict[int, Mapping[str, Any]] = {}
    for entry in moves[:moment]:
        if entry["action"] == "alloc":
            alive[entry["addr"]] = entry
        else:
            alive.pop(entry["addr"], None)
    lasting = {entry["addr"]: entry for entry in moves if entry["action"] == "alloc"}  # addresses are used again
    innermost = sorted(phases, key=lambda phase: phase.end - phase.start)
    sizes: Counter[str] = Counter()
    for address, entry in alive.items():
        seconds = entry["time_us"] / 1e6
        path = next((phase.path for phase in innermost if phase.start <= seconds <= phase.end), UNNAMED)
        sizes[held[address].name if address in held and lasting[address] is entry else path] += entry["size"]
    for address, owner in held.items():
        sizes[owner.name] += 0 if address in lasting else owner.bytes
    sizes[BEFORE] = max(0, level - sum(sizes.values()))
    return largest_first(dict(sizes))
