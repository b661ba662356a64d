"""Public configurations by name. A new model is one line.

The numbers of the released models are those of their published config.json files; `qwen3-tiny` is ours: 8 query heads so that eight
Ulysses ranks have one each, 2 kv heads so that kv heads are replicated, small enough for a laptop. `qwen3-moe-tiny` is the same with experts,
and the tiny DeepSeeks have latent attention, experts that are chosen in groups, and as V3.2 an indexer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cpbench.errors import unknown
from cpbench.models.config import Experts, Indexer, LatentAttention, LlamaRope, ModelConfig, Yarn
from cpbench.models.hugging_face import from_hugging_face

# fmt: off
_DEEPSEEK: dict[str, Any] = {"rope_theta": 1e4, "qk_norm": False}
_V2_YARN, _V3_YARN = Yarn(40.0, 4096, mscale=0.707, mscale_all_dim=0.707), Yarn(40.0, 4096)
_V2_LITE, _LATENT = LatentAttention(512, 64, 128, 128), LatentAttention(512, 64, 128, 128, q_rank=1536)
_V2_EXPERTS = Experts(160, 6, 1536, shared=2, first=1, groups=8, top_groups=3, normalised=False, scale=16.0)
_V3_EXPERTS = Experts(256, 8, 2048, shared=1, first=3, groups=8, top_groups=4, scoring="sigmoid", correction=True, scale=2.5)
_CONFIGS = [
    #           name           hidden layers heads kv head_dim  FFN    vocab
    ModelConfig("qwen3-tiny",     256,    4,    8,  2,   32,    512,   8192),
    ModelConfig("qwen3-moe-tiny", 256,    4,    8,  2,   32,    512,   8192, experts=Experts(8, 2, 128)),
    ModelConfig("qwen3-0.6b",    1024,   28,   16,  8,  128,   3072, 151936, tied_embeddings=True),
    ModelConfig("qwen3-8b",      4096,   36,   32,  8,  128,  12288, 151936),
    ModelConfig("qwen3-32b",     5120,   64,   64,  8,  128,  25600, 151936),
    ModelConfig("qwen3-30b-a3b", 2048,   48,   32,  4,  128,   6144, 151936, experts=Experts(128, 8, 768)),
    ModelConfig("qwen3-235b-a22b", 4096, 94,   64,  4,  128,  12288, 151936, experts=Experts(128, 8, 1536)),
    ModelConfig("qwen2.5-7b",    3584,   28,   28,  4,  128,  18944, 152064, qkv_bias=True, qk_norm=False),
    ModelConfig("deepseek-v2-tiny", 256,  4,    8,  8,   48,    512,   8192, **_DEEPSEEK, latent=LatentAttention(64, 16, 32, 32),
                experts=Experts(8, 2, 128, shared=1, first=1, normalised=False)),
    ModelConfig("deepseek-v3-tiny", 256,  4,    8,  8,   48,    512,   8192, **_DEEPSEEK, latent=LatentAttention(64, 16, 32, 32, q_rank=96),
                experts=Experts(16, 4, 128, shared=1, first=1, groups=4, top_groups=2, scoring="sigmoid", correction=True, scale=2.5)),
    ModelConfig("deepseek-v2-lite", 2048, 27,  16, 16,  192,  10944, 102400, **_DEEPSEEK, latent=_V2_LITE, yarn=_V2_YARN,
                experts=Experts(64, 6, 1408, shared=2, first=1, normalised=False)),
    ModelConfig("deepseek-v2",   5120,   60,  128, 128, 192,  12288, 102400, **_DEEPSEEK, latent=_LATENT, yarn=_V2_YARN, experts=_V2_EXPERTS),
    ModelConfig("deepseek-v3",   7168,   61,  128, 128, 192,  18432, 129280, **_DEEPSEEK, latent=_LATENT, yarn=_V3_YARN, experts=_V3_EXPERTS),
    ModelConfig("deepseek-v3.2-tiny", 256, 4,   8,  8,   48,    512,   8192, **_DEEPSEEK, latent=LatentAttention(64, 16, 32, 32, q_rank=96),
                experts=Experts(16, 4, 128, shared=1, first=1, groups=4, top_groups=2, scoring="sigmoid", correction=True, scale=2.5),
                indexer=Indexer(4, 32, 64)),
    ModelConfig("deepseek-v3.2", 7168,   61,  128, 128, 192,  18432, 129280, **_DEEPSEEK, latent=_LATENT, yarn=_V3_YARN, experts=_V3_EXPERTS,
                indexer=Indexer(64, 128, 2048)),
    ModelConfig("llama3-8b",     4096,   32,   32,  8,  128,  14336, 128256, qk_norm=False, rope_theta=5e5, norm_eps=1e-5),
    ModelConfig("llama3-70b",    8192,   80,   64,  8,  128,  28672, 128256, qk_norm=False, rope_theta=5e5, norm_eps=1e-5),
    ModelConfig("llama3-405b",  16384,  126,  128,  8,  128,  53248, 128256, qk_norm=False, rope_theta=5e5, norm_eps=1e-5,
                llama_rope=LlamaRope(8.0, 8192)),
]
# fmt: on
PRESETS: dict[str, ModelConfig] = {config.name: config for config in _CONFIGS}


def load_config(name: str) -> ModelConfig:
    """A preset by name, or a Hugging Face config.json (or the folder that holds it) by path. Raises CpbenchError."""
    if name in PRESETS:
        return PRESETS[name]
    if "/" in name or name.endswith(".json") or _is_there(name):
        return from_hugging_face(name)
    raise unknown("model", name, PRESETS)


def _is_there(name: str) -> bool:
    try:
        return Path(name).exists()
    except OSError:  # a name that no file can have
        return False
