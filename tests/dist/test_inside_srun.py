"""Processes that are told by Slurm's variables who they are: one job, one port, a rank that is killed, and a world that does not fit together."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import pytest

from cpbench.cluster.inside import free_port

from .launches import SECONDS, srun, started, timed_passes, until

CELLS = ["--seq", "128", "--layouts", "cp1,cp2", "--strategy", "ring,allgather", "-o", "r.json"]
SWEEP = [sys.executable, "-m", "cpbench", "sweep", *CELLS, "--set", "timing.min_samples=40", "--set", "timing.max_samples=40"]


@pytest.mark.timeout(600)  # three groups of ranks, which a busy machine starts slowly
def test_a_rank_that_is_killed_costs_its_cell_and_the_launch_goes_on(tmp_path: Path) -> None:
    port = free_port()
    with started(*[(SWEEP, srun(rank, 2, port)) for rank in (0, 1)], folder=tmp_path) as (first, second):
        until(lambda: timed_passes(tmp_path / "0", 1) >= 2 or first.poll() is not None, "the first cell of two ranks never began")
        (rank,) = psutil.Process(second.pid).children()
        rank.kill()
        codes = first.wait(SECONDS), second.wait(SECONDS)
    assert codes == (5, 0), (tmp_path / "0" / "log").read_text()
    cells = json.loads((tmp_path / "0" / "r.json").read_text())["cells"]
    assert [cell["status"] for cell in cells] == ["ok", "crash", "ok"]
    assert cells[1]["reason"].startswith("rank 1 was killed by SIGKILL")
    assert (tmp_path / "1" / "log").read_text() == "", "only rank 0 speaks"


def test_ranks_of_different_worlds_are_refused_with_one_sentence(tmp_path: Path) -> None:
    port = free_port()
    commands = [(SWEEP, srun(0, 2, port)), (SWEEP, srun(1, 4, port, node=1))]
    with started(*commands, folder=tmp_path) as (first, second):
        assert (first.wait(SECONDS), second.wait(SECONDS)) == (2, 2)
    said = (tmp_path / "0" / "log").read_text()
    assert "Rank 1 was started as one of 4 ranks, rank 0 as one of 2." in said and "Start all nodes with the same number" in said
    assert "Traceback" not in (tmp_path / "1" / "log").read_text()
    assert not (tmp_path / "0" / "r.json").exists()
