"""What `cpbench doctor` finds: can this machine run a sweep, and if not, what to do. Findings are data; printing them is not done here."""

from __future__ import annotations

import socket
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from cpbench.environment import Machine, describe, package_version
from cpbench.units import format_bytes

MIN_TORCH = (2, 11)
MIN_FREE_BYTES = 256 << 20


class Finding(NamedTuple):
    """One check. `ok` False means that sweeps cannot run here; the hint says what to do about it (or how to get more)."""

    name: str
    ok: bool
    detail: str
    hint: str = ""


def findings(machine: Machine) -> list[Finding]:
    """All checks, in the order in which they matter. Imports torch where it is installed."""
    return [_python(), _torch(), _backend(machine), Finding("machine", True, describe(machine)), _gpus(machine), _loopback(), _temporary_folder()]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("python", sys.version_info >= (3, 11), version, "" if sys.version_info >= (3, 11) else "Install Python 3.11 or newer.")


def _torch() -> Finding:
    version = package_version("torch")
    if version is None:
        return Finding("torch", False, "not installed", "Run pip install torch.")
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    return Finding("torch", numbers >= MIN_TORCH, version, "" if numbers >= MIN_TORCH else "Install torch 2.11 or newer.")


def _backend(machine: Machine) -> Finding:
    name = "NCCL" if machine.device == "cuda" else "gloo"
    try:
        from cpbench.distributed.collectives import backend_available
    except (ImportError, OSError) as error:
        return Finding("backend", False, f"torch cannot be imported: {str(error).splitlines()[0]}", "Reinstall torch.")
    usable = backend_available(machine.device)
    return Finding(
        "backend", usable, name if usable else f"{name} is not in this torch build", "" if usable else "Install a torch build with torch.distributed."
    )


def _gpus(machine: Machine) -> Finding:
    if machine.device == "cuda":
        return Finding("gpu", True, f"{machine.devices} usable, driver {machine.driver}")
    if machine.gpus:
        detail = f"NVML sees {len(machine.gpus)}, torch can use none"
        return Finding("gpu", True, detail, "Install a CUDA build of torch, and check CUDA_VISIBLE_DEVICES; until then cpbench measures on the CPU.")
    return Finding("gpu", True, "none: cpbench measures on the CPU")


def _loopback() -> Finding:
    name = "lo0" if sys.platform == "darwin" else "lo"
    there = name in {interface for _, interface in socket.if_nameindex()}
    return Finding("loopback", there, name if there else f"no interface {name}", "" if there else "Set GLOO_SOCKET_IFNAME to an interface of this machine.")


def _temporary_folder() -> Finding:
    import shutil

    try:
        folder = Path(tempfile.gettempdir())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return Finding("temporary folder", False, str(error), "Set TMPDIR to a folder that can be written.")
    enough = free >= MIN_FREE_BYTES
    return Finding("temporary folder", enough, f"{folder}, {format_bytes(free)} free", "" if enough else "Free some space, or set TMPDIR to another disk.")
