"""One rank of a sweep, started by torchrun: for each cell prove the answer, measure memory, time passes, and report.

The first rank reports to the driver by appending events to a file. A rank that raises leaves a failure file and exits: torchrun ends
the others, and the driver starts a fresh group for the cells that remain. Which cells run, and what becomes of a failure, is the
driver's decision.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cpbench.answer import first_tokens
from cpbench.buffers import ALL_CATEGORIES
from cpbench.cell import NOT_COMPILED, Cell
from cpbench.distributed.collectives import start_process_groups, stop_process_groups
from cpbench.distributed.mesh import Groups, Mesh
from cpbench.distributed.observe import OPERATIONS, Observation
from cpbench.distributed.traffic import Traffic
from cpbench.formulas import Sent, flops_of_rank, live_bytes, new_rows, score_pairs, traffic
from cpbench.kernels import dispatched, kernel_of
from cpbench.kernels.base import Kernel
from cpbench.layout import AXES
from cpbench.measure.device import Device, open_device
from cpbench.measure.memory import OneBlock, measure_peaks
from cpbench.measure.timing import Samples, Timing, one_pass, sample
from cpbench.models.held import Models
from cpbench.models.linear import refusal
from cpbench.numerics import check
from cpbench.program import Output, Program
from cpbench.quantisation import NONE
from cpbench.routed import expert_loads, most_pairs, sent_rows, shared_loads
from cpbench.strategies import STRATEGIES

PEAKS = ("peak_live_bytes", "peak_allocator_bytes", "peak_reserved_bytes", "peak_rss_bytes")
STACKS_BEFORE_DEADLINE = 2.0  # seconds; where every thread is goes to the log before the driver kills a hanging group


@dataclass(frozen=True)
class Job:
    """What the driver wrote for one world size and round, and the models that its cells share."""

    data: dict[str, Any]
    rank: int
    models: Models

    @classmethod
    def read(cls, path: str) -> Job:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(data, int(os.environ["RANK"]), Models(data.get("weights"), data.get("prompt")))

    def emit(self, event: str, **fields: Any) -> None:
        """Append an event, on the first rank only."""
        if self.rank == 0:
            with Path(self.data["events"]).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"event": event, **fields}) + "\n")

    def fail(self, index: int | None, error: BaseException) -> None:
        """Leave this rank's failure for the driver."""
        lines = traceback.format_exception(error)
        reason = f"{type(error).__name__}: {error}".splitlines()[0] if str(error) else type(error).__name__
        failure = {"index": index, "rank": self.rank, "status": _status(error), "reason": reason, "log_tail": "".join(lines).splitlines()[-20:]}
        path = Path(f"{self.data['events']}.rank{self.rank}.json")
        path.with_suffix(".part").write_text(json.dumps(failure), encoding="utf-8")
        path.with_suffix(".part").replace(path)


def main(path: str) -> None:
    """Run the job at `path`. Exits with 1 after a failure, without waiting for peers."""
    _end_with_parent()
    job = Job.read(path)
    index: int | None = None
    try:
        torch.set_num_threads(job.data["threads"])
        device = open_device(job.data["device"], int(os.environ["LOCAL_RANK"]))
        start_process_groups(device.torch_device)
        mesh = Mesh(job.rank, job.data["world_size"], device.torch_device.type)
        gc.freeze()  # what was imported is not searched for garbage between cells
        job.emit("ready", environment=_environment(device))
        with torch.inference_mode():
            for entry in job.data["cells"]:
                index = entry["index"]
                run_entry(job, entry, mesh, device)
        stop_process_groups()
        job.emit("end")
    except BaseException as error:
        job.fail(index, error)
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # peers may hang in a collective, and so would leaving the process group
    sys.stderr.flush()
    os._exit(0)  # tearing the interpreter down takes a second per rank and frees nothing that the end of the process does not


def run_entry(job: Job, entry: dict[str, Any], mesh: Mesh, device: Device) -> None:
    """One cell of the job: report its start and its record."""
    job.emit("start", index=entry["index"])
    faulthandler.dump_traceback_later(max(0.1, job.data["cell_timeout"] - STACKS_BEFORE_DEADLINE))
    cell = Cell.from_dict(entry["cell"])
    groups = mesh.groups(cell.layout)
    record = measure_cell(job, cell, groups, device, entry["index"], entry["verify"])
    job.emit("done", index=entry["index"], record=record)
    faulthandler.cancel_dump_traceback_later()
    gc.collect()


