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
from typing import Protocol

import torch


class Device(Protocol):
    """One rank's device."""

    torch_device: torch.device
    name: str

    def time(self, run: Callable[[], object]) -> float:
        """Seconds from the start of `run` to the moment the device has finished it."""

    def reset_peaks(self) -> None:
        """Start a new peak measurement."""

    def peaks(self) -> dict[str, int]:
        """Peak bytes since the last reset, by the names of `results.Memory`."""


class Cpu:
    """Host memory and the monotonic clock."""

    def __init__(self) -> None:
        self.torch_device = torch.device("cpu")
        self.name = "cpu"

    def time(self, run: Callable[[], object]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

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

    def __init__(self, index: int) -> None:
        kind = torch.accelerator.current_accelerator()
        if kind is None:
            raise RuntimeError("this PyTorch sees no accelerator")
        torch.accelerator.set_device_index(index)
        self.torch_device = torch.device(kind.type, index)
        self.name = torch.cuda.get_device_name(index) if kind.type == "cuda" else kind.type

    def time(self, run: Callable[[], object]) -> float:
        start, stop = (torch.Event(self.torch_device.type, enable_timing=True) for _ in range(2))
        torch.accelerator.synchronize()
        start.record()
        run()
        stop.record()
        torch.accelerator.synchronize()
        return float(start.elapsed_time(stop)) / 1e3

    def reset_peaks(self) -> None:
        torch.accelerator.synchronize()
        torch.accelerator.reset_peak_memory_stats()

    def peaks(self) -> dict[str, int]:
        torch.accelerator.synchronize()
        return {
            "peak_allocator_bytes": int(torch.accelerator.max_memory_allocated()),
            "peak_reserved_bytes": int(torch.accelerator.max_memory_reserved()),
        }


def open_device(kind: str, local_rank: int) -> Device:
    """This rank's device: `cpu`, or the accelerator with the rank's local index."""
    return Cpu() if kind == "cpu" else Accelerator(local_rank)
