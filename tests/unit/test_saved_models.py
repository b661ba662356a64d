"""Models that transformers has saved: the same logits and first tokens as its own, on one rank and on every kind of layout."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from cpbench.answer import solve
from cpbench.cell import Cell
from cpbench.distributed.local import LocalWorld
from cpbench.distributed.mesh import local_groups
from cpbench.errors import CpbenchError
from cpbench.kernels import load_kernel
from cpbench.layout import Layout, all_layouts
from cpbench.models.checkpoint import INDEX, Checkpoint
from cpbench.models.held import Models
from cpbench.models.hugging_face import from_hugging_face
from cpbench.models.parameters import parameters
from cpbench.models.weights import token_ids
from cpbench.plan import unsupported
from cpbench.strategies import STRATEGIES

transformers = pytest.importorskip("transformers", reason="the oracle of the model tests: pip install 'cpbench[hf]'")
CPU = torch.device("cpu")
LENGTHS = (37, 61, 5)
SMALL = {"vocab_size": 512, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2}
ODD = {"vocab_size": 250, "hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 6}
ONE_KV = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 84, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1}
MODELS = {  # family, sizes, largest file
    "llama": ("Llama", SMALL | {"head_dim": 16, "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "1GB"),
    "llama-tied": ("Llama", ODD | {"head_dim": 12, "tie_word_embeddings": True}, "60KB"),
    "qwen2": ("Qwen2", ODD | {"tie_word_embeddings": False}, "60KB"),
    "qwen2-tied": ("Qwen2", SMALL | {"tie_word_embeddings": True}, "1GB"),
    "qwen3": ("Qwen3", SMALL | {"head_dim": 24, "tie_word_embeddings": False}, "100KB"),
    "qwen3-tied": ("Qwen3", ONE_KV | {"head_dim": 10, "tie_word_embeddings": True}, "1GB"),
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4, "beta_slow": 1}
LLAMA_31 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32, "low_freq_factor": 1, "high_freq_factor": 4}
LATENT = {
    "num_key_value_heads": 8,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 20,
    "num_experts_per_tok": 3,
    "n_routed_experts": 8,
}
MODELS |= {
    "llama-31": ("Llama", SMALL | {"head_dim": 16, "rope_parameters": LLAMA_31}, "1GB"),
    "llama-yarn": ("Llama", SMALL | {"rope_parameters": YARN}, "1GB"),
    "qwen3-moe": (
        "Qwen3Moe",
        SMALL | {"head_dim": 12, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 28, "norm_topk_prob": True},
        "90KB",
    ),
    "qwen3-moe-raw": (
        "Qwen3Moe",
        ODD | {"head_dim": 12, "num_experts": 10, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "mlp_only_layers": [0]},
        "1GB",
    ),
    "deepseek-v2": (
        "DeepseekV2",
        SMALL
        | LATENT
        | {"q_lora_rank": 20, "n_shared_experts": 2, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 3.0},
        "90KB",
    ),
    "deepseek-v2-lite": (
        "DeepseekV2",
        SMALL | LATENT | {"q_lora_rank": None, "n_shared_experts": 1, "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
        "1GB",
    ),
    "deepseek-v3": (
        "DeepseekV3",
        SMALL | LATENT | {"q_lora_rank": 20, "n_group": 4, "topk_group": 2, "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
        "90KB",
    ),
    "deepseek-v3.2": (
        "DeepseekV32",
        SMALL | LATENT | {"q_lora_rank": 20, "n_group": 4, "topk_group": 2, "index_n_heads": 16, "index_head_dim": 16, "index_topk": 24},
        "90KB",  # with few heads many scores are zero, and transformers takes any of those
    ),
}
EVERYWHERE = {"qwen3": 12, "deepseek-v3.2": 40}  # and how many layouts there are at least
KERNEL = load_kernel("cpu_flash")
EXPERT_LAYOUTS = [("cp2/ep2", "ring", "zigzag"), ("tp2/ep2", "none", "contiguous"), ("dp2tp2/ep2tp2", "none", "contiguous")]
LAYOUTS = [
    ("cp1", "none", "contiguous"),
    ("tp2", "none", "contiguous"),
    ("cp2", "allgather", "zigzag"),
    ("cp2", "ring", "zigzag"),
    ("cp2", "ulysses", "contiguous"),
    ("pp2", "none", "contiguous"),
    ("dp2", "none", "contiguous"),
    ("cp2tp2", "ring", "zigzag"),
]


def saved(name, folder):
    """A random model of a family, its norms and biases not at their defaults, saved as transformers does."""
    family, sizes, largest = MODELS[name]
    torch.manual_seed(len(name))
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name or "bias" in parameter_name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif "mlp.gate.weight" in parameter_name:
                parameter.copy_(torch.randn_like(parameter))  # so that no two experts are nearly as good
            else:
                parameter.mul_(3)
        for buffer_name, buffer in model.named_buffers():
            if "e_score_correction_bias" in buffer_name:
                buffer.add_(torch.randn_like(buffer) * 0.2)
    model.save_pretrained(folder, max_shard_size=largest)
    return model


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """name -> (folder, logits of the last tokens by transformers), made on first use."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model = saved(name, folder)
            ids = token_ids(3, LENGTHS, model.config.vocab_size)
            with torch.no_grad():
                made[name] = folder, torch.stack([model(part[None]).logits[0, -1] for part in ids.split(list(LENGTHS))])
        return made[name]

    return get


