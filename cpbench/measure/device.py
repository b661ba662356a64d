"""What differs between devices: how a pass is timed, and which allocator statistics exist.

Two implementations: CPU (monotonic clock, resident set), and any accelerator behind `torch.accelerator` and `torch.Event`, which raise
on CPU. Everything else in cpbench is the same for both.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch


class Device(Protocol):
    """One rank's device."""

    torch_device: torch.device
    name: str

    def time(self, run: Callable[[], object]) -> float:
        """Seconds from the start of `run` to the moment the device has finished it."""

    marks_are_free: bool  # so that timed passes may be marked

    def mark(self) -> Any:
        """This moment in the rank's work."""

    def between(self, first: Any, second: Any) -> float:
        """Seconds between two marks, once the work is done."""

    def uuids(self, count: int) -> list[str]:
        """What NVML calls the GPUs of the first `count` ranks, as far as they are on this node; nothing where they have none."""

    def reset_peaks(self) -> None:
        """Start a new peak measurement."""

    def peaks(self) -> dict[str, int]:
        """Peak bytes since the last reset, by the names of `results.Memory`."""


class Cpu:
    """Host memory and the monotonic clock."""

    marks_are_free = True

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self.name = "cpu"

    def time(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def mark(self) -> float:
        return time.perf_counter()

    def between(self, first: float, second: float) -> float:
        return second - first

    def uuids(self, count: int) -> list[str]:
        return []

    def reset_peaks(self) -> None:
        if sys.platform == "linux":
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM; without it the peak is that of the whole process

    def peaks(self) -> dict[str, int]:
        if sys.platform == "linux":
            status = Path("/proc/self/status").read_text()
            line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
            return {"peak_rss_bytes": int(line.split()[1]) * 1024}
        return {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


class Accelerator:
    """The accelerator that torch was built for: events in the stream, and the caching allocator."""

    marks_are_free = False  # an event takes microseconds of the thread that launches kernels

    def __init__(self, index: int, memory_limit: int | None = None) -> None:
        kind = torch.accelerator.current_accelerator()
        if kind is None:
            raise RuntimeError("this PyTorch sees no accelerator")
        torch.accelerator.set_device_index(index)
        self.torch_device = torch.device(kind.type, index)
        self.name = torch.cuda.get_device_name(index) if kind.type == "cuda" else kind.type
        if memory_limit is not None and kind.type == "cuda":
            total = torch.cuda.get_device_properties(index).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, memory_limit / total), index)

    def time(self, run: Callable[[], object]) -> float:
        start, stop = (torch.Event(self.torch_device.type, enable_timing=True) for _ in range(2))
        torch.accelerator.synchronize()
        start.record()
        run()
        stop.record()
        torch.accelerator.synchronize()
        return float(start.elapsed_time(stop)) / 1e3

    def mark(self) -> torch.Event:
        event = torch.Event(self.torch_device.type, enable_timing=True)
        event.record()
        return event

    def between(self, first: torch.Event, second: torch.Event) -> float:
        return float(first.elapsed_time(second)) / 1e3

    def uuids(self, count: int) -> list[str]:
        if self.torch_device.type != "cuda" or torch.version.cuda is None:
            return []
        return [f"GPU-{torch.cuda.get_device_properties(rank).uuid}" for rank in range(min(count, torch.cuda.device_count()))]

    def reset_peaks(self) -> None:
        torch.accelerator.synchronize()
        torch.accelerator.reset_peak_memory_stats()

    def peaks(self) -> dict[str, int]:
        torch.accelerator.synchronize()
        return {
            "peak_allocator_bytes": int(torch.accelerator.max_memory_allocated()),
            "peak_reserved_bytes": int(torch.accelerator.max_memory_reserved()),
        }


def open_device(kind: str, local_rank: int, memory_limit: int | None = None) -> Device:
    """This rank's device: `cpu`, or the accelerator with the rank's local index.

    `memory_limit`: bytes that CUDA's allocator may take. Others cannot be told: there the memory pass holds live tensors against it.
    """
    return Cpu() if kind == "cpu" else Accelerator(local_rank, memory_limit)
