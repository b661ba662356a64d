"""Scripts and manifests: bash and YAML read them, they run the very command, and what they cannot say is refused. The page about clusters is true."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from .conftest import Cpbench, Golden

PAGE = Path(__file__).parents[2] / "docs" / "clusters.md"
OUTPUT = re.compile(r"<!-- output: (.*?) -->\n(.*?)<!-- end of output -->", re.DOTALL)
SWEEP = ["sweep", "--seq", "36k", "--cp", "16", "--set", "timing.precision=1%", "-o", "it's; here.json"]
KUBERNETES = ["launch", "kubernetes", "--nodes", "3", "--gpus-per-node", "4", "--image", "registry/cpbench:1"]


def test_help(cpbench_command: Cpbench, golden: Golden) -> None:
    golden("help_launch", cpbench_command("launch", "--help").out)


def test_the_script_runs_the_very_command_on_every_task(cpbench_command: Cpbench) -> None:
    ran = cpbench_command("launch", "slurm", "--nodes", "3", "--gpus-per-node", "4", "--time", "90m", "--partition", "gpu", "--", *SWEEP)
    assert ran.code == 0, ran.err
    subprocess.run(["bash", "-n"], input=ran.out, text=True, check=True)
    options = set(re.findall(r"^#SBATCH --(\S+)$", ran.out, re.MULTILINE))
    assert {"nodes=3", "ntasks-per-node=4", "gpus-per-node=4", "time=01:30:00", "partition=gpu"} <= options
    said = subprocess.run(["bash", "-c", "srun() { printf '%s\\0' \"$@\"; }\n" + ran.out], capture_output=True, text=True, check=True).stdout
    assert said.split("\0")[-len(SWEEP) - 2 : -1] == ["cpbench", *SWEEP]


def test_a_train_job_runs_the_very_command(cpbench_command: Cpbench) -> None:
    made = yaml.safe_load(cpbench_command(*KUBERNETES, "--namespace", "team", "--", *SWEEP).out)
    assert (made["kind"], made["metadata"]) == ("TrainJob", {"name": "cpbench", "namespace": "team"})
    trainer = made["spec"]["trainer"]
    assert trainer["command"] == ["torchrun", "-m", "cpbench", *SWEEP]
    assert (trainer["numNodes"], trainer["numProcPerNode"], trainer["resourcesPerNode"]) == (3, 4, {"limits": {"nvidia.com/gpu": 4}})


def test_a_pytorch_job_has_a_master_and_the_other_nodes(cpbench_command: Cpbench) -> None:
    made = yaml.safe_load(cpbench_command(*KUBERNETES, "--kind", "pytorchjob", "--claim", "results", "--", *SWEEP).out)
    roles = made["spec"]["pytorchReplicaSpecs"]
    assert {name: role["replicas"] for name, role in roles.items()} == {"Master": 1, "Worker": 2} and made["spec"]["nprocPerNode"] == "4"
    for role in roles.values():
        (container,) = role["template"]["spec"]["containers"]
        assert container["command"] == ["torchrun", "-m", "cpbench", *SWEEP] and container["workingDir"] == "/cpbench"
        assert {volume["name"] for volume in role["template"]["spec"]["volumes"]} == {mount["name"] for mount in container["volumeMounts"]}


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ("slrm -- sweep", "Unknown system 'slrm'", "'slurm'"),
        ("slurm", "no command to launch", "behind two dashes"),
        ("slurm -- swep --cp 2", "'swep'", "'sweep'"),
        ("slurm --nodes 0 -- sweep", "--nodes 0", "the nearest is 1"),
        ("slurm --time soon -- sweep", "soon", "90"),
        ("slurm --partition 'a b' -- sweep", "--partition 'a b'", "for example gpu"),
        ("slurm --claim c -- sweep", "--claim is not for slurm", "Leave --claim out"),
        ("kubernetes -- sweep", "none is given", "--image"),
        ("kubernetes --image i --claim c -- sweep", "TrainJob takes its volumes", "--kind pytorchjob"),
        ("kubernetes --image i --kind job -- sweep", "'job'", "pytorchjob"),
        ("kubernetes --image i --time 1h -- sweep", "--time is not for kubernetes", "Leave --time out"),
    ],
)
def test_what_is_no_launch_is_refused(arguments: str, message: str, hint: str, cpbench_command: Cpbench) -> None:
    ran = cpbench_command("launch", *shlex.split(arguments))
    assert ran.code == 2 and not ran.out
    error, _, hinted = ran.err.partition("hint:")
    assert message in error and hint in hinted, ran.err


def test_the_page_shows_what_is_printed(request: pytest.FixtureRequest, cpbench_command: Cpbench) -> None:
    text = PAGE.read_text(encoding="utf-8")
    (shown,) = OUTPUT.findall(text)
    block = f"```text\n{cpbench_command(*shlex.split(shown[0])).out}```\n"
    if request.config.getoption("--regenerate", default=False):
        PAGE.write_text(text.replace(shown[1], block), encoding="utf-8")
        pytest.skip("wrote the page's output")
    assert shown[1] == block
    for command in re.findall(r"^cpbench (launch .*)$", text, re.MULTILINE):
        assert cpbench_command(*shlex.split(command)).code == 0, command
