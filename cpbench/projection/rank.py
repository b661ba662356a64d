"""A process that measures what ranks of other world sizes compute: their programs on this device, with nobody else there.

The processes of a group stand for ranks that share this machine, and work at the same time, as those would; each takes its share of the ranks that
differ. What a rank did is written as a script. The first process then works out what follows (projecting.py), while the others wait: who asked
must not work beside what is measured. They wait for each other without a process group: what a rank of another world needs takes its place.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from pathlib import Path

import torch

from cpbench.cell import Cell
from cpbench.distributed.fake import leave
from cpbench.distributed.store import Meeting
from cpbench.kernels import kernel_of
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
        size = job.data["world_size"]
        target = Target(**job.data["target"])
        meeting = Meeting(Path(job.data["events"]).with_name("meeting"), size)
        job.emit("ready", environment=running_environment(device))
        for entry in job.data["cells"]:
            job.start([entry])
            file = Path(job.data["events"]).with_name(f"scripts-{entry['index']}")
            cell = Cell.from_dict(entry["cell"])
            write(file, job.rank, _record(job, cell, device, meeting, target))
            meeting.wait()
            if job.rank == 0:
                found = attempt(entry["cell"], target, passes_of(cell, read(file, size)), device.name)
                job.emit("done", index=entry["index"], record=found.model_dump(mode="json"))
            gc.collect()
            meeting.wait()
        job.emit("end")


def _record(job: Job, cell: Cell, device: Device, meeting: Meeting, target: Target) -> Recorded:
    """Passes of this process's share of the ranks that differ. Who has none left works on, so that the others are not alone."""
    is_cuda = cell.device == "cuda"
    pause = None if is_cuda else target.pause(cell.world_size)  # a stream of a GPU waits by itself, and a thread does not
    kernel, different = kernel_of(cell), list(classes(cell))
    size = job.data["world_size"]
    found: Recorded = {}
    for turn in range(-(-len(different) // size)):
        rank = different[(turn * size + job.rank) % len(different)]
        meeting.wait()
        began, found[rank] = time.perf_counter(), []
        for script in recordings(cell, rank, kernel, device, device.torch_device, each=LAYERS, is_nccl=is_cuda, pause=pause):
            found[rank].append(script)
            if len(found[rank]) >= LEAST and (len(found[rank]) == MOST or time.perf_counter() - began > SECONDS):
                break
    leave()
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
