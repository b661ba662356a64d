"""Random batches with prefixes and chunks on real gloo processes, three ranks included; their thousands run on the local backend."""

import re
import subprocess
import sys

import pytest


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_random_batches_give_the_answer_of_one_device_on_processes(ranks):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "tests.dist.batch_worker", "11", "6"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "wrong" not in done.stdout, done.stdout
    assert int(re.search(r"right: (\d+)", done.stdout).group(1)) >= 6 * 10
