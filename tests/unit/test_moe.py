"""Mixtures of experts: routers and blocks against transformers, ties, drawn choices, and the sums of experts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3

from cpbench.communicator import Communicator, Incoming
from cpbench.errors import CpbenchError
from cpbench.experts import RouterRule
from cpbench.layout import Layout
from cpbench.models import moe
from cpbench.models.config import Experts, ModelConfig
from cpbench.models.moe import SparseMLP
from cpbench.models.presets import PRESETS
from cpbench.models.router import Router, best, choose, drawn, margins, weigh
from cpbench.models.weights import RandomWeights
from cpbench.program import alone
from cpbench.sharding import Shard, TokenRows, unit_of

CPU = torch.device("cpu")
QWEN3 = Experts(8, 3, 48)
V2 = Experts(12, 3, 40, shared=2, groups=4, top_groups=2, normalised=False, scale=16.0)
V3 = Experts(16, 4, 32, shared=1, groups=4, top_groups=2, scoring="sigmoid", correction=True, scale=2.5)


def config_of(experts: Experts, hidden: int = 64) -> ModelConfig:
    return ModelConfig("tiny", hidden, 2, 4, 2, 16, 96, 128, experts=experts)


def block(experts: Experts, dtype: torch.dtype = torch.float32) -> SparseMLP:
    whole = Shard(0, 1)
    return SparseMLP(config_of(experts), RandomWeights(3, dtype, CPU), "model.layers.1.mlp", 1, whole, whole, whole)


def run(mlp: SparseMLP, x_nM: torch.Tensor) -> torch.Tensor:
    layout = Layout()
    communicator = Communicator(alone(), TokenRows(((len(x_nM),),), (False,)), unit_of(layout, layout.coordinates(0), "gather"))
    return mlp.forward(lambda: x_nM, communicator)


def rows(count: int = 101, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return RandomWeights(5, dtype, CPU).values("x", torch.arange(count), torch.arange(64), 1.0)


def oracle(experts: Experts) -> torch.nn.Module:
    """The block of transformers with the same numbers."""
    common = {
        "hidden_size": 64,
        "moe_intermediate_size": experts.intermediate,
        "num_experts_per_tok": experts.top_k,
        "norm_topk_prob": experts.normalised,
        "experts_implementation": "eager",
    }
    deepseek = {"n_group": experts.groups, "topk_group": experts.top_groups, "routed_scaling_factor": experts.scale, "n_shared_experts": experts.shared}
    if experts is QWEN3:
        return qwen3.Qwen3MoeSparseMoeBlock(qwen3.Qwen3MoeConfig(num_experts=experts.count, **common))
    if experts is V2:
        settings = {**common, **deepseek, "n_routed_experts": experts.count, "topk_method": "group_limited_greedy"}
        return v2.DeepseekV2Moe(v2.DeepseekV2Config(**settings))
    return v3.DeepseekV3MoE(v3.DeepseekV3Config(n_routed_experts=experts.count, **common, **deepseek))


def copied(mlp: SparseMLP, theirs: torch.nn.Module) -> torch.nn.Module:
    """Their block with our weights."""
    theirs.gate.weight.data = mlp.router.weight.clone()
    if mlp.router.bias is not None:
        theirs.gate.e_score_correction_bias = mlp.router.bias.clone()
    theirs.experts.gate_up_proj.data, theirs.experts.down_proj.data = mlp.gate_up_weight.clone(), mlp.down_weight.clone()
    if mlp.shared is not None:
        gate, up = mlp.shared.gate_up_weight.chunk(2)
        theirs.shared_experts.gate_proj.weight.data, theirs.shared_experts.up_proj.weight.data = gate.clone(), up.clone()
        theirs.shared_experts.down_proj.weight.data = mlp.shared.down_weight.clone()
    return theirs


@pytest.mark.parametrize("experts", [QWEN3, V2, V3], ids=["qwen3", "v2", "v3"])
@torch.inference_mode()
def test_blocks_give_what_transformers_gives(experts):
    mlp, x_nM = block(experts), rows()
    theirs = copied(mlp, oracle(experts))(x_nM[None])[0]
    ours = run(mlp, x_nM)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-6
    assert float((ours - theirs).abs().max()) < 1e-5 * float(theirs.abs().max())


@pytest.mark.parametrize("experts", [QWEN3, V2, V3], ids=["qwen3", "v2", "v3"])
@torch.inference_mode()
def test_routers_choose_and_weigh_as_transformers_does(experts):
    mlp, x_nM = block(experts), rows(500)
    _, weights, indices = copied(mlp, oracle(experts)).gate(x_nM)
    order = indices.argsort(1)
    ours = mlp.router.forward(x_nM)
    assert torch.equal(ours.experts_nK, indices.gather(1, order))
    torch.testing.assert_close(ours.weights_nK, weights.gather(1, order), rtol=1e-5, atol=1e-7)


@torch.inference_mode()
def test_a_block_is_the_sum_over_tokens_written_out():
    """Every token by itself, in fp64."""
    mlp, x_nM = block(V3, torch.float64), rows(40, torch.float64)
    choice = mlp.router.forward(x_nM)
    assert choice.weights_nK.dtype == torch.float64
    ours = run(mlp, x_nM)
    for row in range(len(x_nM)):
        expected = mlp.shared.partial(Incoming(x_nM[row : row + 1], lambda rows: rows)).values()[0]
        for expert, weight in zip(choice.experts_nK[row].tolist(), choice.weights_nK[row], strict=True):
            gate, up = (mlp.gate_up_weight[expert] @ x_nM[row]).chunk(2)
            expected = expected + weight * (mlp.down_weight[expert] @ (torch.nn.functional.silu(gate) * up))
        torch.testing.assert_close(ours[row], expected, rtol=1e-12, atol=1e-13)


def test_of_equal_scores_the_lowest_expert_wins():
    scores = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.1, 0.9, 0.3, 0.9], [0.3, 0.3, 0.1, 0.3]])
    assert best(scores, 2).tolist() == [[0, 1], [1, 3], [0, 1]]
    tied = torch.full((5, 16), 0.25)
    assert choose(tied, V3).tolist() == [[0, 1, 2, 3]] * 5
    assert choose(torch.zeros(1, 12), V2).tolist() == [[0, 1, 2]]


def test_groups_are_limited_by_their_best_score_and_with_a_bias_by_their_two_best():
    scores = torch.tensor([[0.9, 0.0, 0.0, 0.0, 0.6, 0.5, 0.0, 0.0, 0.55, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    assert choose(scores, V3).tolist() == [[4, 5, 8, 9]]  # 1.1 and 1.05 are above 0.9
    assert choose(scores, replace(V3, correction=False)).tolist() == [[0, 1, 4, 5]]
    assert margins(scores, V3).tolist() == pytest.approx([0.15], abs=1e-6)  # the second group leads by 1.05 - 0.9; the experts by infinity or 0.5


def test_a_bias_chooses_and_does_not_weigh():
    scores = torch.tensor([[0.2, 0.8, 0.4, 0.6]])
    experts = Experts(4, 2, 8, scoring="sigmoid", correction=True, scale=2.0)
    chosen = choose(scores + torch.tensor([1.0, 0.0, 0.0, 0.0]), experts)
    assert chosen.tolist() == [[0, 1]]
    torch.testing.assert_close(weigh(scores, chosen, experts), torch.tensor([[0.4, 1.6]]))


def test_drawn_choices_are_a_function_of_the_token_and_follow_their_law():
    experts, tokens = Experts(16, 2, 8), torch.arange(20_000)
    uniform = drawn(7, 3, tokens, experts, 0.0)
    assert torch.equal(drawn(7, 3, tokens.flip(0)[:50], experts, 0.0), uniform.flip(0)[:50])
    assert bool((uniform[:, 0] < uniform[:, 1]).all())
    assert not torch.equal(drawn(7, 4, tokens, experts, 0.0), uniform) and not torch.equal(drawn(8, 3, tokens, experts, 0.0), uniform)
    loads = torch.bincount(uniform.flatten(), minlength=16)
    assert loads.sum() == 40_000 and int(loads.min()) > 2250 and int(loads.max()) < 2750
    skewed = torch.bincount(drawn(7, 3, tokens, replace(experts, top_k=1), 1.2).flatten(), minlength=16).sort(descending=True).values
    shares = torch.arange(1, 17).double() ** -1.2
    torch.testing.assert_close(skewed / 20_000, (shares / shares.sum()).float(), rtol=0.15, atol=0.004)


@pytest.mark.parametrize(("text", "hint"), [("zipf:-1", "zipf:0"), ("zipf:99", "zipf:8"), ("zipf:x", "zipf:1.2"), ("zip:1", "zipf"), ("trained:2", "trained")])
def test_an_unknown_router_names_the_nearest(text, hint):
    with pytest.raises(CpbenchError) as error:
        RouterRule.parse(text)
    assert hint in str(error.value.hint)


@torch.inference_mode()
def test_grouped_gemms_are_for_bf16_on_cuda(monkeypatch):
    """Their arithmetic is checked on CPU, where PyTorch falls back to a GEMM per group."""
    assert not moe.has_grouped(rows(), torch.empty(0))
    mlp, x_nM = block(V3, torch.bfloat16), rows(97, torch.bfloat16)
    one_by_one = run(mlp, x_nM)
    monkeypatch.setattr(moe, "has_grouped", lambda x_PM, weight: len(x_PM) > 0)
    try:
        together = run(mlp, x_nM)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this PyTorch has no grouped GEMM on CPU: {error}")
    torch.testing.assert_close(together, one_by_one, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("dtype", "rounded_to"), [(torch.bfloat16, None), (torch.float64, torch.bfloat16), (torch.float32, None)])
def test_the_correction_bias_keeps_the_steps_that_narrow_dtypes_have_not(dtype, rounded_to):
    bias = Router(PRESETS["deepseek-v3-tiny"], RandomWeights(0, dtype, torch.device("cpu"), rounded_to), "model.layers.1.mlp.gate", 1).bias
    exact = Router(PRESETS["deepseek-v3-tiny"], RandomWeights(0, torch.float32, torch.device("cpu")), "model.layers.1.mlp.gate", 1).bias
    assert torch.equal(bias.float(), exact)
    assert not torch.equal(exact, exact.bfloat16().float())
