"""A worker with one planted fault, chosen by FAULT in its environment: rank 1 of the ring cell raises, dies, hangs, and so on."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any

import torch

from cpbench import numerics, worker
from cpbench.strategies.ring import Ring

FAULT = os.environ["FAULT"]
prepare_cell = worker.prepare_cell


def faulty(job: worker.Job, cell: Any, *rest: Any) -> worker.Trial:
    if cell.strategy == "ring" and job.rank == 1:
        if FAULT == "raise":
            raise RuntimeError("planted fault")
        if FAULT == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if FAULT == "oom":
            raise torch.OutOfMemoryError("planted: tried to allocate 6.00 GiB")
        if FAULT == "hang":
            time.sleep(600)
    return prepare_cell(job, cell, *rest)


def forgets_remote_tokens(self: Ring, cell: Any, rank: int, plan: Any = Ring.plan) -> Any:
    steps = plan(self, cell, rank)
    return (steps[0], *(type(step)((), step.next_rows) for step in steps[1:]))


def count_too_much(cell: Any, rank: int, sent: Any = (), formula: Any = numerics.traffic) -> Any:
    traffic = formula(cell, rank, sent)
    if cell.strategy == "ring":
        traffic.add("cp", "send_recv", 1)
    return traffic


if __name__ == "__main__":
    worker.prepare_cell = faulty  # type: ignore[assignment]
    if FAULT == "wrong":
        Ring.plan = forgets_remote_tokens  # type: ignore[method-assign]
    if FAULT == "traffic":
        numerics.traffic = count_too_much
    worker.main(sys.argv[1])