def answer_of(folder, config, layout, strategy, partition):
    """The prefill of every layer on all ranks of a layout, as threads."""
    name, world = Checkpoint.open(folder).name, LocalWorld(Layout.parse(layout).world_size, 60)
    cell = Cell("prefill", config, config.layers, Layout.parse(layout), strategy, partition, "cpu_flash", "float32", "cpu", LENGTHS, seed=3, weights=name)
    return world.run(lambda rank: solve(cell, local_groups(cell.layout, world, rank), load_kernel("cpu_flash"), CPU, Models(str(folder))))[0][-1]


def cases():
    """Of the models that do not run on every layout."""
    for name, (_, sizes, _) in MODELS.items():
        if name not in EVERYWHERE:
            yield from ((name, *layout) for layout in [*LAYOUTS, *(EXPERT_LAYOUTS if "moe_intermediate_size" in sizes else [])])


def every_cell(config, weights):
    """On every layout of 1, 2 and 4 ranks that the model fits, with every strategy that is at home here."""
    for layout in (layout for ranks in (1, 2, 4) for layout in all_layouts(ranks, config.experts is not None)):
        for strategy in ("none", "allgather", "ring", "ulysses", "ulysses-gather", "usp", "pass-q"):
            one = replace(layout, ulysses=2 if strategy == "usp" and layout.cp % 2 == 0 else 1)
            partition = STRATEGIES[strategy].partitions[0]
            cell = Cell("prefill", config, config.layers, one, strategy, partition, "auto", "float32", "cpu", LENGTHS, seed=3, weights=weights)
            if (strategy == "none") == (layout.cp == 1) and not unsupported(cell):
                yield cell


@pytest.mark.parametrize(("name", "layout", "strategy", "partition"), list(cases()))
def test_a_saved_model_gives_the_logits_and_first_tokens_of_transformers(checkpoints, name, layout, strategy, partition):
    folder, expected = checkpoints(name)
    config = from_hugging_face(folder)
    Checkpoint.open(folder).require(config, config.layers)
    answer = answer_of(folder, config, layout, strategy, partition)
    assert float((answer.logits - expected).norm() / expected.norm()) < 2e-5
    assert list(answer.first_tokens) == expected.argmax(1).tolist()


@pytest.mark.parametrize("name", EVERYWHERE)
def test_every_layout_of_one_two_and_four_ranks_gives_the_logits_and_first_tokens_of_transformers(checkpoints, name):
    folder, expected = checkpoints(name)
    seen = set()
    for cell in every_cell(from_hugging_face(folder), Checkpoint.open(folder).name):
        world = LocalWorld(cell.world_size, 60)
        answer = world.run(lambda rank, cell=cell, world=world: solve(cell, local_groups(cell.layout, world, rank), KERNEL, CPU, Models(str(folder))))[0][-1]
        assert float((answer.logits - expected).norm() / expected.norm()) < 2e-5, cell.id
        assert list(answer.first_tokens) == expected.argmax(1).tolist(), cell.id
        seen.add(str(cell.layout))
    assert len(seen) >= EVERYWHERE[name]


@pytest.mark.parametrize("name", MODELS)
def test_the_parameters_of_a_model_are_those_that_transformers_saves(checkpoints, name):
    folder, _ = checkpoints(name)
    config = from_hugging_face(folder)
    stored = {name: entry.shape for name, entry in Checkpoint.open(folder).tensors.items()}
    assert stored == dict(parameters(config, config.layers))
    assert (len({entry.file for entry in Checkpoint.open(folder).tensors.values()}) > 1) == (MODELS[name][2] != "1GB")


def test_the_predictor_behind_the_last_layer_of_deepseek_v3_is_not_read(checkpoints, tmp_path):
    folder, _ = checkpoints("deepseek-v3")
    config = from_hugging_face(folder)
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    index = json.loads((tmp_path / INDEX).read_text())
    for layer, message in ((config.layers, None), (config.layers + 1, rf"extra\.safetensors holds tensor model\.layers\.{config.layers + 1}\.eh_proj\.weight")):
        name = f"model.layers.{layer}.eh_proj.weight"
        save_file({name: torch.zeros(2, 2)}, tmp_path / "extra.safetensors")
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": index["weight_map"] | {name: "extra.safetensors"}}))
        with pytest.raises(CpbenchError, match=message) if message else nullcontext():
            Checkpoint.open(tmp_path).require(config, config.layers)
