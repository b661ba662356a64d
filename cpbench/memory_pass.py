"""The pass of a cell that is not timed: its peak memory, and its traffic held against the formula.

How live tensors are tracked is measure/memory.py's affair, and what the formulas are formulas.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cpbench.buffers import ALL_CATEGORIES
from cpbench.cell import Cell
from cpbench.distributed.mesh import Groups
from cpbench.distributed.observe import OPERATIONS, Observation
from cpbench.distributed.traffic import Traffic
from cpbench.formulas import Sent, live_bytes, traffic
from cpbench.kernels.base import Kernel
from cpbench.measure.device import Device
from cpbench.measure.memory import OneBlock, measure_peaks
from cpbench.program import Program
from cpbench.routed import most_pairs, sent_rows, shared_loads
from cpbench.strategies import STRATEGIES

PEAKS = ("peak_live_bytes", "peak_allocator_bytes", "peak_reserved_bytes", "peak_rss_bytes")


def memory_pass(program: Program, kernel: Kernel, cell: Cell, groups: Groups, device: Device, limit: int | None) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Peak memory of the rank with the highest peak and traffic held against its formula, for the record; and every rank's live peak."""
    on_cpu = cell.device == "cpu"
    if on_cpu:
        program.set_kernel(OneBlock(kernel))
    program.prepare()
    if len(program.steps) > 1:  # buffers grow from chunk to chunk in the first pass, and in no other
        program.run()
        program.prepare()
    groups.recorder.reset()
    program.watch_routers()
    with groups.recorder.observing() as seen:
        peaks = measure_peaks(program.run, device, program.tensors, None if device.torch_device.type == "cuda" else limit)
    loads = shared_loads(cell, program.log.stop(), groups)
    received, sent = groups.recorder.reset(), sent_rows(cell, loads)
    predicted = traffic(cell, groups.rank, sent)
    program.set_kernel(kernel)
    everyone = groups.world.share([float(peaks.get(name, -1)) for name in PEAKS])
    live = [int(row[0]) for row in everyone]
    highest = live.index(max(live))
    memory: dict[str, Any] = {name: (max(int(row[column]) for row in everyone) if everyone[0][column] >= 0 else None) for column, name in enumerate(PEAKS)}
    categories = groups.world.share([float(peaks["by_category"].get(name, 0)) for name in ALL_CATEGORIES])[highest]
    by_category = {name: int(size) for name, size in zip(ALL_CATEGORIES, categories, strict=True) if size}
    memory |= {"rank": highest, "predicted_live_bytes": live_bytes(cell, highest, pairs=most_pairs(cell, loads, highest)), "by_category": by_category}
    result: dict[str, Any] = {"memory": memory, "traffic": _traffic(cell, received, sent, seen, groups)}
    wrong = [rank for rank, (equal,) in enumerate(groups.world.share([float(received == predicted)])) if not equal]
    if wrong:
        result |= {"status": "wrong", "reason": f"traffic of rank {wrong[0]} differs from its formula at full size"}
    return result, tuple(live)


def _traffic(cell: Cell, received: Traffic, sent: Sent, seen: Observation, groups: Groups) -> dict[str, Any]:
    """What was counted on the rank that receives most, next to what the formula says for it, and what a library was observed to receive.

    `source` says what the sum rests on: `recorded` by our own groups; `observed` in part; `unknown` if a library communicates and what
    it received could not be seen, or not all of it: then there is no sum.
    """
    totals = [bytes_ for (bytes_,) in groups.world.share([float(received.bytes + seen.traffic.bytes)])]
    most = totals.index(max(totals))
    predicted = traffic(cell, most, sent)
    recorded = _of_rank(most, received, sorted(predicted.counts), groups)
    record = {"rank": most, "predicted": predicted.to_dict(), "recorded": recorded.to_dict(), "source": "recorded"}
    total = recorded
    if brings_collectives(cell):
        observed = _of_rank(most, seen.traffic, [("cp", operation) for operation in OPERATIONS], groups).nonzero()
        blind = [float(brings_collectives(cell.parts[groups.place.dp].cell) and (bool(seen.unread) or not seen.traffic.calls))]
        hidden = any(rank_is_blind for (rank_is_blind,) in groups.world.share(blind))
        record |= {"observed": observed.to_dict(), "source": "unknown" if hidden else "observed"}
        if hidden:
            return {**record, "bytes": None, "calls": None}
        total = recorded + observed
    return {**record, "bytes": total.bytes, "calls": total.calls}


def _of_rank(rank: int, traffic: Traffic, keys: Sequence[tuple[str, str]], groups: Groups) -> Traffic:
    """The counts of one rank under these keys, which are the same on every rank."""
    found = Traffic()
    for axis, operation in keys:
        calls, size = groups.world.share(traffic.counts.get((axis, operation), (0, 0)))[rank]
        found.add(axis, operation, int(size), int(calls))
    return found


def brings_collectives(cell: Cell) -> bool:
    """Whether a library communicates, so that no formula predicts all traffic."""
    return any(STRATEGIES[step.strategy].brings_collectives for part in cell.parts for step in part.cell.steps if step.layout.cp > 1)
