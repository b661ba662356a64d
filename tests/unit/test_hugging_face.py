"""config.json of the released models with experts and latent attention, and what of such configs no layer computes."""

import json
from math import prod

import pytest

from cpbench.errors import CpbenchError
from cpbench.models.config import Experts, Indexer, LatentAttention, LlamaRope, ModelConfig, Yarn
from cpbench.models.hugging_face import from_hugging_face
from cpbench.models.parameters import parameters

MLA, LITE = LatentAttention(512, 64, 128, 128, q_rank=1536), LatentAttention(512, 64, 128, 128)
V2_YARN, V3_YARN = Yarn(40.0, 4096, mscale=0.707, mscale_all_dim=0.707), Yarn(40.0, 4096)
V3_EXPERTS = Experts(256, 8, 2048, shared=1, first=3, groups=8, top_groups=4, scoring="sigmoid", correction=True, scale=2.5)
DEEPSEEK = {"rope_theta": 1e4, "qk_norm": False}
# fmt: off
CONFIGS = [  # as presets would have them
    ModelConfig("qwen3-30b-a3b",   2048, 48,  32,   4, 128,  6144, 151936, experts=Experts(128, 8, 768)),
    ModelConfig("qwen3-235b-a22b", 4096, 94,  64,   4, 128, 12288, 151936, experts=Experts(128, 8, 1536)),
    ModelConfig("deepseek-v2-lite", 2048, 27, 16,  16, 192, 10944, 102400, latent=LITE, yarn=V2_YARN, **DEEPSEEK,
                experts=Experts(64, 6, 1408, shared=2, first=1, normalised=False)),
    ModelConfig("deepseek-v2",     5120, 60, 128, 128, 192, 12288, 102400, latent=MLA, yarn=V2_YARN, **DEEPSEEK,
                experts=Experts(160, 6, 1536, shared=2, first=1, groups=8, top_groups=3, normalised=False, scale=16.0)),
    ModelConfig("deepseek-v3",     7168, 61, 128, 128, 192, 18432, 129280, latent=MLA, yarn=V3_YARN, **DEEPSEEK, experts=V3_EXPERTS),
    ModelConfig("deepseek-v3.2",   7168, 61, 128, 128, 192, 18432, 129280, latent=MLA, yarn=V3_YARN, **DEEPSEEK, experts=V3_EXPERTS,
                indexer=Indexer(64, 128, 2048)),
    ModelConfig("llama3-405b",    16384, 126, 128,   8, 128, 53248, 128256, rope_theta=5e5, norm_eps=1e-5, qk_norm=False,
                llama_rope=LlamaRope(8.0, 8192)),
]
# fmt: on
QWEN3_MOE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
V2 = V3 | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "first_k_dense_replace": 1,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 60,
    "rope_scaling": V3["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707},
    "routed_scaling_factor": 16.0,
    "scoring_func": "softmax",
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "vocab_size": 102400,
}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 128,
    "num_hidden_layers": 126,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
