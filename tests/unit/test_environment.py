"""The machine and its record: what is in it, what must not be, and when two are the same."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from cpbench import environment
from cpbench.doctor import findings
from cpbench.environment import Machine, capture, check_same, describe, detect_machine, difference, fingerprint, usable_cores
from cpbench.errors import CpbenchError

CPU = Machine("cpu", 0, 2, 8 << 30, "a CPU")


def test_this_machine_is_detected() -> None:
    machine = detect_machine()
    assert machine.device in ("cpu", "cuda") and machine.cores >= 1 and machine.memory_bytes > 1 << 20
    assert (machine.devices > 0) == (machine.device == "cuda")


def test_cores_are_those_that_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.setattr(environment, "_cgroup_minimum", lambda read: None)
    assert usable_cores() == 16
    for quota, cores in ((2.0, 2), (2.5, 3), (0.2, 1), (64.0, 16)):
        monkeypatch.setattr(environment, "_cgroup_minimum", lambda read, quota=quota: quota)
        assert usable_cores() == cores


@pytest.mark.parametrize(
    ("files", "cores", "memory"),
    [
        ({"cpu.max": "200000 100000\n", "memory.max": "1073741824\n"}, 2.0, 2**30),
        ({"cpu.max": "max 100000\n", "memory.max": "max\n"}, None, None),
        ({"cpu.cfs_quota_us": "150000", "cpu.cfs_period_us": "100000", "memory.limit_in_bytes": "4096"}, 1.5, 4096),
        ({"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"}, None, None),
        ({}, None, None),
    ],
)
def test_limits_of_a_control_group(tmp_path: Path, files: dict[str, str], cores: float | None, memory: float | None) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert environment._quota(tmp_path) == cores
    assert environment._memory_limit(tmp_path) == memory


def test_only_allowed_variables_and_no_host_name_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    monkeypatch.setattr(socket, "gethostname", lambda: "secret-host-7")
    text = json.dumps(capture(CPU))
    assert '"NCCL_DEBUG": "WARN"' in text
    assert "hunter2" not in text and "AWS" not in text and "secret-host-7" not in text
    assert os.uname().nodename == "localhost" or os.uname().nodename not in text


def test_equal_environments_pass_and_the_first_difference_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    here = capture(CPU)
    check_same(json.loads(json.dumps(here)), here)
    check_same({**here, "kernel_release": "other", "running": {"2": {}}}, here)  # not what decides about times
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    with pytest.raises(CpbenchError) as caught:
        check_same(here, capture(replace(CPU, cores=64)))
    assert "cores was 2, is 64" in caught.value.message and "variables.NCCL_ALGO was not there, is Tree" in caught.value.message
    assert caught.value.exit_code == 2


def test_difference_joins_nested_names() -> None:
    assert difference({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}}) == [("a.c", 2, 4), ("d", 3, None)]
    assert fingerprint({})["device"] is None


def test_a_machine_in_one_line() -> None:
    assert describe(CPU) == "2 cores, 8.00 GiB, a CPU"
    cuda = Machine("cuda", 4, 1, 8 << 30, "a CPU", ("an H200",) * 4, 141 << 30)
    assert describe(cuda) == "4 x an H200, 141 GiB each; 1 core, 8.00 GiB, a CPU"


def test_the_doctor_finds_this_machine_usable() -> None:
    found = {finding.name: finding for finding in findings(detect_machine())}
    assert set(found) == {"python", "torch", "backend", "machine", "gpu", "loopback", "temporary folder"}
    assert all(finding.ok for finding in found.values()), found


@pytest.mark.parametrize("version", [None, "2.9.1", "2.10.0+cpu"])
def test_the_doctor_says_what_to_do_about_torch(monkeypatch: pytest.MonkeyPatch, version: str | None) -> None:
    monkeypatch.setattr("cpbench.doctor.package_version", lambda name: version)
    torch = next(finding for finding in findings(CPU) if finding.name == "torch")
    assert not torch.ok and "nstall" in torch.hint
