"""One rank of a sweep, started by torchrun: it joins the others, runs the entries of its job one after the other, and ends.

The first rank reports to the driver by appending events to a file. A rank that raises leaves a failure file and exits: torchrun ends
the others, and the driver starts a fresh group for the cells that remain. Which cells run, and what becomes of a failure, is the
driver's decision; how a cell is measured is in trial.py.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

import torch

from cpbench.cell import Cell
from cpbench.distributed.collectives import start_process_groups, stop_process_groups
from cpbench.distributed.mesh import Mesh
from cpbench.measure.device import Device, open_device
from cpbench.measure.out_of_memory import owners_named
from cpbench.rank_end import to_the_end
from cpbench.rank_job import Job
from cpbench.tracing import spans
from cpbench.trial import Trial, prepare_cell, time_cells


def main(path: str) -> None:
    """Run the job at `path`. Exits with 1 after a failure, without waiting for peers."""
    job, tools = Job.read(path), spans.injected_tools(dict(os.environ))
    if not tools:  # else the parent belongs to the tool, and when it ends is the tool's affair
        end_with_parent()
    with to_the_end(job.fail):
        torch.set_num_threads(job.data["threads"])
        device = open_device(job.data["device"], int(os.environ["LOCAL_RANK"]), job.data["memory_limit"])
        start_process_groups(device.torch_device)
        mesh = Mesh(job.rank, job.data["world_size"], device.torch_device.type)
        gc.freeze()  # what was imported is not searched for garbage between cells
        job.emit("ready", environment=running_environment(device), gpus=device.uuids(mesh.world_size))
        with torch.inference_mode(), spans.using(*tools):
            for entry in job.data["cells"]:
                run_entry(job, entry, mesh, device)
        stop_process_groups()
        job.emit("end")


def run_entry(job: Job, entry: dict[str, Any], mesh: Mesh, device: Device) -> None:
    """One entry of the job, a cell or two that alternate: report its start and the records."""
    asked = [entry, *([entry["other"]] if "other" in entry else [])]
    job.start(asked)
    for variant, record in zip(asked, measure(job, asked, mesh, device), strict=True):
        job.emit("done", index=variant["index"], record=record)
    faulthandler.cancel_dump_traceback_later()
    gc.collect()


def measure(job: Job, asked: Sequence[dict[str, Any]], mesh: Mesh, device: Device) -> list[dict[str, Any]]:
    """The records of one round of the cells of an entry: each is checked on its own, and those that are right are timed together."""
    trials: list[Trial] = []
    for variant in asked:
        for earlier in trials:
            earlier.program = None  # what it holds would be in the peaks of this one
        cell = Cell.from_dict(variant["cell"])
        job.turn(variant["index"])
        trials.append(prepare_cell(job, cell, mesh.groups(cell.layout), device, variant["index"], variant["verify"]))
    with owners_named(lambda: [held for trial in trials if trial.program for held in trial.program.tensors()]):
        time_cells(job, [trial for trial in trials if trial.record["status"] == "ok"], device)
    return [trial.record for trial in trials]


def running_environment(device: Device) -> dict[str, Any]:
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


def end_with_parent() -> None:
    """Ask Linux to kill this rank when torchrun dies, so that no fault leaves an orphan."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


if __name__ == "__main__":
    main(sys.argv[1])
