"""Every layout of 2, 4 and 8 ranks gives the first tokens and logits of one device, on real gloo processes (oversubscribed)."""

import re
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("ranks", "layouts"), [(2, 4), (8, 20)])
def test_every_layout_gives_the_answer_of_one_device_and_makes_each_process_group_once(ranks, layouts):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "tests.dist.layout_worker"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=560, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "wrong" not in done.stdout, done.stdout
    assert int(re.search(r"right: (\d+)", done.stdout).group(1)) >= 2 * layouts + 2
    created, distinct, smallest = map(int, re.search(r"groups: (\d+) created, (\d+) distinct, smallest (\d+) ranks", done.stdout).groups())
    assert created == distinct, "a rank list got two process groups"
    assert smallest > 1, "a group of one rank needs no process group"
