"""Strategies of other libraries on real CUDA devices: signatures against the stand-ins, one rank on one GPU, and sweeps on two.

Skipped, loudly, where a library or a GPU is missing.
"""

from importlib import import_module
from inspect import signature

import pytest
import torch
import torch.distributed as dist

from cpbench.attention_shape import AttentionShape
from cpbench.buffers import Buffers
from cpbench.cell import Cell
from cpbench.distributed.mesh import Mesh
from cpbench.kernels import load_kernel
from cpbench.layout import Layout
from cpbench.models.config import ModelConfig
from cpbench.strategies import STRATEGIES
from cpbench.strategies.base import Context
from cpbench.strategies.external import import_ring_flash_attn
from tests.dist.sweeps import sweep
from tests.unit.external_stand_in import StandIn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: the libraries of tests/gpu were not run")]
LIBRARIES = [name for name, strategy in STRATEGIES.items() if strategy.brings_collectives]
ONE_RANK = [name for name in LIBRARIES if not STRATEGIES[name].shards_heads]  # what shards heads needs two
HEADS, KV_HEADS, DIM, SCALE = 8, 4, 128, 0.1
CONFIG = ModelConfig("test", 64, 1, HEADS, KV_HEADS, DIM, 64, 64)
FUNCTIONS = [
    ("ring-flash-attn", "ring_flash_attn", "zigzag_ring_flash_attn_func"),
    ("ring-flash-attn", "ring_flash_attn", "zigzag_ring_flash_attn_varlen_func"),
    ("yunchang-ulysses", "yunchang", "UlyssesAttention"),
    ("te-p2p", "transformer_engine.pytorch", "DotProductAttention"),
]


def usable(name):
    reason = STRATEGIES[name].available("cuda", "bfloat16")
    if reason:
        pytest.skip(f"STRATEGY {name} WAS NOT RUN: {reason}")
    return STRATEGIES[name]


@pytest.mark.parametrize(("name", "module", "function"), FUNCTIONS)
def test_stand_ins_have_the_parameters_of_the_installed_libraries(name, module, function, monkeypatch):
    usable(name)
    installed = import_ring_flash_attn() if module == "ring_flash_attn" else import_module(module)
    real = getattr(installed, function)
    own = getattr(StandIn(monkeypatch).modules[module], function)
    pairs = [(real, own), (real.forward, own.forward)] if isinstance(real, type) else [(real, own)]
    for theirs, ours in pairs:
        parameters = [parameter for parameter in signature(ours).parameters if parameter not in ("unused", "args")]
        assert [parameter for parameter in signature(theirs).parameters if parameter in parameters] == parameters


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """A world of one rank."""
    store = tmp_path_factory.mktemp("nccl") / "store"
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield Mesh(0, 1, "cuda").groups(Layout())
    dist.destroy_process_group()


@pytest.mark.parametrize("lengths", [(512,), (256, 256)], ids=str)
@pytest.mark.parametrize("name", ONE_RANK)
def test_one_rank_computes_causal_attention(name, lengths, groups):
    strategy = usable(name)
    if len(lengths) > 1 and name == "yunchang-ulysses":
        pytest.skip("one sequence only")
    cell = Cell("attention", CONFIG, 1, Layout(), name, strategy.partitions[0], "auto", "bfloat16", "cuda", lengths)
    generator = torch.Generator("cuda").manual_seed(1)
    q, k, v = (torch.randn(512, heads, DIM, generator=generator, device="cuda", dtype=torch.bfloat16) for heads in (HEADS, KV_HEADS, KV_HEADS))
    tokens = torch.cat([torch.arange(r.start, r.stop, device="cuda") for r in cell.split.tokens(0)])
    rows = torch.cat([k[tokens].flatten(1), v[tokens].flatten(1)], 1)
    context = Context(groups, load_kernel("sdpa"), Buffers(), None, SCALE, AttentionShape(HEADS, KV_HEADS, DIM, DIM, 2 * DIM))
    with torch.inference_mode():
        mine = strategy.attend(
            q[tokens], rows, lambda x: tuple(part.unflatten(1, (KV_HEADS, DIM)) for part in x.chunk(2, 1)), strategy.plan(cell, 0), context, 0
        )
    out = torch.empty_like(q).index_copy_(0, tokens, mine)
    for start in range(0, 512, lengths[0]):
        part = slice(start, start + lengths[0])
        truth, _ = load_kernel("reference").block(q[part].double(), k[part].double(), v[part].double(), SCALE, True)
        assert float((out[part].double() - truth).norm() / truth.norm()) < 6e-3


@pytest.mark.parametrize("name", LIBRARIES)
def test_two_gpus_give_the_answer_of_one_and_are_observed(name, tmp_path):
    usable(name)
    if torch.cuda.device_count() < 2:
        pytest.skip(f"STRATEGY {name} WAS NOT RUN on two GPUs: this machine has {torch.cuda.device_count()}")
    result = sweep(tmp_path / "r.json", device="cuda", target="attention", seq="4k", cp="2", strategies=name, dtype="bfloat16", model="qwen3-8b")
    for cell in result.cells:
        assert cell.status == "ok", (cell.id, cell.reason)
        assert cell.numerics.ratio <= 1.3
        assert cell.traffic["source"] == ("recorded" if cell.key["strategy"] == "none" else "observed")
