"""Where this process stands in a launch that cpbench did not begin: what torchrun or srun say in the environment.

Pure: nothing is connected, and torch is not imported. Whether the processes of a launch agree is found out in roster.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from cpbench.errors import CpbenchError

NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PORTS = range(15_000, 25_000)  # below those that systems give away by themselves


@dataclass(frozen=True)
class Place:
    """One process of a launch. `address` and `port`: of the store where its processes meet; `serves`: this process opens it."""

    rank: int
    world_size: int
    node: int
    local_rank: int
    address: str
    port: int
    serves: bool


def place_of(environment: Mapping[str, str]) -> Place | None:
    """The place that an environment describes; None outside of a launch, and in one of a single process, which starts ranks as ever.

    Raises CpbenchError for a description that is not whole.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        found = _torchrun(environment)
    elif "SLURM_STEP_NODELIST" in environment and "SLURM_PROCID" in environment:  # a batch script without srun has no list of its step's nodes
        found = _srun(environment)
    else:
        return None
    if found.rank >= found.world_size:
        raise CpbenchError(
            f"This process is rank {found.rank} of {found.world_size} ranks.", f"Ranks go from 0 to {found.world_size - 1}: look at RANK and WORLD_SIZE."
        )
    return found if found.world_size > 1 else None


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: `gpu[03-05,9],login1` -> `gpu03`."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", nodes)
    if not found:
        raise CpbenchError(f"SLURM_STEP_NODELIST={nodes[:60]!r} is no list of nodes.", "Set MASTER_ADDR to the host of rank 0.")
    return "".join(part or "" for part in found.groups())


def _torchrun(environment: Mapping[str, str]) -> Place:
    """Also what other launchers of PyTorch programs set: rank 0 opens the store where torchrun's agent has not."""
    missing = [name for name in NEEDED if name not in environment]
    if missing:
        hint = "Start it with torchrun or srun, which set them all; or unset RANK and WORLD_SIZE to measure on this machine alone."
        raise CpbenchError(f"RANK and WORLD_SIZE are set as in a launch of several processes, and {', '.join(missing)} is not.", hint)
    rank, local_rank = _number(environment, "RANK"), _number(environment, "LOCAL_RANK")
    node = _number(environment, "GROUP_RANK") if "GROUP_RANK" in environment else rank - local_rank
    serves = rank == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return Place(rank, _number(environment, "WORLD_SIZE"), node, local_rank, environment["MASTER_ADDR"], _port(environment), serves)


def _srun(environment: Mapping[str, str]) -> Place:
    """The first host of the step, and a port made from the job's number, unless MASTER_ADDR and MASTER_PORT say otherwise."""
    rank = _number(environment, "SLURM_PROCID")
    size = _number(environment, "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS")
    address = environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"])
    job = sum(_number(environment, name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID") if name in environment)
    port = _port(environment) if "MASTER_PORT" in environment else PORTS[job % len(PORTS)]
    return Place(rank, size, _number(environment, "SLURM_NODEID"), _number(environment, "SLURM_LOCALID"), address, port, rank == 0)


def _port(environment: Mapping[str, str]) -> int:
    port = _number(environment, "MASTER_PORT")
    if not 0 < port < 1 << 16:
        raise CpbenchError(f"MASTER_PORT={port} is no port.", f"Ports go from 1 to {(1 << 16) - 1}; the nearest is {min(max(port, 1), (1 << 16) - 1)}.")
    return port


def _number(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise CpbenchError(f"{name}={text[:40]!r} is not a number.", "It is set by torchrun or srun: is something else setting it too?")
    return int(text)
