"""One cell on its way through a rank: its answer proved, its memory measured, its passes timed, and the record of all that.

Cells that alternate are timed together, by the same code as one alone. What ranks are told, and how they report, is in rank_job.py; what
becomes of a record is decided by the driver.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cpbench.answer import first_tokens
from cpbench.cell import NOT_COMPILED, Cell
from cpbench.distributed.flight import FlightLog
from cpbench.distributed.mesh import Groups
from cpbench.formulas import flops_of_rank, new_rows, score_pairs
from cpbench.kernels import dispatched, kernel_of
from cpbench.kernels.base import Kernel
from cpbench.layout import AXES
from cpbench.measure.device import Device
from cpbench.measure.history import history_file
from cpbench.measure.memory import memory_history
from cpbench.measure.out_of_memory import owners_named
from cpbench.measure.peaks import Peak, data_sheet, measured
from cpbench.measure.split import shared_split
from cpbench.measure.timing import Samples, Timing, Variant, one_pass, sample
from cpbench.memory_pass import brings_collectives, memory_pass
from cpbench.models.linear import refusal
from cpbench.numerics import check
from cpbench.program import Output, Program
from cpbench.quantisation import NONE
from cpbench.rank_job import Job
from cpbench.routed import expert_loads, shared_loads
from cpbench.stats import median
from cpbench.tracing.spans import FIRST_CALL, MEMORY, TIMED, VERIFY


@dataclass
class Trial:
    """A cell on its way: what is known of one round of it, its program where that is at hand, and every rank's live peak."""

    index: int
    cell: Cell
    groups: Groups
    kernel: Kernel
    record: dict[str, Any]
    program: Program | None = None
    live: tuple[int, ...] = ()
    last: list[Output] = field(default_factory=list)  # of the pass that ran last
    flights: FlightLog = field(default_factory=lambda: FlightLog(lambda: None))
    marked: list[float] | None = None  # seconds of every rank, where the marked pass is not the first timed one


def prepare_cell(job: Job, cell: Cell, groups: Groups, device: Device, index: int, verify: bool) -> Trial:
    """Everything about a cell that is not timed: its answer proved, and the memory of a pass."""
    kernel = kernel_of(cell)
    trial = Trial(index, cell, groups, kernel, _new_record(job, cell, kernel))
    record = trial.record
    if reason := refusal(device.torch_device, cell.quant) or (groups.tp.products_refusal() if cell.sp_fused else None):
        record |= {"status": "unsupported", "reason": reason}
        return trial
    if verify:
        with VERIFY():
            verdict = check(cell, groups, kernel, device.torch_device, job.models)
        record["numerics"] = verdict.to_dict()
        if not verdict.passed:
            record |= {"status": "wrong", "reason": verdict.reason}
            return trial
    trial.program = Program(cell, groups, kernel, device.torch_device, job.models)
    with owners_named(trial.program.tensors), MEMORY():
        memory, trial.live = memory_pass(trial.program, kernel, cell, groups, device, job.data["memory_limit"])
    record |= memory | {"timed": job.data["timed"]}
    return trial


