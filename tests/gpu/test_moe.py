"""Experts on CUDA: grouped GEMMs give what one GEMM per expert gives."""

from __future__ import annotations

import pytest
import torch

from cpbench.models import moe
from cpbench.models.weights import RandomWeights
from tests.unit.test_moe import QWEN3, V3, config_of, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: grouped GEMMs were not run")]


@pytest.mark.parametrize("experts", [QWEN3, V3], ids=["qwen3", "v3"])
@torch.inference_mode()
def test_grouped_gemms_give_what_single_ones_give(experts, monkeypatch):
    cuda = torch.device("cuda")
    whole = moe.Shard(0, 1)
    mlp = moe.SparseMLP(config_of(experts), RandomWeights(3, torch.bfloat16, cuda), "model.layers.1.mlp", 1, whole, whole, whole)
    x_nM = RandomWeights(5, torch.bfloat16, cuda).values("x", torch.arange(301), torch.arange(64), 1.0)
    assert moe.has_grouped(x_nM, mlp.gate_up_weight)
    together = run(mlp, x_nM)
    monkeypatch.setattr(moe, "has_grouped", lambda x_PM, weight: False)
    one_by_one = run(mlp, x_nM)
    assert float((together - one_by_one).float().norm() / one_by_one.float().norm()) < 5e-3
