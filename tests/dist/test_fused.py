"""PyTorch's products that are fused with a gather and a scattered sum: that they are called as they are meant, over real process groups.

They run on CUDA. Here PyTorch's own reference of them stands in, which is what they are on a machine without symmetric memory.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from cpbench.distributed.collectives import ProcessGroup, Recorder, new_process_group, start_process_groups, stop_process_groups

reference = torch.library.Library("symm_mem", "IMPL")
reference.impl("fused_all_gather_matmul", symmetric._fused_all_gather_matmul_fallback, "CPU")
reference.impl("fused_matmul_reduce_scatter", symmetric._fused_matmul_reduce_scatter_fallback, "CPU")
start_process_groups(torch.device("cpu"))
rank, halves = dist.get_rank(), [(0, 1), (2, 3)]
groups = [new_process_group(ranks) for ranks in (range(4), *halves)]
for ranks, group in ((range(4), groups[0]), (halves[rank // 2], groups[1 + rank // 2])):
    plain, fused = (ProcessGroup("tp", ranks, list(ranks).index(rank), Recorder(), group) for _ in range(2))
    fused._is_nccl = True
    torch.manual_seed(rank)
    block, weights, rows, weight = torch.randn(6, 8), [torch.randn(5, 8), torch.randn(3, 8)], torch.randn(12, 8), torch.randn(5, 8)
    for one, other in zip(plain.gather_products(block, weights), fused.gather_products(block, weights), strict=True):
        torch.testing.assert_close(other, one)
        assert one.shape == (6 * len(ranks), one.shape[1])
    torch.testing.assert_close(fused.product_scatter(rows, weight), plain.product_scatter(rows, weight))
    assert fused.recorder.traffic == plain.recorder.traffic
stop_process_groups()
"""


@pytest.mark.timeout(120)
def test_fused_products_are_those_of_a_gather_and_of_a_scattered_sum(tmp_path):
    script = tmp_path / "fused.py"
    script.write_text(textwrap.dedent(PROGRAM))
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", str(script)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
