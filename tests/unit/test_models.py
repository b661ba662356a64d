"""The decoder against Hugging Face's own layers in fp32, and the rules of configurations and random weights."""

import json
from dataclasses import replace
from math import prod

import pytest
import torch

from cpbench.cell import Cell
from cpbench.errors import CpbenchError
from cpbench.formulas import weights_bytes
from cpbench.kernels import load_kernel
from cpbench.layout import Layout
from cpbench.models.config import ModelConfig
from cpbench.models.hugging_face import REMEDIES, from_hugging_face
from cpbench.models.parameters import parameters
from cpbench.models.presets import PRESETS, load_config
from cpbench.models.weights import RandomWeights, token_ids
from cpbench.program import Program, alone, run_locally

transformers = pytest.importorskip("transformers", reason="the oracle of the model tests: pip install 'cpbench[hf]'")
CPU = torch.device("cpu")
SIZES = {"vocab_size": 512, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2}
FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"rope_theta": 1e4}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 24}),
}


class GivenWeights:
    """Shards of a state dict, with the calls of RandomWeights."""

    def __init__(self, state):
        self.state = state

    def linear(self, name, shape, rows=None, columns=None):
        weight = self.state[name]
        assert tuple(weight.shape) == tuple(shape), name
        rows, columns = rows or range(shape[0]), columns or range(shape[1])
        return weight[rows.start : rows.stop, columns.start : columns.stop].contiguous()

    def hold(self, weight, *, is_summed=False):
        return weight

    def plain(self, weight):
        return weight

    def norm(self, name, size):
        assert self.state[name].shape == (size,)
        return self.state[name]

    def bias(self, name, size, rows=None, *, wide=False):
        rows = rows or range(size)
        return self.state[name][rows.start : rows.stop]


