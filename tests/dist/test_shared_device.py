"""The ranks that tests/gpu puts on one GPU, on the CPU: what they run is right here, so that what goes wrong there is the device's."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.dist.shared_worker import cells


def require_right(kind, ranks):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "tests.dist.shared_worker", kind]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == f"right: {len(list(cells(ranks, kind)))}\n"


@pytest.mark.timeout(600)
def test_ranks_that_share_a_device_give_the_answers_of_one():
    require_right("cpu", 2)
