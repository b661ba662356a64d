"""The traced steps of one rank, after its timed ones: the torch profiler around a few passes, and the file that it leaves.

Where Nsight Systems looks on, it traces instead: the profiler would disturb it, and CUPTI serves one of them. What the trace says is
found out by the driver (session.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from cpbench.distributed.collectives import Group
from cpbench.measure.device import Device
from cpbench.tracing import spans
from cpbench.tracing.chrome import SUFFIX, write_trace

WARM_UP, ACTIVE = 1, 2  # steps; tracing begins in the first, which also takes what is compiled anew
HOST_FIELDS = ("host_name", "traceName")  # where it ran is not recorded


def traced_steps(run: Callable[[], object], prepare: Callable[[], object], device: Device, world: Group, folder: Path) -> list[list[float]]:
    """Trace a few passes into `folder`. Returns the seconds of every rank for each traced step, by the clock of the timed passes."""
    injected = bool(spans.injected_tools(dict(os.environ)))
    mine = _captured(run, prepare, device, world) if injected else _profiled(run, prepare, device, world, folder / f"rank{world.rank}{SUFFIX}")
    everyone = world.share(mine)
    return [[seconds[step] for seconds in everyone] for step in range(ACTIVE)]


def _profiled(run: Callable[[], object], prepare: Callable[[], object], device: Device, world: Group, file: Path) -> list[float]:
    """Steps under the torch profiler. Without stacks and shapes: they make a trace several times as large."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.torch_device.type == "cuda" else [])]
    steps = schedule(wait=0, warmup=WARM_UP, active=ACTIVE, repeat=1)
    with spans.using(spans.TorchProfile()), profile(activities=activities, schedule=steps, on_trace_ready=lambda done: _write(done, file)) as tool:
        seconds = []
        for _ in range(WARM_UP + ACTIVE):
            seconds.append(_step(run, prepare, device, world))
            tool.step()
    return seconds[WARM_UP:]


def _captured(run: Callable[[], object], prepare: Callable[[], object], device: Device, world: Group) -> list[float]:
    """Steps under Nsight Systems, in the range that it captures."""
    prepare()
    run()  # the warm-up
    with _capture_range(device):
        return [_step(run, prepare, device, world) for _ in range(ACTIVE)]


def _step(run: Callable[[], object], prepare: Callable[[], object], device: Device, world: Group) -> float:
    """One step that all ranks begin together."""
    prepare()
    world.barrier()
    with spans.TRACED():
        return device.time(run)


@contextmanager
def _capture_range(device: Device) -> Iterator[None]:
    """What `nsys --capture-range=cudaProfilerApi` records. On CPU it records from the first traced span on."""
    if device.torch_device.type != "cuda":
        yield
        return
    torch.cuda.profiler.start()
    try:
        yield
    finally:
        torch.cuda.profiler.stop()


def _write(done: Any, file: Path) -> None:
    plain = file.with_suffix(".part")
    done.export_chrome_trace(str(plain))
    data = json.loads(plain.read_text(encoding="utf-8"), strict=False)
    plain.unlink()
    write_trace(file, {name: value for name, value in data.items() if name not in HOST_FIELDS})
