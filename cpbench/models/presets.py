"""Public configurations by name. A new model is one line.

The numbers of the released models are those of their published config.json files; `qwen3-tiny` is ours: 8 query heads so that eight
Ulysses ranks have one each, 2 kv heads so that kv heads are replicated, small enough for a laptop. `qwen3-moe-tiny` is the same with experts.
"""

from __future__ import annotations

from pathlib import Path

from cpbench.errors import unknown
from cpbench.models.config import Experts, ModelConfig
from cpbench.models.hugging_face import from_hugging_face

# fmt: off
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
    ModelConfig("llama3-8b",     4096,   32,   32,  8,  128,  14336, 128256, qk_norm=False, rope_theta=5e5, norm_eps=1e-5),
    ModelConfig("llama3-70b",    8192,   80,   64,  8,  128,  28672, 128256, qk_norm=False, rope_theta=5e5, norm_eps=1e-5),
]
# fmt: on
PRESETS: dict[str, ModelConfig] = {config.name: config for config in _CONFIGS}


def load_config(name: str) -> ModelConfig:
    """A preset by name, or a Hugging Face config.json (or the folder that holds it) by path. Raises CpbenchError."""
    if name in PRESETS:
        return PRESETS[name]
    if "/" in name or name.endswith(".json") or Path(name).exists():
        return from_hugging_face(name)
    raise unknown("model", name, PRESETS)