def _new_record(job: Job, cell: Cell, kernel: Kernel) -> dict[str, Any]:
    """What is known of a cell before it runs."""
    return {
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


def _warnings(cell: Cell) -> list[str]:
    """What a reader of the numbers must know."""
    compiled = ["peak memory is that of the attention before it is compiled"] if cell.compile != NOT_COMPILED else []
    observed = [f"collectives of {cell.strategy} are observed, not predicted"] if brings_collectives(cell) else []
    return observed + compiled + (["FP8 is simulated on CPU: the time is not that of FP8"] if cell.quant != NONE and cell.device == "cpu" else [])


def time_cells(job: Job, trials: Sequence[Trial], device: Device) -> None:
    """Time the passes of cells, in turn where there are several, and complete their records."""
    if not trials or not job.data["timed"]:
        return
    variants = [_variant(job, trial, device) for trial in trials]
    job.emit("timed", index=trials[0].index)
    everything = sample(variants, Timing(**job.data["timing"]), device, trials[0].groups.world)
    job.emit("sampled", index=trials[0].index)
    for trial, samples in zip(trials, everything, strict=True):
        assert trial.program is not None, "its passes were timed"
        job.turn(trial.index)
        cell, groups, record = trial.cell, trial.groups, trial.record
        peak = peak_of(job, cell, groups, device)
        record["peak"] = asdict(peak) if peak else None
        record |= _split(cell, trial.flights, trial.marked or samples.ranks[0], groups, device)
        record["traced_s"] = _traced(job, trial.program, device, groups)
        record["experts"] = expert_loads(cell, shared_loads(cell, trial.program.log.notes, groups))
        record["alternated"] = len(trials) > 1
        record |= _timed(samples, trial.last[0], cell, groups) | {"ranks": _ranks(cell, samples, trial.live)}


def _variant(job: Job, trial: Trial, device: Device) -> Variant:
    """The passes of a cell as they are timed, after the first call and the marked pass, where that is one of its own."""
    cell, groups, index = trial.cell, trial.groups, trial.index
    job.turn(index)
    program = trial.program = trial.program or Program(cell, groups, trial.kernel, device.torch_device, job.models)
    # else nothing is compiled or tuned on the first call, and a pass at full length is not spent on it
    if cell.device != "cpu" or cell.compile != NOT_COMPILED:
        with FIRST_CALL():
            trial.record["first_call_s"] = max(one_pass(program.run, program.prepare, device, groups.world))
    log = trial.flights = FlightLog(device.mark)
    if not device.marks_are_free:
        with groups.recorder.marking(log):
            trial.marked = one_pass(program.run, program.prepare, device, groups.world)
    program.watch_routers()  # in the first timed pass: the memory pass skips attention on CPU, and routers see what it leaves

    def run() -> None:
        flights = None if trial.marked or trial.last else log
        trial.last.clear()  # the output of the pass before is not alive during this one
        with TIMED(), groups.recorder.marking(flights):
            trial.last.append(program.run())
        program.log.stop()

    def prepare() -> None:
        job.turn(index)
        program.prepare()

    return Variant(run, prepare, lambda n, seconds: job.emit("sample", index=index, n=n, seconds=seconds))


def peak_of(job: Job, cell: Cell, groups: Groups, device: Device) -> Peak | None:
    """What a rank could compute, found once for each dtype. All ranks call: a CPU's is measured while all measure."""
    name = cell.quant if cell.quant != NONE else cell.dtype
    if name not in job.peaks:
        if cell.device == "cpu":
            groups.world.barrier()
            mine = measured(getattr(torch, cell.dtype))
            job.peaks[name] = replace(mine, flops=median([flops for (flops,) in groups.world.share([mine.flops])]))
        else:
            job.peaks[name] = data_sheet(device.name, cell.dtype, cell.quant)
    return job.peaks[name]


def _split(cell: Cell, log: FlightLog, seconds: Sequence[float], groups: Groups, device: Device) -> dict[str, Any]:
    """What became of the marked pass."""
    if brings_collectives(cell):
        return {"split": {"reason": f"{cell.strategy} communicates by itself, which only a trace shows"}}
    if cell.sp_fused and cell.device != "cpu":
        return {"split": {"reason": "fused products communicate inside of kernels"}}
    return {"split": shared_split(log.flights, seconds, groups, device)}


def _traced(job: Job, program: Program, device: Device, groups: Groups) -> list[list[float]] | None:
    """Of every traced step the seconds of every rank, where the job asks for traces; memory over time, of one more pass, lies beside them."""
    if job.data.get("trace") is None:
        return None
    from cpbench.tracing.traced_pass import traced_steps

    folder = Path(job.data["trace"])
    seconds = traced_steps(program.run, program.prepare, device, groups.world, folder)
    program.prepare()
    history = memory_history(program.run, device, program.tensors)
    history_file(folder, groups.rank).write_text(json.dumps(history.to_dict()), encoding="utf-8")
    groups.world.barrier()  # who reads it is told by the first rank
    return seconds


def _timed(samples: Samples, output: Output, cell: Cell, groups: Groups) -> dict[str, Any]:
    first = first_tokens(output, cell, groups) if cell.target == "prefill" else []
    tokens = [{"token": token, "margin": margin} for token, margin in first]
    return {"samples": samples.slowest, "skew_samples": samples.skew, "stop": samples.stop, "first_tokens": tokens}


def _ranks(cell: Cell, samples: Samples, live: Sequence[int]) -> list[dict[str, Any]]:
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
