"""The Triton kernel of products in a fixed order, by Triton's interpreter: its arithmetic, not its speed. tests/gpu compiles it."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import torch
from cpbench.deterministic import TILE, run_of
from cpbench.distributed.deterministic import tree_sum
from cpbench.models.invariant_triton import runs_of_products

def whole(x, w):
    return tree_sum(runs_of_products(x, w, run_of(x.shape[1] // TILE)).unbind())

torch.manual_seed(0)
for tiles in (4, 12, 28):
    x, w = torch.randn(70, tiles * TILE).half(), torch.randn(150, tiles * TILE).half()
    exact = x.double() @ w.double().T
    for tp in (1, 2, 4):
        cuts = [slice(rank * x.shape[1] // tp, (rank + 1) * x.shape[1] // tp) for rank in range(tp)]
        assert torch.equal(tree_sum([whole(x[:, cut], w[:, cut]) for cut in cuts]), whole(x, w)), (tiles, tp)
    assert (whole(x, w).double() - exact).norm() / exact.norm() < 1e-3
    one = runs_of_products(x, w, None)
    assert one.shape == (1, 70, 150) and (one[0].double() - exact).norm() / exact.norm() < 3e-4
assert runs_of_products(x[:0], w, None).shape == (1, 0, 150)
try:
    runs_of_products(x.T, w, None)
except ValueError:
    pass
else:
    raise AssertionError("strided inputs")
"""


def test_products_cut_over_ranks_have_the_same_bits():
    pytest.importorskip("triton")
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
