"""Two hosts, each a network namespace with its own address and files, under torchrun's c10d rendezvous: a host that dies, and the sequel."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cpbench.cluster import inside

from .launches import SECONDS, Hosts, started, timed_passes, two_hosts, until

SWEEP = ["sweep", "--seq", "128", "--cp", "2", "--strategy", "ring", "-o", "r.json"]
SLOW = ["--set", "timing.min_samples=40", "--set", "timing.max_samples=40"]


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    try:
        with two_hosts() as made:
            yield made
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces are not permitted here: {error}")


@pytest.mark.timeout(600)  # five groups of ranks, which a busy machine starts slowly
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="network namespaces are Linux's")
def test_a_host_that_dies_in_a_cell_ends_the_sweep_and_a_new_launch_completes_it(hosts: Hosts, tmp_path: Path) -> None:
    both = [(hosts.torchrun(host, *SWEEP, *SLOW), {}) for host in (0, 1)]
    with started(*both, folder=tmp_path) as (first, _):
        until(lambda: timed_passes(tmp_path / "0", 1) >= 2 or first.poll() is not None, "the cell of two ranks never began")
        hosts.die(1)
        assert first.wait(inside.SILENT_SECONDS + SECONDS) != 0
    said = (tmp_path / "0" / "log").read_text()
    assert "exitcode  : 130" in said and "The launch is over: rank 1 has not been heard of for 15 s" in said, said
    stored = json.loads((tmp_path / "0" / "r.json").read_text())
    assert [cell["status"] for cell in stored["cells"]] == ["ok", "interrupted"], "the finished cell is kept"
    assert stored["cells"][1]["reason"] == "interrupted in round 1 of 1: rank 1 has not been heard of for 15 s"
    assert stored["environment"]["nodes"] == 2 and not stored["run"]["complete"]

    hosts.up(1)
    both = [(hosts.torchrun(host, "sweep", "--resume", "-o", "r.json"), {}) for host in (0, 1)]
    with started(*both, folder=tmp_path) as processes:
        codes = [process.wait(SECONDS) for process in processes]
    assert codes == [0, 0], (tmp_path / "0" / "log").read_text()
    resumed = json.loads((tmp_path / "0" / "r.json").read_text())
    assert [cell["status"] for cell in resumed["cells"]] == ["ok", "ok"] and resumed["run"]["complete"]
    assert resumed["cells"][0]["metrics"] == stored["cells"][0]["metrics"], "it was not run again"
    assert not (tmp_path / "1" / "r.json").exists(), "only the first host keeps files"