@pytest.fixture(params=FAMILIES)
def oracle(request, tmp_path):
    """A tiny random model of a family, its config as cpbench reads it, and its weights (norms and biases not at their defaults)."""
    make_config, make_model, extra = FAMILIES[request.param]
    torch.manual_seed(0)
    model = make_model(make_config(**SIZES, **extra, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            else:
                parameter.mul_(3)
    model.config.architectures = [make_model.__name__]
    model.config.save_pretrained(tmp_path)
    return model, from_hugging_face(tmp_path / "config.json")


@pytest.mark.parametrize(("layout", "strategy", "partition"), [("cp1", "none", "contiguous"), ("cp2", "ring", "zigzag"), ("cp2tp2", "allgather", "zigzag")])
def test_logits_and_first_tokens_are_those_of_hugging_face(oracle, layout, strategy, partition, monkeypatch):
    model, config = oracle
    monkeypatch.setattr("cpbench.program.RandomWeights", lambda *_: GivenWeights({k: v.detach() for k, v in model.state_dict().items()}))
    lengths = (37, 61)
    cell = Cell("prefill", config, 2, Layout.parse(layout), strategy, partition, "cpu_flash", "float32", "cpu", lengths, seed=3)
    outputs = [output.first for _, output in run_locally(cell, load_kernel("cpu_flash"), CPU)]
    logits = torch.cat([first.logits_BV for first in outputs[: cell.layout.tp]], 1)
    ids = token_ids(3, lengths, config.vocab)
    with torch.no_grad():
        expected = torch.stack([model(part[None]).logits[0, -1] for part in ids.split(list(lengths))])
    assert float((logits - expected).norm() / expected.norm()) < 2e-5
    assert outputs[0].tokens == expected.argmax(1).tolist()


def test_presets_have_the_published_parameter_counts():
    """Totals of the model cards, in billions."""
    published = {"qwen3-0.6b": 0.596, "qwen3-8b": 8.19, "qwen3-32b": 32.8, "qwen2.5-7b": 7.62, "llama3-8b": 8.03, "llama3-70b": 70.6, "llama3-405b": 405.9}
    published |= {"qwen3-30b-a3b": 30.5, "qwen3-235b-a22b": 235.1, "deepseek-v2-lite": 15.7, "deepseek-v2": 235.7, "deepseek-v3": 671.0}
    published |= {"deepseek-v3.2": 671.9}  # those of V3, and an indexer per layer
    assert set(published) == {name for name in PRESETS if not name.endswith("-tiny")}
    for name, billions in published.items():
        config = PRESETS[name]
        total = sum(prod(shape) for _, shape in parameters(config, config.layers))
        assert total / 1e9 == pytest.approx(billions, rel=0.005), name


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_the_closed_form_of_weights_counts_every_parameter(config):
    layers = min(config.layers, 5)
    cell = Cell("prefill", config, layers, Layout(), "none", "contiguous", "auto", "bfloat16", "cpu", (8,))
    assert weights_bytes(cell) == 2 * sum(prod(shape) for _, shape in parameters(config, layers))


def write(tmp_path, **changes):
    values = {"architectures": ["Qwen3ForCausalLM"], **SIZES, "head_dim": 32, "rope_theta": 1e6, **changes}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return tmp_path


def test_a_folder_with_a_config_is_a_model(tmp_path):
    config = load_config(str(write(tmp_path)))
    assert (config.hidden, config.heads, config.kv_heads, config.head_dim, config.qk_norm, config.qkv_bias) == (96, 6, 2, 32, True, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "Unknown architecture"),
        ({"hidden_size": None}, "lacks 'hidden_size'"),
        ({"hidden_size": "96"}, "hidden"),
        ({"num_key_value_heads": 4}, "do not divide"),
        ({"num_hidden_layers": 0}, "layers = 0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4}}, r"scaled RoPE \(rope_type = \"linear\"\)"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "lacks 'original_max_position_embeddings'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "attention_factor": 1.5}}, r"scaled RoPE \(attention_factor = 1.5\)"),
        ({"rope_parameters": "yarn"}, "wrong type"),
        ({"hidden_act": "gelu"}, 'asks for hidden_act = "gelu"'),
        ({"use_sliding_window": True, "sliding_window": 4096}, "sliding window"),
        ({"num_attention_heads": 0}, "wrong type|heads"),
        ({"num_key_value_heads": 10**12}, "has kv_heads above 65,536"),
        ({"rope_theta": float("nan")}, "wrong type: nan is no number"),
        ({"rms_norm_eps": 10**400}, "wrong type"),
        ({"hidden_size": [1] * 3000}, r"has hidden = \[1, 1, .{0,60}\.$"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(CpbenchError, match=message) as caught:
        load_config(str(write(tmp_path, **changes)))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("changes", "what", "field"),
    [
        ({"use_sliding_window": True, "sliding_window": 4096}, "a sliding window", "use_sliding_window = true"),
        ({"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1}, "a sliding window", "use_sliding_window"),
        ({"architectures": ["LlamaForCausalLM"], "sliding_window": 4096}, "a sliding window", "sliding_window = 4096"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, "a sliding window", "sliding_window = 4096"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "a sliding window", "layer_types"),
        ({"layer_types": ["chunked_attention", "full_attention"]}, "attention in chunks", "layer_types"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "layers of type 'linear_attention'", "layer_types"),
        ({"architectures": ["Llama4ForCausalLM"], "attention_chunk_size": 8192}, "attention in chunks", "attention_chunk_size = 8192"),
        ({"attention_window_size": 2048}, "a sliding window", "attention_window_size = 2048"),
        ({"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "sliding_window": 128}, "attention sinks", 'model_type = "gpt_oss"'),
        ({"attention_sinks": 4}, "attention sinks", "attention_sinks = 4"),
        ({"add_swa_attention_sink_bias": True}, "attention sinks", "add_swa_attention_sink_bias = true"),
        ({"attn_logit_softcapping": 50.0}, "soft-capped logits", "attn_logit_softcapping = 50.0"),
        ({"architectures": ["Gemma2ForCausalLM"], "final_logit_softcapping": 30.0}, "soft-capped logits", "final_logit_softcapping = 30.0"),
        ({"logits_soft_cap": 30}, "soft-capped logits", "logits_soft_cap = 30"),
        ({"attention_logit_cap": 50}, "soft-capped logits", "attention_logit_cap = 50"),
    ],
)
def test_attention_that_no_kernel_computes_is_refused_by_name(tmp_path, changes, what, field):
    with pytest.raises(CpbenchError) as caught:
        load_config(str(write(tmp_path, **changes)))
    assert f"asks for {what} ({field}" in str(caught.value)
    assert "full attention, or choose another model" in caught.value.hint
    assert caught.value.hint.split(" to measure")[0] in (f"Set {field.split(' ')[0]} to null", *REMEDIES.values())
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 1},
        {"sliding_window": 4096},
        {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 2},
        {"sliding_window": 4096, "use_sliding_window": True, "layer_types": ["full_attention"] * 2},
        {"architectures": ["LlamaForCausalLM"], "layer_types": None, "attn_logit_softcapping": 0, "attention_sinks": False},
        {"hc_sinkhorn_iters": 20},
    ],
)
def test_windows_and_caps_that_are_off_are_no_reason_to_refuse(tmp_path, changes):
    assert load_config(str(write(tmp_path, **changes))).heads == 6


def test_files_that_are_no_config_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CpbenchError, match="not JSON"):
        load_config(str(tmp_path / "config.json"))
    with pytest.raises(CpbenchError, match="cannot be read"):
        load_config(str(tmp_path / "absent.json"))
    with pytest.raises(CpbenchError) as caught:
        load_config("qwen3-8")
    assert "'qwen3-8b'" in caught.value.hint


def test_a_shard_is_the_slice_of_the_whole_and_a_seed_is_a_model():
    weights = RandomWeights(7, torch.float32, CPU)
    whole = weights.linear("a.weight", (64, 48))
    assert torch.equal(weights.linear("a.weight", (64, 48), range(16, 32), range(8, 24)), whole[16:32, 8:24])
    assert not torch.equal(weights.linear("b.weight", (64, 48)), whole)
    assert not torch.equal(RandomWeights(8, torch.float32, CPU).linear("a.weight", (64, 48)), whole)
    assert torch.equal(RandomWeights(7, torch.float64, CPU, torch.bfloat16).linear("a.weight", (64, 48)), whole.bfloat16().double())


def test_random_weights_look_random():
    values = RandomWeights(0, torch.float32, CPU).linear("a.weight", (512, 256))
    assert float(values.mean()) == pytest.approx(0, abs=1e-3)
    assert float(values.std()) == pytest.approx(256**-0.5, rel=0.01)
    correlation = torch.corrcoef(values).fill_diagonal_(0)
    assert float(correlation.abs().max()) < 0.35, "rows of 256 random values correlate by 0.06 on average"
    singular = torch.linalg.svdvals(values)
    assert 0.35 < float(singular[-1]) < float(singular[0]) < 2.6, "the range that Marchenko and Pastur give for 512 x 256 is 0.41 to 2.41"


def test_the_lowest_index_wins_a_tie():
    cell = Cell("prefill", replace(PRESETS["qwen3-tiny"], vocab=64), 1, Layout(), "none", "contiguous", "auto", "float32", "cpu", (8,))
    communicator = Program(cell, alone(), load_kernel("reference"), CPU).steps[0].communicator
    logits = torch.zeros(1, 64)
    logits[0, [40, 9]] = 1.0
    assert communicator.greedy(logits, 0) == ([9], [0.0])


@pytest.mark.parametrize("field", ["hidden", "heads", "head_dim"])
def test_impossible_numbers_are_refused(field):
    with pytest.raises(CpbenchError):
        ModelConfig(**{**PRESETS["qwen3-tiny"].to_dict(), field: -1})
    with pytest.raises(CpbenchError, match="odd"):
        replace(PRESETS["qwen3-tiny"], head_dim=31)
