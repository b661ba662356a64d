"""A worker with one planted fault, chosen by FAULT in its environment: rank 1 of the ring cell raises, dies, hangs, and so on.

What must come of each fault is in faults.py; those of the driver are planted in faulty_driver.py.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

from cpbench import numerics, rank_job, trial, worker
from cpbench.strategies.ring import Ring

FAULT = os.environ["FAULT"]
MOMENTS = {"ctrl-c between cells": ("done", "allgather"), "ctrl-c in timing": ("sample", "ring")}  # the event of a cell that has just been reported
DAY = 86_400.0
SEEN = 3.0  # seconds in which the first rank has reported the cell before, and the driver has seen it
prepare_cell, check, emit = worker.prepare_cell, trial.check, rank_job.Job.emit


def signal_driver(number: int) -> None:
    """The driver gets a signal, and the time to act: a rank that went on would race with it."""
    os.kill(int(os.environ["DRIVER"]), number)
    time.sleep(60)


def faulty(job: worker.Job, cell: Any, *rest: Any) -> worker.Trial:
    if cell.strategy == "ring" and job.rank == 1:
        if FAULT == "raise":
            raise RuntimeError("planted fault")
        if FAULT == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if FAULT == "kill torchrun":
            time.sleep(SEEN)
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        if FAULT == "kill the driver":
            time.sleep(SEEN)
            signal_driver(signal.SIGKILL)
        if FAULT == "oom":
            job.data["memory_limit"] = 1 << 16
        if FAULT == "hang":
            time.sleep(600)
    return prepare_cell(job, cell, *rest)


def interrupted_check(cell: Any, groups: Any, *rest: Any) -> Any:
    if cell.strategy == "ring" and groups.rank == 0:
        signal_driver(signal.SIGINT)
    return check(cell, groups, *rest)


def interrupted_emit(job: worker.Job, event: str, **fields: Any) -> None:
    emit(job, event, **fields)
    strategies = {entry["index"]: entry["cell"]["strategy"] for entry in job.data["cells"]}
    if job.rank == 0 and (event, strategies.get(fields.get("index"))) == MOMENTS[FAULT]:
        signal_driver(signal.SIGINT)


def forgets_remote_tokens(self: Ring, cell: Any, rank: int, plan: Any = Ring.plan) -> Any:
    steps = plan(self, cell, rank)
    return (steps[0], *(type(step)((), step.next_rows) for step in steps[1:]))


def count_too_much(cell: Any, rank: int, sent: Any = (), formula: Any = numerics.traffic) -> Any:
    traffic = formula(cell, rank, sent)
    if cell.strategy == "ring":
        traffic.add("cp", "send_recv", 1)
    return traffic


class JumpingClock:
    """A wall clock that somebody sets while the sweep runs: a day behind, right, a day ahead, and again."""

    def __init__(self) -> None:
        self.clock, self.looks = time.time, 0

    def __call__(self) -> float:
        self.looks += 1
        return self.clock() + DAY * (self.looks % 3 - 1)


if __name__ == "__main__":
    worker.prepare_cell = faulty  # type: ignore[assignment]
    if FAULT == "wrong":
        Ring.plan = forgets_remote_tokens  # type: ignore[method-assign]
    if FAULT == "traffic":
        numerics.traffic = count_too_much
    if FAULT == "clock":
        time.time = JumpingClock()
    if FAULT == "ctrl-c in verification":
        trial.check = interrupted_check
    if FAULT in MOMENTS:
        rank_job.Job.emit = interrupted_emit  # type: ignore[method-assign]
    if FAULT == "ctrl-c in a start" and os.environ["RANK"] == "0":
        signal_driver(signal.SIGINT)
    worker.main(sys.argv[1])
