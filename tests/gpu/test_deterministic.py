"""Deterministic products on a GPU: by the Triton kernel, with the same bits however rows, columns and inputs are cut."""

import pytest
import torch

from cpbench.cell import Cell
from cpbench.deterministic import TILE
from cpbench.distributed.deterministic import tree_sum
from cpbench.kernels import load_kernel
from cpbench.layout import Layout
from cpbench.models.config import ModelConfig
from cpbench.models.invariant import InvariantWeight, invariant_linear
from cpbench.program import run_locally

CUDA = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="THE TRITON KERNEL WAS NOT RUN: NO CUDA DEVICE")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tiles", [8, 24, 28])
def test_bits_do_not_depend_on_cuts(tiles, dtype):
    generator = torch.Generator(CUDA).manual_seed(0)
    x, w = (torch.randn(n, tiles * TILE, generator=generator, device=CUDA).to(dtype) for n in (300, 500))
    exact = x.double() @ w.double().T
    for is_summed in (False, True):
        whole = invariant_linear(x, InvariantWeight(w, is_summed))
        assert (whole.double() - exact).norm() / exact.norm() < (1e-6 if dtype == torch.float32 else 3e-2)
        for rows, columns in [(slice(0, 1), slice(None)), (slice(63, 130), slice(100, 300)), (slice(7, None), slice(499, None))]:
            assert torch.equal(invariant_linear(x[rows], InvariantWeight(w[columns], is_summed)), whole[rows, columns])
    for tp in (2, 4):
        cuts = [slice(rank * x.shape[1] // tp, (rank + 1) * x.shape[1] // tp) for rank in range(tp)]
        assert torch.equal(tree_sum([invariant_linear(x[:, cut], InvariantWeight(w[:, cut], True)) for cut in cuts]), whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layouts_have_the_same_bits(dtype):
    config, kernel, found = ModelConfig("dense", 256, 2, 8, 4, 64, 1536, 512), load_kernel("fixed_blocks"), {}
    ways = {"cp1": ("none", "contiguous"), "tp4": ("none", "contiguous"), "cp2tp2": ("allgather", "zigzag"), "cp4": ("ulysses", "contiguous")}
    for name, (strategy, partition) in ways.items():
        cell = Cell("prefill", config, 2, Layout.parse(name), strategy, partition, "auto", dtype, "cuda", (101, 67, 130), deterministic=True)
        rows = {token: row for tokens, output in run_locally(cell, kernel, CUDA) for token, row in zip(tokens.tolist(), output.rows, strict=True)}
        found[name] = torch.stack([rows[token] for token in sorted(rows)])
    assert all(torch.equal(rows, found["cp1"]) for rows in found.values())