RELEASED = {
    "llama3-405b": LLAMA,
    "qwen3-30b-a3b": QWEN3_MOE,
    "qwen3-235b-a22b": QWEN3_MOE
    | {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "num_attention_heads": 64,
        "num_hidden_layers": 94,
        "max_window_layers": 94,
    },
    "deepseek-v2-lite": V2
    | {"hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408, "n_routed_experts": 64, "num_attention_heads": 16}
    | {
        "num_key_value_heads": 16,
        "num_hidden_layers": 27,
        "q_lora_rank": None,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
    },
    "deepseek-v2": V2,
    "deepseek-v3": V3,
    "deepseek-v3.2": V3 | {"architectures": ["DeepseekV32ForCausalLM"], "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048},
}
BILLIONS = {
    "qwen3-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235,
    "deepseek-v2-lite": 15.7,
    "deepseek-v2": 236,
    "deepseek-v3": 671,
    "deepseek-v3.2": 671.9,
    "llama3-405b": 405.9,
}


def read(folder, values):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({name: value for name, value in values.items() if value is not ...}))
    return from_hugging_face(folder)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_released_configs_are_read_and_have_the_parameters_of_their_model_cards(tmp_path, config):
    assert read(tmp_path / config.name, RELEASED[config.name]) == config
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    total = sum(prod(shape) for _, shape in parameters(config, config.layers))
    assert total / 1e9 == pytest.approx(BILLIONS[config.name], rel=0.005)


def test_fields_that_newer_transformers_writes_mean_the_same(tmp_path):
    rope = {"rope_parameters": V3["rope_scaling"] | {"rope_type": "yarn", "rope_theta": 1e4}, "rope_scaling": ..., "rope_theta": ...}
    for changes in (rope, {"mlp_layer_types": ["dense"] * 3 + ["sparse"] * 58, "first_k_dense_replace": 5}, {"rope_interleave": True}):
        assert read(tmp_path / "deepseek-v3", V3 | changes) == CONFIGS[4]
    assert read(tmp_path / "qwen3-30b-a3b", QWEN3_MOE | {"num_experts": ..., "num_local_experts": 128}) == CONFIGS[0]
    assert read(tmp_path / "q", QWEN3_MOE | {"mlp_only_layers": [1, 0]}).experts.first == 2


def test_groups_of_experts_count_only_where_the_router_looks_at_them(tmp_path):
    experts = [read(tmp_path, V2 | {"topk_method": method}).experts for method in ("greedy", "group_limited_greedy")]
    assert [(found.groups, found.top_groups) for found in experts] == [(1, 1), (8, 3)]


def test_yarn_without_mscale_scales_cos_and_sin_and_not_the_softmax(tmp_path):
    """As transformers reads the configs of Qwen: amplitude 0.1 ln(factor) + 1."""
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert read(tmp_path, QWEN3_MOE | {"rope_scaling": rope}).yarn == Yarn(4.0, 32768, 32.0, 1.0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("base", "changes", "message"),
    [
        (QWEN3_MOE, {"decoder_sparse_step": 2}, "asks for decoder_sparse_step = 2"),
        (QWEN3_MOE, {"mlp_only_layers": [0, 5]}, "dense layers between sparse ones"),
        (QWEN3_MOE, {"num_experts_per_tok": 200}, "chooses 200 of 128 experts"),
        (QWEN3_MOE, {"num_experts": "128"}, 'has num_experts = "128"'),
        (QWEN3_MOE, {"moe_intermediate_size": ...}, "lacks 'moe_intermediate_size'"),
        (QWEN3_MOE, {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 4}, "a sliding window"),
        (V2, {"norm_topk_prob": True}, "asks for norm_topk_prob = true"),
        (V2, {"scoring_func": "sigmoid"}, 'asks for scoring_func = "sigmoid"'),
        (V3, {"scoring_func": "softmax"}, 'asks for scoring_func = "softmax"'),
        (V3, {"topk_method": "random"}, 'asks for topk_method = "random"'),
        (V3, {"n_group": 7}, "256 experts do not divide into 7 groups"),
        (V3, {"topk_group": 9}, "chooses 9 of 8 groups"),
        (V3, {"topk_group": 1, "num_experts_per_tok": 33}, "chooses 33 of 32 experts"),
        (V3, {"moe_layer_freq": 2}, "asks for moe_layer_freq = 2"),
        (V3, {"mlp_layer_types": ["sparse", "dense"]}, "dense layers between sparse ones"),
        (V3, {"kv_lora_rank": 0}, "has kv_lora_rank = 0"),
        (V3, {"qk_rope_head_dim": 63}, "the odd qk_rope_head_dim 63"),
        (V3, {"attention_bias": True}, "asks for attention_bias = true"),
        (V3, {"rope_interleave": False}, "asks for rope_interleave = false"),
        (V3, {"rope_scaling": V3["rope_scaling"] | {"mscale_all_dim": 0}}, "asks for mscale = 1.0 with mscale_all_dim = 0"),
        (V3, {"rope_scaling": V3["rope_scaling"] | {"factor": 0.5}}, "has the RoPE factor 0.5"),
        (V3, {"rope_scaling": V3["rope_scaling"] | {"truncate": False}}, r"scaled RoPE \(truncate = false\)"),
        (LLAMA, {"rope_scaling": LLAMA["rope_scaling"] | {"high_freq_factor": 1.0}}, "low_freq_factor 1 and high_freq_factor 1"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}}, "lacks 'low_freq_factor'"),
        (RELEASED["deepseek-v3.2"], {"index_topk": ...}, "lacks 'index_topk'"),
        (RELEASED["deepseek-v3.2"], {"q_lora_rank": None}, "an indexer without q_lora_rank"),
    ],
)
def test_what_no_layer_computes_is_refused_by_field(tmp_path, base, changes, message):
    with pytest.raises(CpbenchError, match=message) as caught:
        read(tmp_path, base | changes)
    assert caught.value.exit_code == 2 and caught.value.hint
