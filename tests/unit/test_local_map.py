"""`local-map` on one rank of a world whose collectives do nothing: graphs, recompilation, kernels that pad, and what is refused.

Where only heads are sharded nothing is communicated, so that the answer of one rank is right and can be held against fp64. Answers with
communication are in tests/dist/test_local_map.py.
"""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.testing._internal.distributed.fake_pg import FakeStore

from cpbench.buffers import Buffers
from cpbench.cell import Cell
from cpbench.distributed.mesh import Mesh
from cpbench.kernels import load_kernel
from cpbench.kernels.cpu_flash import CpuFlash
from cpbench.layout import Layout
from cpbench.models.config import ModelConfig
from cpbench.strategies import STRATEGIES, local_map
from cpbench.strategies.base import Context, keys_and_values

STRATEGY = STRATEGIES["local-map"]
LENGTHS = (48, 100, 64, 36, 2000, 52)  # not all even per block, below and above what makes the CPU kernel copy K and V
SCALE = 0.3
COMPILED = ["eager", "inductor"]


class PaddingKernel(CpuFlash):
    """Returns an even number of rows, as kernels of serving engines do; the added one is not zero."""

    padded = 0

    def varlen_block(self, q, k, v, cu_q, cu_k, scale, causal):
        out, lse = super().varlen_block(q, k, v, cu_q, cu_k, scale, causal)
        if out.shape[0] % 2 == 0:
            return out, lse
        self.padded += 1
        return torch.cat([out, torch.full_like(out[:1], 1e6)]), torch.cat([lse, lse[:, :1]], 1)


