"""The machine a sweep runs on: what it is, what of it goes into the result file, and whether two runs had the same.

Nothing here starts a process or holds a device, and torch is imported only where NVML sees an NVIDIA GPU. What the running ranks
see (loaded NCCL, dispatched kernels) is reported by the worker. Host names and the environment as a whole are never recorded.
"""

from __future__ import annotations

import math
import os
import platform
import sys
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import cpbench
from cpbench.errors import CpbenchError
from cpbench.units import format_bytes

ENVIRONMENT_PREFIXES = ("CUDA_", "NCCL_", "TORCH_", "PYTORCH_", "OMP_", "GLOO_")
COMPARED = ("device", "gpus", "cpu", "cores", "nodes", "system", "python", "packages", "driver", "variables", "cpbench", "git")
PACKAGES = ("torch", "numpy", "flash-attn", "nvidia-nccl-cu12", "nvidia-nccl-cu13")


@dataclass(frozen=True)
class Machine:
    """What a plan must know: `device` is cpu or cuda, `devices` the number of GPUs that may be used, on all nodes, `cores` the CPU cores of a node."""

    device: str
    devices: int
    cores: int
    memory_bytes: int
    cpu: str = ""
    gpus: tuple[str, ...] = ()
    gpu_memory_bytes: int = 0
    driver: str | None = None
    nodes: int = 1  # of the launch that this process is inside of; all else is of one node
    ranks_per_node: int | None = None  # None outside of a launch

    @property
    def ranks(self) -> int | None:
        """How many ranks there can be; None where they are started as they are needed."""
        return self.nodes * self.ranks_per_node if self.ranks_per_node else None


def detect_machine() -> Machine:
    """This machine, as this process may use it."""
    names, memory, driver = _nvidia_gpus()
    usable = _torch_gpus() if names else 0
    return Machine(
        device="cuda" if usable else "cpu",
        devices=usable,
        cores=usable_cores(),
        memory_bytes=_memory_bytes(),
        cpu=_cpu_name(),
        gpus=names,
        gpu_memory_bytes=memory,
        driver=driver,
    )


def usable_cores() -> int:
    """Cores that this process may use: its affinity mask, cut by the CPU quota of its control group. At least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_minimum(_quota)
    return max(1, min(count, math.floor(quota + 0.5) if quota is not None else count))


def capture(machine: Machine) -> dict[str, Any]:
    """What the result file says about the machine and the software, as JSON."""
    facts = asdict(machine)
    facts["gpus"] = list(machine.gpus)
    for name in ("nodes", "ranks_per_node") if machine.nodes == 1 else ():  # one node in a launch is like one that is not
        del facts[name]
    return {
        **facts,
        "system": f"{platform.system()} {platform.machine()}",
        "kernel_release": platform.release(),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := package_version(name))},
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith(ENVIRONMENT_PREFIXES)},
        "cpbench": cpbench.__version__,
        "git": git_state(),
    }


@cache
def git_state() -> str | None:
    """Commit of the cpbench checkout, with `+` if files differ from it; None for an installed package."""
    root = Path(cpbench.__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "--short=12", "HEAD")
    return f"{commit}+" if commit and _git(root, "status", "--porcelain", "--untracked-files=no", "--", "cpbench") else commit


def fingerprint(environment: dict[str, Any]) -> dict[str, Any]:
    """The part of a captured environment that must be equal for two files' times to be comparable."""
    return {name: environment.get(name) for name in COMPARED}


def difference(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, value in a, value in b) of every entry of two environments that differs; nested names are joined by dots."""
    flat_a, flat_b = _flatten(a), _flatten(b)
    return [(name, flat_a.get(name), flat_b.get(name)) for name in sorted({*flat_a, *flat_b}) if flat_a.get(name) != flat_b.get(name)]


def check_same(stored: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse to resume in another environment. Raises CpbenchError that names what differs."""
    changed = difference(fingerprint(stored), fingerprint(current))
    if changed:
        shown = "; ".join(f"{name} was {_shown(old)}, is {_shown(new)}" for name, old, new in changed[:4])
        more = f"; and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise CpbenchError(f"The file was measured in another environment: {shown}{more}.", "Start a new file, or say that the mixture is intended.")


def _shown(value: Any) -> str:
    return "not there" if value is None else str(value)[:60]


def _flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat.update(_flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat


def package_version(package: str) -> str | None:
    """The installed version of a distribution, without importing it; None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(root: Path, *arguments: str) -> str | None:
    import subprocess

    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _nvidia_gpus() -> tuple[tuple[str, ...], int, str | None]:
    """Names, smallest memory in bytes, and driver version of the NVIDIA GPUs that NVML sees."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no library, no driver, or a broken one: all mean that there is no GPU to use
        return (), 0, None
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        memory = min((int(pynvml.nvmlDeviceGetMemoryInfo(handle).total) for handle in handles), default=0)
        return tuple(str(pynvml.nvmlDeviceGetName(handle)) for handle in handles), memory, str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return (), 0, None
    finally:
        pynvml.nvmlShutdown()


def _torch_gpus() -> int:
    """GPUs that the installed PyTorch can use; 0 for a CPU build. Creates no CUDA context."""
    try:
        import torch
    except (ImportError, OSError):
        return 0
    return int(torch.cuda.device_count()) if torch.cuda.is_available() else 0


def _memory_bytes() -> int:
    import psutil

    total = int(psutil.virtual_memory().total)
    limit = _cgroup_minimum(_memory_limit)
    return min(total, int(limit)) if limit is not None else total


def _cpu_name() -> str:
    if sys.platform == "darwin":
        import subprocess

        done = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
        return done.stdout.strip() or platform.processor()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cgroup_minimum(read: Any) -> float | None:
    """The tightest limit of the control groups that this process is in (version 2 and version 1)."""
    folders = {Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup/memory")}
    try:
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, inner = line.split(":", 2)
            for controller in controllers.split(","):
                base = Path("/sys/fs/cgroup") / controller
                path = base / inner.lstrip("/")
                folders.update(folder for folder in (path, *path.parents) if folder.is_relative_to(base))
    except (OSError, ValueError):
        pass
    limits = [limit for folder in folders if (limit := read(folder)) is not None]
    return min(limits, default=None)


def _quota(folder: Path) -> float | None:
    """Cores of a control group's CPU quota."""
    if limit := _words(folder / "cpu.max"):
        return float(limit[0]) / float(limit[1]) if limit[0] != "max" else None
    quota, period = _words(folder / "cpu.cfs_quota_us"), _words(folder / "cpu.cfs_period_us")
    return float(quota[0]) / float(period[0]) if quota and period and float(quota[0]) > 0 else None


def _memory_limit(folder: Path) -> float | None:
    words = _words(folder / "memory.max") or _words(folder / "memory.limit_in_bytes")
    return float(words[0]) if words and words[0] != "max" else None


def _words(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").split()
    except OSError:
        return []


def describe(machine: Machine) -> str:
    """One line: `2 cores, 8.00 GiB, AMD EPYC` or `4 x NVIDIA H200, ...`."""
    gpus = (
        f"{machine.devices // machine.nodes} x {machine.gpus[0]}, {format_bytes(machine.gpu_memory_bytes)} each; "
        if machine.device == "cuda" and machine.gpus
        else ""
    )
    cores = "1 core" if machine.cores == 1 else f"{machine.cores} cores"
    nodes = f"{machine.nodes} nodes, each: " if machine.nodes > 1 else ""
    return f"{nodes}{gpus}{cores}, {format_bytes(machine.memory_bytes)}, {machine.cpu}"
