"""Texts that start a command of cpbench on several nodes: an sbatch script for Slurm, a Kubeflow manifest for Kubernetes.

They are printed, to be read, changed and submitted by whoever knows the cluster; nothing is submitted here. A script is text, a manifest is
data that is written as YAML. What the processes do once they run is in session.py.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cpbench.errors import CpbenchError, unknown
from cpbench.units import parse_seconds

SYSTEMS, KINDS = ("slurm", "kubernetes"), ("trainjob", "pytorchjob")
COMMANDS = ("sweep", "maxseq")  # those that measure on ranks of several nodes
MAX_NODES = 1024
FOLDER = "/cpbench"  # where a claim is mounted, and the command runs


@dataclass(frozen=True)
class Asked:
    """A launch: how many nodes, ranks on each (one per GPU, unless `ranks_per_node` says that they are on CPUs), and what cluster it is."""

    nodes: int
    gpus_per_node: int
    ranks_per_node: int | None = None
    partition: str | None = None
    account: str | None = None
    time: str | None = None
    image: str | None = None
    kind: str = KINDS[0]
    namespace: str | None = None
    claim: str | None = None
    name: str = "cpbench"

    @property
    def processes(self) -> int:
        """On each node."""
        return self.ranks_per_node or self.gpus_per_node


def text_of(system: str, asked: Asked, command: Sequence[str]) -> str:
    """What to submit so that every process runs `cpbench COMMAND`. Raises CpbenchError for what cannot be a launch."""
    if system not in SYSTEMS:
        raise unknown("system", system, SYSTEMS)
    if not command:
        raise CpbenchError("There is no command to launch.", f"Put it behind two dashes: cpbench launch {system} --nodes 2 -- sweep --seq 36k --cp 16.")
    if command[0] not in COMMANDS:
        raise unknown("command for several nodes", command[0], COMMANDS)
    for flag, count in (("--nodes", asked.nodes), ("--gpus-per-node", asked.gpus_per_node), ("--ranks-per-node", asked.processes)):
        if not 1 <= count <= MAX_NODES:
            raise CpbenchError(f"{flag} {count} is not a number of them.", f"It goes from 1 to {MAX_NODES}; the nearest is {min(max(count, 1), MAX_NODES)}.")
    _refuse_useless(system, asked)
    return slurm(asked, command) if system == "slurm" else kubernetes(asked, command)


def slurm(asked: Asked, command: Sequence[str]) -> str:
    """An sbatch script: one task is one rank."""
    options = {
        "job-name": asked.name,
        "nodes": asked.nodes,
        "ntasks-per-node": asked.processes,
        "gpus-per-node": None if asked.ranks_per_node else asked.gpus_per_node,
        "partition": asked.partition,
        "account": asked.account,
        "time": _slurm_time(asked.time) if asked.time else None,
        "output": f"{asked.name}-%j.log",
    }
    image = f" --container-image={shlex.quote(asked.image)}" if asked.image else ""
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None),
        "#SBATCH --exclusive",
        "set -euo pipefail",
        "# Every task is a rank. Rank 0 plans, prints and keeps the result file; layouts with fewer ranks run on the first ones.",
        "# Tasks are not bound to cores, because cpbench divides those of a node among the ranks of a layout.",
        "# If a node dies, submit it again with --resume -o FILE instead of the other flags: finished cells are kept.",
        f"srun --kill-on-bad-exit=1 --cpu-bind=none{image} cpbench {shlex.join(command)}",
    ]
    return "\n".join(lines)


def kubernetes(asked: Asked, command: Sequence[str]) -> str:
    """A manifest of Kubeflow: a TrainJob, or a PyTorchJob of the older operator. torchrun learns nodes and addresses from the operator."""
    import yaml

    if asked.kind not in KINDS:
        raise unknown("kind of manifest", asked.kind, KINDS)
    metadata = {"name": asked.name} | ({"namespace": asked.namespace} if asked.namespace else {})
    run = ["torchrun", "-m", "cpbench", *command]
    made = _train_job(asked, run) if asked.kind == "trainjob" else _pytorch_job(asked, run)
    head = [
        "# Every process that torchrun starts is a rank. Rank 0 plans, prints and keeps the result file; layouts with fewer ranks run on the first ones.",
        "# A file that is to outlive its pod must lie on a volume: "
        + (
            f"the claim {asked.claim} is mounted at {FOLDER}, where the command runs."
            if asked.claim
            else "--claim NAME with --kind pytorchjob, or the runtime's own."
        ),
    ]
    body = {"apiVersion": made.pop("apiVersion"), "kind": made.pop("kind"), "metadata": metadata, **made}
    return "\n".join(head) + "\n" + str(yaml.safe_dump(body, sort_keys=False, width=1000)).rstrip()


def _train_job(asked: Asked, run: list[str]) -> dict[str, Any]:
    trainer: dict[str, Any] = {"image": asked.image, "command": run, "numNodes": asked.nodes, "numProcPerNode": asked.processes}
    if not asked.ranks_per_node:
        trainer["resourcesPerNode"] = {"limits": {"nvidia.com/gpu": asked.gpus_per_node}}
    spec = {"runtimeRef": {"name": "torch-distributed"}, "trainer": trainer}
    return {"apiVersion": "trainer.kubeflow.org/v1alpha1", "kind": "TrainJob", "spec": spec}


def _pytorch_job(asked: Asked, run: list[str]) -> dict[str, Any]:
    mounts: list[dict[str, Any]] = [{"name": "shm", "mountPath": "/dev/shm"}]  # NCCL and gloo on one node go through it; the default is 64 MB
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    container: dict[str, Any] = {"name": "pytorch", "image": asked.image, "command": run, "volumeMounts": mounts}
    if asked.claim:
        mounts.append({"name": "results", "mountPath": FOLDER})
        volumes.append({"name": "results", "persistentVolumeClaim": {"claimName": asked.claim}})
        container["workingDir"] = FOLDER
    if not asked.ranks_per_node:
        container["resources"] = {"limits": {"nvidia.com/gpu": asked.gpus_per_node}}

    def replicas(count: int) -> dict[str, Any]:
        pod = {"containers": [container], "volumes": volumes}
        return {"replicas": count, "restartPolicy": "Never", "template": {"spec": _copied(pod)}}

    roles = {"Master": replicas(1)} | ({"Worker": replicas(asked.nodes - 1)} if asked.nodes > 1 else {})
    return {"apiVersion": "kubeflow.org/v1", "kind": "PyTorchJob", "spec": {"nprocPerNode": str(asked.processes), "pytorchReplicaSpecs": roles}}


def _copied(data: Any) -> Any:
    """The same data without shared parts, which YAML would write as references."""
    if isinstance(data, dict):
        return {name: _copied(value) for name, value in data.items()}
    return [_copied(value) for value in data] if isinstance(data, list) else data


def _slurm_time(text: str) -> str:
    """`90m` as Slurm writes it: 01:30:00."""
    seconds = round(parse_seconds(text))
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"


def _refuse_useless(system: str, asked: Asked) -> None:
    """Raise for a flag that the text would not hold, a name that a cluster would refuse, and an image that is missing."""
    others = {"partition": asked.partition, "account": asked.account, "time": asked.time}
    if system == "slurm":
        others = {"namespace": asked.namespace, "claim": asked.claim, "kind": asked.kind if asked.kind != KINDS[0] else None}
    for flag, value in others.items():
        if value is not None:
            raise CpbenchError(f"--{flag} is not for {system}.", f"Leave --{flag} out.")
    if system == "kubernetes" and not asked.image:
        raise CpbenchError("A manifest names an image, and none is given.", "Give one that has cpbench in it: --image REGISTRY/IMAGE:TAG.")
    if asked.claim and asked.kind == "trainjob":
        raise CpbenchError("A TrainJob takes its volumes from its runtime, not from --claim.", "Use --kind pytorchjob, or leave --claim out.")
    named = {"name": asked.name, "namespace": asked.namespace, "claim": asked.claim, "partition": asked.partition, "account": asked.account}
    for flag, value in named.items():
        lower = flag in ("name", "namespace", "claim")
        if value is not None and not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?" if lower else r"[A-Za-z0-9_.,-]+", value):
            letters = "small letters, digits and dashes" if lower else "letters, digits, dashes, dots and commas"
            raise CpbenchError(f"--{flag} {value[:40]!r} is no name.", f"Names here have {letters}, for example {'cpbench' if lower else 'gpu'}.")
    if asked.image is not None and not re.fullmatch(r"[^\s'\"]+", asked.image):
        raise CpbenchError(f"--image {asked.image[:40]!r} is no image.", "Images have no spaces and quotes: REGISTRY/IMAGE:TAG.")
