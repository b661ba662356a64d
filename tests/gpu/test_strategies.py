"""On one CUDA device: every strategy with its ranks as threads, against fp64, dense and in pages that the kernel reads in place."""

import pytest
import torch

from cpbench.cell import Cell
from cpbench.distributed.local import LocalWorld
from cpbench.distributed.mesh import local_groups
from cpbench.kernels import pick_kernel
from cpbench.layout import Layout
from cpbench.models.config import ModelConfig
from cpbench.models.held import Models
from cpbench.numerics import check
from cpbench.strategies import STRATEGIES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: the strategies of tests/gpu were not run")]
COMBINATIONS = [(name, part) for name, strategy in STRATEGIES.items() if name != "none" and not strategy.brings_collectives for part in strategy.partitions]
CONFIG = ModelConfig("test", 512, 2, 8, 2, 128, 512, 1024)


@pytest.mark.parametrize(("name", "partition"), COMBINATIONS)
@pytest.mark.parametrize(
    ("prefixes", "chunk", "page_size"), [((), None, None), ((500, 0, 90), None, 256), ((70, 0, 0), 256, 256)], ids=["dense", "pages", "chunks"]
)
@pytest.mark.parametrize("target", ["attention", "prefill"])
def test_every_strategy_gives_the_answer_of_one_device(name, partition, prefixes, chunk, page_size, target):
    layout = Layout(cp=4, ulysses=2 if name == "usp" else 1)
    lengths = (600, 333, 700)
    cell = Cell(target, CONFIG, 2, layout, name, partition, "auto", "bfloat16", "cuda", lengths, 0, "keep", prefixes, chunk, page_size)
    assert STRATEGIES[name].check(cell) is None
    device, world, models = torch.device("cuda", 0), LocalWorld(4), [Models() for _ in range(4)]
    kernel = pick_kernel("cuda", "bfloat16", 128, 128)
    verdict = world.run(lambda rank: check(cell, local_groups(layout, world, rank), kernel, device, models[rank]))[0]
    assert verdict.passed, verdict.reason
