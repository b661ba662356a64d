"""Latent attention against Hugging Face's DeepSeek V2 and V3 in fp32, both ways of computing it, and what context parallelism moves."""

from dataclasses import replace

import pytest
import torch

from cpbench.answer import solve
from cpbench.cell import Cell
from cpbench.distributed.local import LocalWorld
from cpbench.distributed.mesh import local_groups
from cpbench.formulas import live_bytes, traffic
from cpbench.kernels import load_kernel
from cpbench.layout import Layout
from cpbench.measure.device import open_device
from cpbench.measure.memory import measure_peaks
from cpbench.models.config import LatentAttention, ModelConfig, Yarn
from cpbench.models.held import Models
from cpbench.models.rope import cos_sin, softmax_scale
from cpbench.models.weights import token_ids
from cpbench.numerics import judge
from cpbench.one_device import OneDevice
from cpbench.plan import unsupported
from cpbench.program import Program, alone, run_locally
from cpbench.strategies import STRATEGIES
from tests.unit.test_models import GivenWeights

transformers = pytest.importorskip("transformers", reason="the oracle of the model tests: pip install 'cpbench[hf]'")
CPU = torch.device("cpu")
YARN = Yarn(40.0, 64, 32.0, 1.0, mscale=1.0, mscale_all_dim=1.0)
V3 = ModelConfig("v3", 96, 2, 4, 4, 48, 160, 512, rope_theta=1e4, latent=LatentAttention(40, 16, 32, 24, q_rank=64), yarn=YARN)
LITE = replace(V3, name="lite", latent=LatentAttention(40, 16, 32, 24), yarn=replace(YARN, mscale=0.707, mscale_all_dim=0.707))
LENGTHS, PREFIXES = (101, 67, 130), (0, 40, 17)
HERE = ("allgather", "ring", "ulysses", "ulysses-gather", "usp", "pass-q")


