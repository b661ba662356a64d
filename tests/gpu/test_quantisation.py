"""FP8 on CUDA: PyTorch's scaled GEMMs against the simulation, and a quantised prefill on one GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cpbench.kernels import pick_kernel
from cpbench.models import linear as module
from cpbench.models import moe
from cpbench.models.held import Models
from cpbench.models.weights import RandomWeights
from cpbench.numerics import check
from cpbench.program import alone
from tests.unit.test_moe import QWEN3, V3, config_of, run
from tests.unit.test_numerics import make

CUDA = torch.device("cuda")
REFUSED = module.refusal(CUDA, "fp8") if torch.cuda.is_available() else "NO CUDA DEVICE"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REFUSED is not None, reason=f"SCALED GEMMS WERE NOT RUN: {REFUSED}")]


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def far_apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double().cpu() - b.double().cpu()).norm() / b.double().norm())


@pytest.mark.parametrize(("rows", "outputs", "inputs"), [(1, 64, 64), (301, 1536, 4096), (2048, 96, 16), (77, 4096, 11008)])
def test_scaled_gemms_give_what_the_simulation_gives(rows, outputs, inputs):
    x, w, bias = (random(*shape, seed=seed).bfloat16() for seed, shape in enumerate([(rows, inputs), (outputs, inputs), (outputs,)]))
    on_cpu, on_gpu = module.hold(w, "fp8"), module.hold(w.to(CUDA), "fp8")
    assert torch.equal(on_gpu.values.cpu().view(torch.uint8), on_cpu.values.view(torch.uint8)) and torch.equal(on_gpu.scales.cpu(), on_cpu.scales)
    got = module.linear(x.to(CUDA), on_gpu, bias.to(CUDA))
    assert got.dtype == torch.bfloat16
    assert far_apart(got, module.linear(x, on_cpu, bias)) < 5e-3


def test_parts_of_a_wider_tensor_and_no_rows():
    x, weight = random(50, 256, seed=1).bfloat16().to(CUDA), module.hold(random(64, 128, seed=2).bfloat16().to(CUDA), "fp8")
    part = x[:, 128:]
    assert torch.equal(module.linear(part, weight), module.linear(part.contiguous(), weight))
    assert module.linear(x[:0, :128], weight).shape == (0, 64)


@pytest.mark.parametrize("experts", [QWEN3, V3], ids=["qwen3", "v3"])
@torch.inference_mode()
def test_grouped_scaled_gemms_give_what_single_ones_give(experts, monkeypatch):
    """On a GPU without grouped ones both are single ones."""
    whole = moe.Shard(0, 1)
    mlp = moe.SparseMLP(config_of(experts), RandomWeights(3, torch.bfloat16, CUDA, quant="fp8"), "model.layers.1.mlp", 1, whole, whole, whole)
    x_nM = RandomWeights(5, torch.bfloat16, CUDA).values("x", torch.arange(301), torch.arange(64), 1.0)
    together = run(mlp, x_nM)
    monkeypatch.setattr(moe, "has_grouped", lambda x_PM, weight: False)
    assert far_apart(together, run(mlp, x_nM)) < 1e-2


def test_a_quantised_prefill_is_proved():
    cell = replace(make("none", "cp1", "bfloat16", "prefill", lengths=(512, 33), quant="fp8"), device="cuda")
    with torch.inference_mode():
        verdict = check(cell, alone(), pick_kernel("cuda", "bfloat16", 32, 32), CUDA, Models())
    assert verdict.passed, verdict.reason