def measure_cell(job: Job, cell: Cell, groups: Groups, device: Device, index: int, verify: bool) -> dict[str, Any]:
    """The record of one round of one cell."""
    kernel = kernel_of(cell)
    record: dict[str, Any] = {
        "status": "ok",
        "reason": None,
        "samples": [],
        "skew_samples": [],
        "stop": "",
        "first_call_s": None,
        "flops_per_rank": max(flops_of_rank(cell, rank) for rank in range(cell.world_size)),
        "kernel": dispatched(cell, kernel),
        "tokens_per_rank": cell.max_rows,
        "cp_active": cell.cp_off is None,
        "cp_off_reason": cell.cp_off,
        "threads_per_rank": job.data["threads"] if cell.device == "cpu" else None,
        "oversubscribed": job.data["oversubscribed"],
        "warnings": _warnings(cell),
    }
    if reason := refusal(device.torch_device, cell.quant) or (groups.tp.products_refusal() if cell.sp_fused else None):
        return {**record, "status": "unsupported", "reason": reason}
    if verify:
        verdict = check(cell, groups, kernel, device.torch_device, job.models)
        record["numerics"] = verdict.to_dict()
        if not verdict.passed:
            return {**record, "status": "wrong", "reason": verdict.reason}
    program = Program(cell, groups, kernel, device.torch_device, job.models)
    record |= _memory_pass(program, kernel, cell, groups, device)
    if record["status"] != "ok":
        return record
    # else nothing is compiled or tuned on the first call, and a pass at full length is not spent on it
    if cell.device != "cpu" or cell.compile != NOT_COMPILED:
        record["first_call_s"] = max(one_pass(program.run, program.prepare, device, groups.world))
    last: list[Output] = []
    program.watch_routers()  # in the first timed pass: the memory pass skips attention on CPU, and routers see what it leaves

    def run() -> None:
        last.clear()  # the output of the pass before is not alive during this one
        last.append(program.run())
        program.log.stop()

    samples = sample(
        run,
        program.prepare,
        Timing(**job.data["timing"]),
        device,
        groups.world,
        lambda n, seconds: job.emit("sample", index=index, n=n, seconds=seconds),
    )
    record["experts"] = expert_loads(cell, shared_loads(cell, program.log.notes, groups))
    return record | _timed(samples, last[0], cell, groups) | {"ranks": _ranks(cell, samples, record.pop("live"))}


def _memory_pass(program: Program, kernel: Kernel, cell: Cell, groups: Groups, device: Device) -> dict[str, Any]:
    """Peak memory of the rank with the highest peak, every rank's live peak, and traffic held against its formula."""
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
        peaks = measure_peaks(program.run, device, program.tensors)
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
    result = {"memory": memory, "live": live, "traffic": _traffic(cell, received, sent, seen, groups)}
    wrong = [rank for rank, (equal,) in enumerate(groups.world.share([float(received == predicted)])) if not equal]
    if wrong:
        result |= {"status": "wrong", "reason": f"traffic of rank {wrong[0]} differs from its formula at full size"}
    return result


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
    if _brings_collectives(cell):
        observed = _of_rank(most, seen.traffic, [("cp", operation) for operation in OPERATIONS], groups).nonzero()
        blind = [float(_brings_collectives(cell.parts[groups.place.dp].cell) and (bool(seen.unread) or not seen.traffic.calls))]
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


def _warnings(cell: Cell) -> list[str]:
    """What a reader of the numbers must know."""
    compiled = ["peak memory is that of the attention before it is compiled"] if cell.compile != NOT_COMPILED else []
    observed = [f"collectives of {cell.strategy} are observed, not predicted"] if _brings_collectives(cell) else []
    return observed + compiled + (["FP8 is simulated on CPU: the time is not that of FP8"] if cell.quant != NONE and cell.device == "cpu" else [])


def _brings_collectives(cell: Cell) -> bool:
    """Whether a library communicates, so that no formula predicts all traffic."""
    return any(STRATEGIES[step.strategy].brings_collectives for part in cell.parts for step in part.cell.steps if step.layout.cp > 1)


def _timed(samples: Samples, output: Output, cell: Cell, groups: Groups) -> dict[str, Any]:
    first = first_tokens(output, cell, groups) if cell.target == "prefill" else []
    tokens = [{"token": token, "margin": margin} for token, margin in first]
    return {"samples": samples.slowest, "skew_samples": samples.skew, "stop": samples.stop, "first_tokens": tokens}


def _ranks(cell: Cell, samples: Samples, live: list[int]) -> list[dict[str, Any]]:
    """One entry per rank: its place, its share of the work, its own clock, its peak."""
    entries = []
    for rank in range(cell.world_size):
        place = cell.layout.coordinates(rank)
        entries.append(
            {
                "rank": rank,
                "coordinates": {axis: getattr(place, axis) for axis in AXES},
                "tokens": new_rows(cell, rank),
                "score_pairs": score_pairs(cell, rank),
                "median_s": samples.of_rank(rank),
                "peak_live_bytes": live[rank],
            }
        )
    return entries


def _environment(device: Device) -> dict[str, Any]:
    """What only a running rank knows."""
    cuda = device.torch_device.type == "cuda"
    return {
        "torch": torch.__version__,
        "backend": "nccl" if cuda else "gloo",
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "cuda": torch.version.cuda,
        "device_name": device.name,
        "threads_per_rank": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _status(error: BaseException) -> str:
    """`oom` for every way in which memory runs out, else `crash`."""
    text = str(error)
    memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in text or "out of memory" in text
    return "oom" if memory else "crash"


def _end_with_parent() -> None:
    """Ask Linux to kill this rank when torchrun dies, so that no fault leaves an orphan."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    main(sys.argv[1])