def hugging_face(config):
    """A tiny random model of dense layers with these sizes."""
    latent, yarn = config.latent, config.yarn
    family = "V3" if latent.q_rank else "V2"
    scaling = {
        "rope_type": "yarn", "factor": yarn.factor, "original_max_position_embeddings": yarn.original, "rope_theta": config.rope_theta,
        "beta_fast": yarn.beta_fast, "beta_slow": yarn.beta_slow, "mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim,
    }  # fmt: skip
    values = {
        "vocab_size": config.vocab, "hidden_size": config.hidden, "intermediate_size": config.intermediate, "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads, "num_key_value_heads": config.heads, "q_lora_rank": latent.q_rank, "kv_lora_rank": latent.kv_rank,
        "qk_nope_head_dim": latent.nope_dim, "qk_rope_head_dim": latent.rope_dim, "v_head_dim": latent.v_dim, "rms_norm_eps": config.norm_eps,
        "first_k_dense_replace": config.layers, "rope_parameters": scaling, "max_position_embeddings": 2560, "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(1)
    made = getattr(transformers, f"Deepseek{family}ForCausalLM")(getattr(transformers, f"Deepseek{family}Config")(**values)).eval()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            parameter.copy_(parameter + torch.randn_like(parameter) * 0.3 if "norm" in name else parameter * 3)
    return made


@pytest.mark.parametrize("config", [V3, LITE], ids=lambda config: config.name)
@pytest.mark.parametrize("mla", ["expanded", "absorbed"])
@pytest.mark.parametrize(
    ("layout", "strategy"), [("cp1", "none"), ("tp2", "none"), ("cp2", "ring"), ("cp2tp2", "allgather"), ("cp4", "ulysses"), ("pp2", "none")]
)
def test_logits_and_first_tokens_are_those_of_hugging_face(config, mla, layout, strategy, monkeypatch):
    model = hugging_face(config)
    monkeypatch.setattr("cpbench.program.RandomWeights", lambda *_: GivenWeights({k: v.detach() for k, v in model.state_dict().items()}))
    partition, lengths = STRATEGIES[strategy].partitions[0], (37, 61, 90)
    cell = Cell("prefill", config, 2, Layout.parse(layout), strategy, partition, "cpu_flash", "float32", "cpu", lengths, seed=3, mla=mla)
    firsts = [output.first for _, output in run_locally(cell, load_kernel("cpu_flash"), CPU) if output.first]
    logits = torch.cat([first.logits_BV for first in firsts[: cell.layout.tp]], 1)
    ids = token_ids(3, lengths, config.vocab)
    with torch.no_grad():
        expected = torch.stack([model(part[None]).logits[0, -1] for part in ids.split(list(lengths))])
    assert float((logits - expected).norm() / expected.norm()) < 5e-5
    assert firsts[0].tokens == expected.argmax(1).tolist()


@pytest.mark.parametrize("mla", ["expanded", "absorbed"])
@pytest.mark.parametrize(("strategy", "partition"), [(name, partition) for name in HERE for partition in STRATEGIES[name].partitions])
def test_every_strategy_moves_rows_that_it_does_not_know(strategy, partition, mla):
    """Both layouts, with prefixes in pages and in chunks, against fp64 that expands K and V; and the traffic of the formulas."""
    for layout, chunk, dtype in ((Layout(cp=2), None, "float32"), (Layout(cp=4, tp=2, ulysses=2 if strategy == "usp" else 1), 48, "bfloat16")):
        config = replace(V3, heads=8, kv_heads=8)
        cell = Cell("prefill", config, 2, layout, strategy, partition, "auto", dtype, "cpu", LENGTHS, prefixes=PREFIXES, chunk=chunk, mla=mla)
        assert unsupported(cell) is None
        world = LocalWorld(layout.world_size, 60)
        kernel = load_kernel("cpu_flash")
        answers = world.run(lambda rank, cell=cell, world=world, kernel=kernel: solve(cell, local_groups(cell.layout, world, rank), kernel, CPU, Models()))
        check = judge(answers[0], kernel, OneDevice(CPU))
        assert check.passed, check.reason


@pytest.mark.parametrize("mla", ["expanded", "absorbed"])
def test_a_group_without_a_sequence_has_an_answer_of_no_rows(mla):
    cell = Cell("prefill", V3, 2, Layout(dp=2, cp=2), "ring", "zigzag", "auto", "float32", "cpu", (67,), mla=mla)
    world, kernel = LocalWorld(4, 60), load_kernel("cpu_flash")
    answers = world.run(lambda rank: solve(cell, local_groups(cell.layout, world, rank), kernel, CPU, Models()))
    assert judge(answers[0], kernel, OneDevice(CPU)).passed


def test_one_row_per_token_travels_whatever_the_heads_and_tensor_parallel_ranks():
    """DeepSeek V3 at 131,072 tokens on 8 ranks: 0.13 GB of latents where expanded K and V would be 11.3 (systems that gather K and V)."""
    latent = LatentAttention(512, 64, 128, 128, q_rank=1536)
    config = ModelConfig("v3", 7168, 1, 128, 128, 192, 18432, 129280, latent=latent)
    for tp in (1, 2, 4):
        cell = Cell("attention", config, 1, Layout(cp=8, tp=tp), "allgather", "zigzag", "auto", "bfloat16", "cpu", (131072,))
        assert traffic(cell, 0).counts == {("cp", "all_gather"): (1, 131072 // 8 * 7 * 576 * 2)}
    assert traffic(cell, 0).bytes == pytest.approx(0.132e9, rel=0.01)


@pytest.mark.parametrize("mla", ["expanded", "absorbed"])
@pytest.mark.parametrize("target", ["prefill", "attention"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_of_live_tensors_is_that_of_the_closed_form(mla, target, dtype):
    config = replace(V3, hidden=256, heads=8, kv_heads=8)
    cell = Cell(target, config, 2 if target == "prefill" else 1, Layout(), "none", "contiguous", "auto", dtype, "cpu", (2048,), mla=mla)
    with torch.inference_mode():
        program = Program(cell, alone(), load_kernel("cpu_flash"), CPU)
        program.prepare()
        peaks = measure_peaks(program.run, open_device("cpu", 0), program.tensors)
    assert peaks["peak_live_bytes"] == pytest.approx(live_bytes(cell, 0), rel=0.07)


def test_yarn_leaves_fast_rotations_and_stretches_slow_ones():
    positions = torch.tensor([1.0])
    plain, stretched = (cos_sin(positions, 64, 1e4, yarn)[1][0, 0].asin() for yarn in (None, replace(YARN, original=4096)))
    assert torch.allclose(plain[:10], stretched[:10]), "32 rotations and more within the original length"
    assert torch.allclose(plain[-8:] / 40, stretched[-8:], rtol=1e-4)
    assert softmax_scale(192, YARN) == pytest.approx(192**-0.5 * 1.3689**2, rel=1e-4)
    assert softmax_scale(192, replace(YARN, mscale_all_dim=0.707)) == pytest.approx(192**-0.5 * 1.2608**2, rel=1e-4)
