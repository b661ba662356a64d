"""A process that measures what ranks of other world sizes compute: their programs on this device, with nobody else there.

The processes of a group stand for ranks that share this machine, and work at the same time, as those would; each takes its share of the ranks that
differ. What a rank did is written as a script. The first process then works out what follows (projecting.py), while the others wait: who asked
must not work beside what is measured.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from cpbench.cell import Cell
from cpbench.distributed.collectives import start_process_groups, stop_process_groups
from cpbench.distributed.mesh import Mesh
from cpbench.kernels import kernel_of
from cpbench.layout import Layout
from cpbench.measure.device import Device, open_device
from cpbench.projection.projecting import Recorded, Target, attempt, passes_of
from cpbench.projection.simulated import classes, recordings
from cpbench.projection.tape import Script
from cpbench.rank_end import to_the_end
from cpbench.rank_job import Job
from cpbench.worker import end_with_parent, running_environment

LEAST, MOST, SECONDS = 3, 30, 1.5  # passes of a rank, and after how long there are enough
LAYERS = 2  # of each kind that are run


def main(path: str) -> None:
    """Run the job at `path`. Exits with 1 after a failure."""
    job = Job.read(path)
    end_with_parent()
    with to_the_end(job.fail):
        torch.set_num_threads(job.data["threads"])
        device = open_device(job.data["device"], int(os.environ["LOCAL_RANK"]), job.data["memory_limit"])
        start_process_groups(device.torch_device)
        size = job.data["world_size"]
        world = Mesh(job.rank, size, device.torch_device.type).groups(Layout(dp=size)).world
        job.emit("ready", environment=running_environment(device))
        for entry in job.data["cells"]:
            job.start([entry])
            file = Path(job.data["events"]).with_name(f"scripts-{entry['index']}")
            cell = Cell.from_dict(entry["cell"])
            write(file, job.rank, _record(job, cell, device, world))
            world.barrier()
            if job.rank == 0:
                found = attempt(entry["cell"], Target(**job.data["target"]), passes_of(cell, read(file, size)), device.name)
                job.emit("done", index=entry["index"], record=found.model_dump(mode="json"))
            gc.collect()
            world.barrier()
        stop_process_groups()
        job.emit("end")


def _record(job: Job, cell: Cell, device: Device, world: Any) -> Recorded:
    """Passes of this process's share of the ranks that differ. Who has none left works on, so that the others are not alone."""
    kernel, different = kernel_of(cell), list(classes(cell))
    rounds = -(-len(different) // world.size)
    found: Recorded = {}
    for turn in range(rounds):
        rank = different[(turn * world.size + world.rank) % len(different)]
        world.barrier()
        began, found[rank] = time.perf_counter(), []
        for script in recordings(cell, rank, kernel, device, device.torch_device, each=LAYERS, is_nccl=cell.device == "cuda"):
            found[rank].append(script)
            if len(found[rank]) >= LEAST and (len(found[rank]) == MOST or time.perf_counter() - began > SECONDS):
                break
    return found


def write(file: Path, process: int, recorded: Recorded) -> None:
    """What a process measured of a cell, beside what the others did."""
    texts = {rank: [script.to_dict() for script in passes] for rank, passes in recorded.items()}
    file.with_suffix(f".{process}").write_text(json.dumps(texts), encoding="utf-8")


def read(file: Path, processes: int) -> list[Recorded]:
    """What the processes measured of a cell."""
    found = []
    for process in range(processes):
        texts = json.loads(file.with_suffix(f".{process}").read_text(encoding="utf-8"))
        found.append({int(rank): [Script.from_dict(data) for data in passes] for rank, passes in texts.items()})
    return found


if __name__ == "__main__":
    main(sys.argv[1])
