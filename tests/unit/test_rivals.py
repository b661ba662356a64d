"""The rivals of the benchmarks: the CPU's `flash_attn` as ring-flash-attn merges its results, and the check before anything is timed."""

import sys
from types import ModuleType

import pytest
import torch

from benchmarks import rivals
from cpbench.cell import Cell
from cpbench.distributed.local import LocalGroup, LocalWorld
from cpbench.distributed.mesh import local_groups
from cpbench.kernels import load_kernel
from cpbench.layout import Layout
from cpbench.models.config import ModelConfig
from cpbench.program import Program
from cpbench.strategies import STRATEGIES
from tests.unit.external_stand_in import StandIn

ROWS = HEADS = 8  # equal, so that a transposed log-sum-exp has a shape that fits


def merged(lse_layout, queries=2):
    """Keys in two blocks, merged by the formula of ring-flash-attn: the relative error against one call over all keys in fp64."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(queries, rows, heads, 16, generator=generator) for rows, heads in ((ROWS, HEADS), (2 * ROWS, 4), (2 * ROWS, 4)))
    out = lse = None
    for block in (slice(0, ROWS), slice(ROWS, None)):
        block_out, block_lse, _, _ = rivals.flash_attn_forward(q, k[:, block], v[:, block], 0.0, 0.3, False, -1, -1, 0.0, None, False)
        assert block_lse.dtype == torch.float32
        block_lse = lse_layout(block_lse).transpose(-2, -1).unsqueeze(-1)
        if out is None:
            out, lse = block_out, block_lse
        else:
            out = out - torch.sigmoid(block_lse - lse) * (out - block_out)
    truth = torch.stack([load_kernel("reference").block(*(x.double() for x in one), 0.3, False)[0] for one in zip(q, k, v, strict=True)])
    return float((out.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("sequences", [1, 2])
def test_the_log_sum_exp_has_the_layout_that_the_merge_expects(sequences):
    assert merged(lambda lse: lse, sequences) < 1e-6
    assert merged(lambda lse: lse.transpose(1, 2), sequences) > 1e-3


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(LocalGroup, "process_group", property(lambda group: group))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", ModuleType("taken away again"))
    return StandIn(monkeypatch)


def run(name, change=lambda program: None):
    """Both ranks make the rival of a program of ours, and run it."""
    world, strategy = LocalWorld(2), rivals.COUNTERPARTS[name]
    config = ModelConfig("test", 64, 1, 8, 2, 16, 64, 64)
    cell = Cell("attention", config, 1, Layout(cp=2), strategy, STRATEGIES[strategy].partitions[0], "auto", "float32", "cpu", (64,))

    def program(rank):
        ours = Program(cell, local_groups(cell.layout, world, rank), load_kernel("cpu_flash"), torch.device("cpu"))
        change(ours)
        return rivals.rival(name, ours)().shape

    return world.run(program)


@pytest.mark.parametrize("name", rivals.COUNTERPARTS)
def test_rivals_run_on_our_inputs_and_must_agree(name, stand_in):
    assert run(name) == [(1, 32, 8, 16)] * 2
    assert len(stand_in.calls) == 4
    with pytest.raises(SystemExit, match=f"{name} gives another answer"):
        run(name, lambda ours: setattr(ours, "attention_inputs", lambda: [x.flip(0) for x in Program.attention_inputs(ours)]))


def test_a_missing_package_is_named_with_how_to_install_it(stand_in, monkeypatch):
    monkeypatch.setattr(rivals, "find_spec", lambda module: None)
    with pytest.raises(SystemExit, match="needs the package yunchang: pip install --no-deps ring-flash-attn yunchang"):
        run("yunchang-ulysses")


def test_what_the_stand_in_lacks_is_refused():
    with pytest.raises(NotImplementedError, match="forward pass of dense batches only"):
        rivals.forward_of_dense_batches_only(1)
