"""FP8 projections against a formula of their own, on every kind of layout, and what they save: exact values, a planted fault, live bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cpbench.cell import Cell
from cpbench.distributed.local import LocalWorld
from cpbench.distributed.mesh import local_groups
from cpbench.formulas import live_bytes, weights_bytes
from cpbench.kernels import load_kernel
from cpbench.layout import Layout
from cpbench.measure.memory import LiveTensors
from cpbench.models import linear as module
from cpbench.models.config import LatentAttention, ModelConfig
from cpbench.models.decoder import Decoder
from cpbench.models.linear import QuantisedWeight, hold, linear, quantise
from cpbench.models.weights import RandomWeights
from cpbench.numerics import MAX_RATIO, judge
from cpbench.one_device import OneDevice
from cpbench.program import Program
from cpbench.quantisation import quant_reason
from tests.unit.test_moe_layouts import QWEN3, V3, run
from tests.unit.test_numerics import CONFIG, make

CPU = torch.device("cpu")
ONE_DEVICE = OneDevice(CPU)
MAGNITUDES = [2.0 ** max(e - 7, -6) * (m / 8 + (e > 0)) for e in range(16) for m in range(8)][:127]  # of e4m3 by their bits: 480 means NaN
LATENT = ModelConfig("latent", 256, 4, 8, 8, 48, 512, 256, latent=LatentAttention(64, 16, 32, 32, q_rank=96))


def nearest_e4m3(x: torch.Tensor) -> torch.Tensor:
    """The nearest value of e4m3 in fp64 by search, the even one of two."""
    grid = torch.tensor(MAGNITUDES, dtype=torch.float64)
    size = x.double().abs()
    above = torch.searchsorted(grid, size).clamp(1, len(grid) - 1)
    to_low, to_high = size - grid[above - 1], grid[above] - size
    low = (to_low < to_high) | ((to_low == to_high) & (above % 2 == 1))
    return torch.where(low, grid[above - 1], grid[above]) * x.double().sign()


def by_hand(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounded values in fp64 and the scale of each row, by the definition."""
    scale = x.abs().amax(1, keepdim=True).float() / 448
    return nearest_e4m3(x.float() / scale), scale.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_scales_are_those_of_the_definition(dtype):
    x = (torch.randn(37, 48, generator=torch.Generator().manual_seed(1)) * torch.logspace(-4, 3, 37)[:, None]).to(dtype)
    values, scales = quantise(x)
    expected, scale = by_hand(x)
    assert values.dtype == torch.float8_e4m3fn and values.element_size() == 1
    assert torch.equal(values.double(), expected)
    assert torch.equal(scales.double(), scale[:, 0])
    assert float(values.float().abs().amax(1).min()) == 448.0


