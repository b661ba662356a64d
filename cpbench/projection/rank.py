"""A process that measures what ranks of other world sizes compute: their programs on this device, with nobody else there.

The processes of a group stand for ranks that share this machine, and work at the same time, as those would; each takes its share of the ranks that
differ. What a rank did is written as a script; what transfers take, and what follows, is worked out by who asked (projecting.py).
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from cpbench.cell import Cell
from cpbench.distributed.collectives import start_process_groups, stop_process_groups
from cpbench.distributed.mesh import Mesh
from cpbench.kernels import kernel_of
from cpbench.layout import Layout
from cpbench.measure.device import Device, open_device
from cpbench.projection.simulated import classes, simulate
from cpbench.rank_end import to_the_end
from cpbench.rank_job import Job
from cpbench.worker import end_with_parent, running_environment

RUNS = 3
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
            scripts = _scripts(job, Cell.from_dict(entry["cell"]), device, world)
            (Path(job.data["scripts"]) / f"{entry['index']}-{job.rank}.json").write_text(json.dumps(scripts), encoding="utf-8")
            world.barrier()
            job.emit("done", index=entry["index"], record={"device_name": device.name})
            gc.collect()
        stop_process_groups()
        job.emit("end")


def _scripts(job: Job, cell: Cell, device: Device, world: Any) -> dict[int, Any]:
    """The scripts of this process's share of the ranks that differ. Who has none left works on, so that the others are not alone."""
    kernel, different = kernel_of(cell), list(classes(cell))
    rounds = -(-len(different) // world.size)
    found: dict[int, Any] = {}
    for turn in range(rounds):
        rank = different[(turn * world.size + world.rank) % len(different)]
        world.barrier()
        script = simulate(cell, rank, kernel, device, device.torch_device, runs=RUNS, each=LAYERS, is_nccl=cell.device == "cuda")
        found[rank] = script.to_dict()
    return found


if __name__ == "__main__":
    main(sys.argv[1])
