"""The thread that reads, with sources that are scripts; the real cores of this machine; and NVML as a module that pretends."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from cpbench import clocks
from cpbench.clock_record import CpuReading, GpuReading
from cpbench.clocks import Cores, Watcher, open_nvml


def spin(seconds: float) -> None:
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


class Machine:
    """Sources that count their readings."""

    def __init__(self, cost: float = 0.0) -> None:
        self.cost, self.cores_read, self.opened = cost, 0, list[Sequence[str]]()

    def cores(self) -> CpuReading:
        self.cores_read += 1
        return CpuReading(time.monotonic(), (0.0,), (0.0,), 0.0)

    def open_gpus(self, names: Sequence[str]) -> clocks.ReadGpus:
        self.opened.append(names)

        def read() -> list[GpuReading]:
            spin(self.cost)
            return [GpuReading(1980.0, 300.0, 40.0) for _ in names]

        return read

    def watcher(self) -> Watcher:
        return Watcher(1, lambda: self.cores, self.open_gpus)


def test_a_window_has_readings_at_its_begin_and_its_end_and_between() -> None:
    machine = Machine()
    watcher = machine.watcher()
    watcher.group(["GPU-a", "GPU-b"])
    watcher.begin()
    time.sleep(0.4)
    found = watcher.end()
    assert found is not None and machine.opened == [["GPU-a", "GPU-b"]]
    assert 0.4 <= found.seconds < 5.0 and [gpu.rank for gpu in found.gpus] == [0, 1]
    assert 2 <= found.gpus[0].samples <= 9  # at most 20 a second
    assert found.cpu is not None and found.cpu.samples == machine.cores_read >= 2
    assert watcher.end() is None
    assert "clocks" not in [thread.name for thread in threading.enumerate()]


def test_readings_that_cost_much_are_rare() -> None:
    machine = Machine(cost=0.01)
    watcher = machine.watcher()
    watcher.group(["GPU-a"])
    watcher.begin()
    time.sleep(0.5)  # the second is due after 5 s
    found = watcher.end()
    assert found is not None and found.gpus[0].samples == 1


def test_without_a_group_or_gpus_there_is_nothing_to_read() -> None:
    machine = Machine()
    watcher = machine.watcher()
    watcher.begin()
    assert watcher.end() is None
    watcher.group([])
    watcher.begin()
    found = watcher.end()
    assert found is not None and found.gpus == [] and machine.opened == []


def test_a_window_that_a_failure_left_open_is_closed_by_the_next() -> None:
    watcher = Machine().watcher()
    watcher.group([])
    watcher.begin()
    watcher.begin()
    assert [thread.name for thread in threading.enumerate()].count("clocks") == 1
    watcher.end()


def test_the_cores_of_this_machine_and_the_time_of_children() -> None:
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        read = Cores()
        before = read()
        time.sleep(0.6)
        after = read()
    finally:
        child.kill()
        child.wait()
    assert len(after.busy) == len(after.stolen) == len(os.sched_getaffinity(0))
    assert after.own - before.own > 0.05  # the child is ours
    assert sum(after.busy) > sum(before.busy) and after.time > before.time
    assert after.mhz is None or len(after.mhz) == len(after.busy)
    assert read().own >= after.own  # what a process used stays counted when it has ended


class Psutil(SimpleNamespace):
    """Two processes and three cores, of which the affinity has the first and the last."""

    class Error(Exception):
        pass

    class NoSuchProcess(Error):  # noqa: N818 - psutil's name
        pass

    def __init__(self, freq: Any) -> None:
        core = SimpleNamespace(user=1.0, nice=0.5, system=0.25, idle=9.0, iowait=9.0, irq=0.125, softirq=0.125, steal=0.75)
        self.alive = True
        super().__init__(cpu_times=lambda percpu: [core, SimpleNamespace(user=99.0), SimpleNamespace(user=4.0, system=1.0)], cpu_freq=freq)

    def Process(self) -> Any:  # noqa: N802
        def times() -> Any:
            if not self.alive:
                raise self.NoSuchProcess
            return SimpleNamespace(user=1.0, system=0.5, children_user=77.0)

        rank = SimpleNamespace(pid=2, cpu_times=times)
        return SimpleNamespace(pid=1, cpu_times=lambda: SimpleNamespace(user=2.0, system=0.0), children=lambda recursive: [rank] if recursive else [])


def unreadable(percpu: bool) -> Any:
    raise NotImplementedError


@pytest.mark.parametrize(
    ("freq", "mhz"),
    [
        (lambda percpu: [SimpleNamespace(current=1.0), SimpleNamespace(current=2.0), SimpleNamespace(current=3.0)], (1.0, 3.0)),
        (lambda percpu: [SimpleNamespace(current=2.4)], (2.4, 2.4)),  # one number for all
        (lambda percpu: [], None),
        (lambda percpu: [SimpleNamespace(current=0.0)] * 3, None),
        (unreadable, None),
    ],
)
def test_only_usable_cores_and_only_our_processes(freq: Any, mhz: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Psutil(freq)
    monkeypatch.setitem(sys.modules, "psutil", fake)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2})
    read = Cores()
    reading = read()
    assert (reading.busy, reading.stolen, reading.own, reading.mhz) == ((2.0, 5.0), (0.75, 0.0), 3.5, mhz)
    fake.alive = False
    assert read().own == 3.5


class FakeNvml(SimpleNamespace):
    """Two GPUs, of which one does not tell its power."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0

    def __init__(self) -> None:
        super().__init__(initialised=0)

    def nvmlInit(self) -> None:  # noqa: N802
        self.initialised += 1

    def nvmlDeviceGetHandleByUUID(self, name: str) -> str:  # noqa: N802
        if name not in ("GPU-a", "GPU-b"):
            raise self.NVMLError
        return name

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:  # noqa: N802
        assert kind == self.NVML_CLOCK_SM
        return 1980 if handle == "GPU-a" else 1410

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:  # noqa: N802
        if handle == "GPU-b":
            raise self.NVMLError
        return 123_456

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:  # noqa: N802
        return 41

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> int:  # noqa: N802
        return 0x4


def test_nvml_reads_the_gpus_of_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    read = open_nvml(["GPU-b", "GPU-a"])
    assert read is not None and fake.initialised == 1
    assert read() == [GpuReading(1410, None, 41, 0x4), GpuReading(1980, 123.456, 41, 0x4)]
    assert open_nvml(["GPU-a", "GPU-elsewhere"]) is None


def test_without_nvml_there_are_no_gpus_and_no_noise(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it raises
    assert open_nvml(["GPU-a"]) is None
    assert capsys.readouterr() == ("", "")