@pytest.mark.parametrize("block", [module.BLOCK, 512], ids=["at once", "in blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_is_the_product_of_the_rounded_values(dtype, block, monkeypatch):
    monkeypatch.setattr("cpbench.quantisation.BLOCK", block)
    monkeypatch.setattr(module, "BLOCK", block)
    generator = torch.Generator().manual_seed(2)
    x, w, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((41, 80), (56, 80), (56,)))
    (xq, xs), (wq, ws) = by_hand(x), by_hand(w)
    expected = ((xq @ wq.T) * xs * ws.T).to(dtype) + bias
    got = linear(x, hold(w, "fp8"), bias)
    assert got.dtype == dtype
    error = float((got.double() - expected.double()).norm() / expected.double().norm())
    assert error < (1e-6 if dtype == torch.float32 else 1e-3)
    assert float((got.double() - (x.double() @ w.double().T + bias)).norm() / expected.double().norm()) > 0.01


def test_rows_of_zeros_nothing_and_no_rows_at_all():
    x = torch.zeros(3, 32)
    x[1] = torch.nan
    weight = hold(torch.eye(32), "fp8")
    out = linear(x, weight)
    assert not out[0].any() and out[1].isnan().all() and not out[2].any()
    assert linear(x[:0], weight).shape == (0, 32)
    assert hold(x, "none") is x


def test_pytorchs_scaled_gemm_takes_what_it_is_given_and_agrees():
    """The path of CUDA on CPU, where PyTorch has a scaled GEMM without fast accumulation too; the grouped one is only checked for its arguments."""
    x, w = (torch.randn(*shape, generator=torch.Generator().manual_seed(3)).bfloat16() for shape in ((33, 64), (48, 64)))
    weight = hold(w, "fp8")
    assert isinstance(weight, QuantisedWeight)
    theirs, ours = module._scaled(x, weight), module._simulated(x, weight)
    assert theirs.shape == ours.shape and theirs.dtype == torch.bfloat16
    assert float((theirs - ours).float().norm() / ours.float().norm()) < 2e-3
    experts = QuantisedWeight(weight.values.expand(4, -1, -1).contiguous().to("meta"), weight.scales.expand(4, -1).contiguous().to("meta"))
    assert module.grouped_linear(x.to("meta"), experts, torch.empty(4, dtype=torch.int32, device="meta")).shape == (33, 48)


LAYOUTS = [
    ("none", "tp2"), ("none", "tp8"), ("allgather", "cp4"), ("ring", "cp4tp2"), ("ulysses", "cp2"), ("ulysses-gather", "cp4"), ("pass-q", "cp4"),
    ("usp", "cp4u2"), ("ring", "dp2cp2tp2"), ("ring", "pp2cp2"),
]  # fmt: skip


def verdict(cell: Cell):
    answers, kernel = run(cell)
    return judge(answers, kernel, ONE_DEVICE)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("strategy", "layout"), LAYOUTS)
def test_every_layout_rounds_as_one_device_does(strategy, layout, dtype):
    check = verdict(make(strategy, layout, dtype, "prefill", config=replace(CONFIG, kv_heads=8), quant="fp8"))
    assert check.passed, check.reason
    assert check.limit == f"ratio to one device at most {MAX_RATIO}"
    assert 0.02 < check.relative_rmse < 0.3, "FP8 was not used, or is not FP8"


@pytest.mark.parametrize("name", ["cp4/ep4", "tp4/ep4", "cp4", "dp2cp2/ep2tp2"])
@pytest.mark.parametrize("config", [QWEN3, V3], ids=["qwen3", "v3"])
def test_experts_round_as_one_device_does(name, config):
    layout = Layout.parse(name)
    for dispatch in ("gather", "alltoall") if layout.ep > 1 else (None,):
        check = verdict(make("allgather" if layout.cp > 1 else "none", name, "float32", "prefill", config=config, quant="fp8", dispatch=dispatch))
        assert check.passed and check.relative_rmse > 0.02, check.reason


@pytest.mark.parametrize("mla", ["expanded", "absorbed"])
def test_latent_attention_rounds_as_one_device_does(mla):
    check = verdict(make("ring", "cp2tp2", "bfloat16", "prefill", config=LATENT, quant="fp8", mla=mla))
    assert check.passed and check.relative_rmse > 0.02, check.reason


def test_attention_alone_is_judged_as_strictly_as_ever():
    answers, kernel = run(make("ring", "cp4", target="prefill", quant="fp8"))
    assert judge(answers[:1], kernel, ONE_DEVICE).limit == "relative RMSE at most 1e-05"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("block", "weight"), [("attention", "qkv_weight"), ("attention", "o_weight"), ("mlp", "gate_up_weight"), ("mlp", "down_weight")])
def test_a_rank_that_scales_by_the_next_channel_is_caught(block, weight, dtype, monkeypatch):
    right = Decoder.__init__

    def wrong(self, config, weights, part):
        right(self, config, weights, part)
        if part.attention.rank == 1:
            holder = getattr(self.layers[0], block)
            held = getattr(holder, weight)
            setattr(holder, weight, replace(held, scales=held.scales.roll(1)))

    cell = make("ring", "cp2tp2", dtype, "prefill", quant="fp8")
    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "__init__", wrong)
        answers, kernel = run(cell)
    check = judge(answers, kernel, ONE_DEVICE)
    assert not check.passed and "times that of one device" in check.reason


