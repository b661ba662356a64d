"""Reading clocks and load while cells are timed: NVML for the GPUs in use, psutil for the cores, on a thread of the driver.

The thread runs on the machine that is measured, so it reads as often as a small part of a core allows and no oftener. What the readings
say is decided in clock_record.py; where a source is missing, nothing is recorded and nothing is complained about.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from cpbench.clock_record import ClockRound, CpuReading, GpuReading, cpu_clocks, gpu_clocks
from cpbench.launch import LAUNCH

GPU_INTERVAL, CPU_INTERVAL = 0.05, 0.5  # seconds between two readings, where they cost little
# Of a core, for the readings of a source; waking the thread comes to that. Measured with 10 processes: 0.13% of a core without GPUs, and 0.5%
# with eight whose readings cost nothing.
GPU_SHARE, CPU_SHARE = 0.002, 0.001

ReadCores = Callable[[], CpuReading]
ReadGpus = Callable[[], list[GpuReading]]
OpenCores = Callable[[], ReadCores]
OpenGpus = Callable[[Sequence[str]], ReadGpus | None]


class Clocks(Protocol):
    """What the driver asks of whoever watches the machine."""

    def group(self, gpus: Sequence[str]) -> None:
        """The ranks are up; the NVML names of their GPUs, in the order of the ranks."""

    def begin(self) -> None:
        """Timed passes are about to start."""

    def end(self) -> ClockRound | None:
        """They are over; None where they had not begun."""


class Unwatched:
    """Reads nothing."""

    def group(self, gpus: Sequence[str]) -> None: ...

    def begin(self) -> None: ...

    def end(self) -> ClockRound | None:
        return None


class Watcher:
    """The clocks of this machine. The sources are opened for each group of ranks, whose processes and GPUs they are about."""

    def __init__(self, usable_cores: int, open_cores: OpenCores | None = None, open_gpus: OpenGpus | None = None) -> None:
        self._usable_cores = usable_cores
        self._open_cores, self._open_gpus = open_cores or Cores, open_gpus or open_nvml
        self._sources: tuple[ReadCores, ReadGpus | None] | None = None
        self._window: _Window | None = None

    def group(self, gpus: Sequence[str]) -> None:
        """Opened now, while nothing is timed: finding the processes takes milliseconds."""
        self._sources = self._open_cores(), self._open_gpus(gpus) if gpus else None

    def begin(self) -> None:
        self.end()  # that of a group that failed
        if self._sources:
            self._window = _Window(*self._sources)

    def end(self) -> ClockRound | None:
        window, self._window = self._window, None
        return window.close(self._usable_cores) if window else None


class _Window:
    """From the first timed pass to the end of the last one."""

    def __init__(self, cores: ReadCores, gpus: ReadGpus | None) -> None:
        self._cores, self._gpus = _Series(cores, CPU_INTERVAL, CPU_SHARE), _Series(gpus, GPU_INTERVAL, GPU_SHARE) if gpus else None
        self._all: list[_Series] = [self._cores, *([self._gpus] if self._gpus else [])]
        self._start, self._over = time.monotonic(), threading.Event()
        for series in self._all:
            series.take()
        self._thread = threading.Thread(target=self._sample, name="clocks", daemon=True)
        self._thread.start()

    def close(self, usable_cores: int) -> ClockRound:
        self._over.set()
        self._thread.join()
        self._cores.take()
        gpus = gpu_clocks(self._gpus.readings) if self._gpus else []
        return ClockRound(seconds=time.monotonic() - self._start, cpu=cpu_clocks(self._cores.readings, usable_cores), gpus=gpus)

    def _sample(self) -> None:
        while not self._over.wait(max(0.0, min(series.due for series in self._all) - time.monotonic())):
            for series in self._all:
                if series.due <= time.monotonic():
                    series.take()


class _Series:
    """Readings of one source, and when the next one is due: later than asked for where a reading costs much."""

    def __init__(self, read: Callable[[], Any], interval: float, share: float) -> None:
        self._read, self._interval, self._share = read, interval, share
        self.readings: list[Any] = []
        self.due = 0.0

    def take(self) -> None:
        begin = time.thread_time()
        self.readings.append(self._read())
        self.due = time.monotonic() + max(self._interval, (time.thread_time() - begin) / self._share)


class Cores:
    """Busy time and clocks of the cores that this process may use, and the time of it and all processes below it, as they are now."""

    def __init__(self) -> None:
        import psutil

        self._psutil = psutil
        self._cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
        first = psutil.Process(os.getppid()) if LAUNCH.get() else psutil.Process()  # who started a launch started all ranks of this node
        self._family = [first, *first.children(recursive=True)]
        self._seconds: dict[int, float] = {}

    def __call__(self) -> CpuReading:
        times = self._psutil.cpu_times(percpu=True)
        mine = [times[core] for core in self._cores if core < len(times)]
        busy = tuple(sum(getattr(core, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq")) for core in mine)
        stolen = tuple(getattr(core, "steal", 0.0) for core in mine)
        return CpuReading(time.monotonic(), busy, stolen, self._own(), self._mhz())

    def _own(self) -> float:
        """Seconds of our processes; of one that has ended, those that were read last."""
        for process in self._family:
            with contextlib.suppress(self._psutil.Error):
                used = process.cpu_times()
                self._seconds[process.pid] = used.user + used.system
        return sum(self._seconds.values())

    def _mhz(self) -> tuple[float, ...] | None:
        try:
            clocks = [core.current for core in self._psutil.cpu_freq(percpu=True) or []]
        except (OSError, NotImplementedError, RuntimeError, AttributeError):  # what psutil raises where the system does not say
            return None
        chosen = tuple(clocks[core] for core in self._cores) if len(clocks) > max(self._cores) else tuple(clocks[:1] * len(self._cores))
        return chosen if any(chosen) else None


def open_nvml(names: Sequence[str]) -> ReadGpus | None:
    """What reads these GPUs; None where NVML is missing or does not know one of them. It stays open until the process ends."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByUUID(name) for name in names]
    except Exception:  # no library, no driver, or a broken one
        return None

    def value(ask: Callable[..., Any], *arguments: Any) -> Any:
        """None where a GPU or a driver does not tell."""
        try:
            return ask(*arguments)
        except pynvml.NVMLError:
            return None

    def one(handle: Any) -> GpuReading:
        milliwatts = value(pynvml.nvmlDeviceGetPowerUsage, handle)
        return GpuReading(
            sm_mhz=value(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
            power_w=None if milliwatts is None else milliwatts / 1e3,
            temperature_c=value(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
            reasons=value(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle) or 0,
        )

    return lambda: [one(handle) for handle in handles]