@pytest.fixture
def mesh():
    """The process groups of rank 0 of four."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    yield Mesh(0, 4, "cpu")
    dist.destroy_process_group()
    local_map._attention.cache_clear()


@pytest.fixture(autouse=True)
def no_graphs():
    torch._dynamo.reset()
    counters.clear()


def make(layout, lengths, heads=(8, 4), mode="none", partition=None, dtype="float32"):
    config = ModelConfig("test", 64, 1, *heads, 16, 64, 64)
    partition = partition or ("zigzag" if layout.cp > 1 else "contiguous")
    return Cell("attention", config, 1, layout, "local-map", partition, "auto", dtype, "cpu", tuple(lengths), compile=mode)


def attend(mesh, cell, kernel=None, scale=SCALE):
    """The output of rank 0, and its q, K and V."""
    assert STRATEGY.check(cell) is None
    n = cell.split.rows(0)
    generator = torch.Generator().manual_seed(n)
    q = torch.randn(n, cell.heads, 16, generator=generator)
    rows = torch.randn(n, 2 * cell.kv_heads * 16, generator=generator)
    context = Context(mesh.groups(cell.layout), kernel or load_kernel("cpu_flash"), Buffers(), None, scale, cell.shape)
    with torch.inference_mode():
        return STRATEGY.attend(q, rows, keys_and_values(16), STRATEGY.plan(cell, 0), context, 0), (q, *keys_and_values(16)(rows))


def error(out, inputs, lengths, scale=SCALE):
    """Relative to causal attention in fp64, sequence by sequence."""
    parts = zip(*(x.double().split(list(lengths)) for x in inputs), strict=True)
    truth = torch.cat([load_kernel("reference").block(*part, scale, True)[0] for part in parts])
    return float((out.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("mode", COMPILED)
@pytest.mark.parametrize("layout", [Layout(tp=4), Layout(cp=4), Layout(cp=2, tp=2)], ids=str)
def test_a_region_is_one_graph_and_another_length_compiles_nothing(mesh, layout, mode):
    attend(mesh, make(layout, LENGTHS[:1], mode=mode))
    assert counters["stats"]["unique_graphs"] == 1
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (-(-length // (2 * layout.cp)) * 2 * layout.cp for length in LENGTHS[1:]):
            out, _ = attend(mesh, make(layout, [length], mode=mode))
            assert out.shape == (length // layout.cp, 8 // layout.tp, 16)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("mode", ["none", *COMPILED])
@pytest.mark.parametrize(("heads", "lengths"), [((8, 4), (77,)), ((8, 2), (77,)), ((8, 1), (64, 64))], ids=str)
def test_heads_over_tp_are_those_of_one_device_also_where_ranks_share_kv_heads(mesh, heads, lengths, mode):
    """2 and 1 kv heads over tp=4 are repeated."""
    out, inputs = attend(mesh, make(Layout(tp=4), lengths, heads, mode))
    assert error(out, inputs, lengths) < 1e-6


@pytest.mark.parametrize("mode", ["none", *COMPILED])
def test_rows_that_a_kernel_adds_are_cut_off(mesh, mode):
    """Odd and even numbers of tokens in one graph."""
    for length in (77, 80, 513, 3):
        kernel = PaddingKernel()
        out, inputs = attend(mesh, make(Layout(tp=4), [length], mode=mode), kernel)
        assert kernel.padded == length % 2 and out.shape[0] == length
        assert error(out, inputs, [length]) < 1e-6
    assert counters["stats"]["unique_graphs"] == (0 if mode == "none" else 1)


@pytest.mark.parametrize("mode", ["none", *COMPILED])
def test_rows_are_cut_off_each_block_where_tokens_are_divided_too(mesh, mode):
    """cp2tp2, zigzag: two blocks of 27 tokens per rank. What is gathered from ranks that are not there is of no interest."""
    kernel = PaddingKernel()
    out, _ = attend(mesh, make(Layout(cp=2, tp=2), [108], mode=mode), kernel)
    assert kernel.padded == 2 and out.shape == (54, 4, 16)
    assert not (out == 1e6).any()


@pytest.mark.parametrize("mode", ["none", "eager"])
def test_nothing_is_frozen_from_the_first_call(mesh, mode):
    """Scale, kernel, sequences, placements, kv heads: each call has its own."""
    tp, both = Layout(tp=4), Layout(cp=2, tp=2)
    first, inputs = attend(mesh, make(tp, [64], mode=mode))
    again, _ = attend(mesh, make(tp, [64], mode=mode), scale=0.1)
    assert error(first, inputs, [64]) < 1e-6 and error(again, inputs, [64], 0.1) < 1e-6
    assert attend(mesh, make(both, [64], mode=mode))[0].shape == (32, 4, 16)
    kernel = PaddingKernel()
    odd, inputs = attend(mesh, make(tp, [63], mode=mode), kernel)
    assert kernel.padded == 1 and error(odd, inputs, [63]) < 1e-6
    two, inputs = attend(mesh, make(tp, [32, 32], mode=mode))
    assert error(two, inputs, [32, 32]) < 1e-6
    shared, inputs = attend(mesh, make(tp, [64], (8, 8), mode))
    assert error(shared, inputs, [64]) < 1e-6


def test_many_regions_are_compiled_next_to_each_other(mesh):
    """The tracer keeps eight variants of a function at most."""
    for step in range(1, 13):
        out, inputs = attend(mesh, make(Layout(tp=4), [64], mode="eager"), scale=0.1 * step)
        assert error(out, inputs, [64], 0.1 * step) < 1e-6


@pytest.mark.parametrize(("layout", "partition", "order"), [
    (Layout(cp=4), "zigzag", (0, 2, 4, 6, 7, 5, 3, 1)),
    (Layout(cp=4), "contiguous", (0, 1, 2, 3)),
    (Layout(tp=2), "contiguous", (0,)),
], ids=str)  # fmt: skip
def test_the_plan_puts_gathered_blocks_in_order(layout, partition, order):
    cell = make(layout, [64], partition=partition)
    assert STRATEGY.check(cell) is None
    assert STRATEGY.plan(cell, 0).order == order
    for rank in range(layout.cp):
        blocks = [block.start // block.rows for block in cell.split.ranks[rank] if block.sequence == 0]
        assert list(STRATEGY.plan(cell, rank).own) == blocks


def test_what_cannot_run_says_the_nearest_valid_value():
    assert "use none, or tp=2" in STRATEGY.check(make(Layout(), [64]))
    assert "use --partition zigzag" in STRATEGY.check(make(Layout(cp=2), [64, 64], partition="contiguous"))
    assert "the nearest valid length is 64" in STRATEGY.check(make(Layout(cp=4), [65]))
    ring = replace(make(Layout(cp=2), [64], mode="inductor"), strategy="ring")
    assert STRATEGIES["ring"].check(ring) == "ring has no compiled attention, which compile=inductor asks for; the nearest valid value is compile=none"
    for name, strategy in STRATEGIES.items():
        cell = replace(ring, strategy=name, partition=strategy.partitions[0], layout=Layout(cp=1 if name == "none" else 2), device="cuda", dtype="bfloat16")
        if strategy.available("cuda", "bfloat16") is None and not strategy.compiles:
            assert "has no compiled attention" in strategy.check(cell), name