def test_channels_of_quantised_random_weights_differ_in_size_and_are_those_of_every_layout():
    weights = RandomWeights(0, torch.float32, CPU, quant="fp8")
    whole = weights.linear("model.layers.0.mlp.up_proj.weight", (96, 64))
    sizes = whole.std(1) * 8
    assert {round(float(size.log2())) for size in sizes} == {-1, 0, 1}
    part = weights.linear("model.layers.0.mlp.up_proj.weight", (96, 64), range(40, 60), range(16, 32))
    assert torch.equal(part, whole[40:60, 16:32])
    plain = replace(weights, quant="none")
    assert torch.equal(weights.linear("model.layers.0.mlp.gate.weight", (8, 64)), plain.linear("model.layers.0.mlp.gate.weight", (8, 64)))


DENSE = replace(CONFIG, hidden=256, intermediate=768)
SPARSE = replace(V3, hidden=256, head_dim=32, experts=replace(V3.experts, intermediate=128))
BOTH = pytest.mark.parametrize(("config", "layout"), [(DENSE, "cp1"), (DENSE, "cp2"), (LATENT, "cp2"), (SPARSE, "cp2/ep2"), (SPARSE, "cp1")])


@BOTH
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fields", [{}, {"block": 1 << 15}], ids=["at once", "in blocks"])
def test_live_bytes_are_those_of_the_formula(config, layout, dtype, fields, monkeypatch):
    if fields:
        monkeypatch.setattr("cpbench.quantisation.BLOCK", fields["block"])
        monkeypatch.setattr(module, "BLOCK", fields["block"])
    cell = make("allgather" if layout != "cp1" else "none", layout, dtype, "prefill", (2048, 2048), config, quant="fp8", router="uniform")
    world = LocalWorld(cell.world_size, 60)

    def peaks(rank: int) -> tuple[int, int]:
        program = Program(cell, local_groups(cell.layout, world, rank), load_kernel("cpu_flash"), CPU)
        program.run()
        if rank:
            program.run()
            return 0, 0
        tracker = LiveTensors(CPU, program.tensors)
        with tracker:
            program.run()
        return tracker.peak, tracker.by_category["weights"]

    peak, weights = world.run(peaks)[0]
    assert peak == pytest.approx(live_bytes(cell, 0), rel=0.07 if config.latent else 0.05)
    assert weights == pytest.approx(weights_bytes(cell), rel=1e-4)  # a bias of routers is in fp32
    assert weights_bytes(cell) < weights_bytes(replace(cell, quant="none"))


def test_what_cuda_cannot_quantise_names_the_nearest_value():
    cell = replace(make("none", "tp2", "bfloat16", "prefill", config=replace(CONFIG, intermediate=208), quant="fp8"), device="cuda")
    assert quant_reason(replace(cell, layout=Layout())) is None
    assert (
        quant_reason(cell)
        == "quant=fp8 on CUDA takes matrices whose sizes are multiples of 16, not 64 x 104 on a rank of tp2; the nearest valid value is quant=none"
    )
    assert quant_reason(replace(cell, dtype="float32")) == "scaled GEMMs on CUDA return bfloat16, not float32; the nearest valid value is dtype=bfloat16"
    assert quant_reason(replace(cell, device="cpu")) is None and quant_reason(replace(cell, quant="none")) is None


def test_an_old_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert module.refusal(torch.device("cuda"), "fp8").startswith("scaled FP8 GEMMs need compute capability 8.9, this GPU has 8.0")
    assert module.refusal(torch.device("cuda"), "none") is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert module.refusal(torch.device("cuda"), "fp8") is None
