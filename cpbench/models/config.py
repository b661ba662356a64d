"""What shape a decoder has: the numbers of a Hugging Face config.json that cpbench needs, checked and named.

Pure data: no torch. The layers that these numbers describe are in the other modules of this package.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cpbench.errors import CpbenchError, unknown

ARCHITECTURES = {
    "LlamaForCausalLM": {"qkv_bias": False, "qk_norm": False},
    "Qwen2ForCausalLM": {"qkv_bias": True, "qk_norm": False},
    "Qwen3ForCausalLM": {"qkv_bias": False, "qk_norm": True},
}
MAX_CONFIG_BYTES = 1 << 20
WINDOWS = ("sliding_window_size", "attention_window_size", "attention_window", "window_size", "local_attention", "local_attention_window_len")
OFF_UNLESS_SAID = ("Qwen2ForCausalLM", "Qwen3ForCausalLM")  # their sliding_window counts only with use_sliding_window
SINKS_IN_THE_CODE = ("gpt_oss",)  # model types whose attention has sinks without a field that says so
SINK_FIELD = re.compile(r"(^|_)sinks?(_|$)")
SOFT_CAP_FIELD = re.compile(r"soft_?cap|logit_cap")
REMEDIES = {  # field -> what to do about it; any other is set to null
    "use_sliding_window": "Set use_sliding_window to false",
    "layer_types": "Make every entry of layer_types full_attention",
    "model_type": "Take a preset of the same sizes",
}


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek V2, arXiv 2405.04434): K and V of all heads are made from one latent row per token."""

    kv_rank: int  # width of the normed latent
    rope_dim: int  # of the key part that is rotated, shared by all heads
    nope_dim: int  # of the key part of each head that is not
    v_dim: int
    q_rank: int | None = None  # None: queries are projected at once

    @property
    def row_values(self) -> int:
        """Values of one token that are cached and travel: the latent and the rotated key part."""
        return self.kv_rank + self.rope_dim


@dataclass(frozen=True)
class Experts:
    """A mixture of experts in every layer from `first` on. Each expert is a SwiGLU of width `intermediate`; `shared` ones see every token."""

    count: int
    top_k: int
    intermediate: int
    shared: int = 0
    first: int = 0  # dense layers before the first sparse one
    groups: int = 1  # of experts, of which `top_groups` may be chosen
    top_groups: int = 1
    scoring: str = "softmax"  # or sigmoid: scores of the experts for a token
    correction: bool = False  # a bias on the scores that chooses but does not weigh, and groups by the sum of their two best (V3)
    normalised: bool = True  # the weights of the chosen experts sum to 1, before `scale`
    scale: float = 1.0


@dataclass(frozen=True)
class Indexer:
    """The lightning indexer of DeepSeek sparse attention (V3.2): every query attends to the `top_k` keys that score highest."""

    heads: int
    dim: int
    top_k: int


@dataclass(frozen=True)
class Yarn:
    """Rotary frequencies stretched to longer contexts (arXiv 2309.00071)."""

    factor: float
    original: int  # positions that the model was trained on
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """A decoder with grouped-query or latent attention, dense or with experts. Sizes are numbers of elements."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    rope_theta: float = 1e6
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    qk_norm: bool = True
    tied_embeddings: bool = False
    latent: LatentAttention | None = None  # then head_dim is that of q and k, and every head has its own k and v
    experts: Experts | None = None
    indexer: Indexer | None = None
    yarn: Yarn | None = None

    def __post_init__(self) -> None:
        for field in ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "vocab"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CpbenchError(f"Model {self.name!r} has {field} = {value!r}.", f"{field} must be a whole number of at least 1.")
        if self.heads % self.kv_heads:
            near = max(n for n in range(1, self.kv_heads + 1) if self.heads % n == 0)
            raise CpbenchError(
                f"Model {self.name!r}: {self.heads} query heads do not divide over {self.kv_heads} kv heads.",
                f"The nearest number of kv heads is {near}.",
            )
        if self.head_dim % 2:
            raise CpbenchError(f"Model {self.name!r} has the odd head_dim {self.head_dim}.", f"RoPE rotates pairs: use {self.head_dim + 1}.")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`."""
        parts = {"latent": LatentAttention, "experts": Experts, "indexer": Indexer, "yarn": Yarn}
        return cls(**{name: parts[name](**value) if name in parts and value is not None else value for name, value in data.items()})

    def is_sparse(self, layer: int) -> bool:
        """Whether the feed-forward block of a layer is a mixture of experts."""
        return self.experts is not None and layer >= self.experts.first

    def reduced(self) -> ModelConfig:
        """The same heads and rules with a narrow width and two layers at most: what numerics are checked on where the model is wide."""
        return replace(self, hidden=min(self.hidden, 256), layers=min(self.layers, 2), intermediate=min(self.intermediate, 512), vocab=min(self.vocab, 8192))

    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        bias = self.head_dim * (self.heads + 2 * self.kv_heads) if self.qkv_bias else 0
        norms = 2 * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        return attention + bias + norms + 3 * self.hidden * self.intermediate


def from_hugging_face(path: str | Path) -> ModelConfig:
    """Read a Hugging Face config.json, or the folder that holds one. Raises CpbenchError with what is wrong in it."""
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    try:
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise CpbenchError(f"{file} is larger than 1 MiB.", "A config.json is a few kilobytes: is this the right file?")
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CpbenchError(f"{file} cannot be read: {error.strerror}.", "Give a preset name (cpbench list models) or the path of a config.json.") from error
    except (ValueError, RecursionError) as error:
        raise CpbenchError(f"{file} is not JSON.", "Give the config.json of a Hugging Face model.") from error
    if not isinstance(raw, dict):
        raise CpbenchError(f"{file} holds no JSON object.", "Give the config.json of a Hugging Face model.")
    return _read(raw, file)


def _read(raw: dict[str, Any], file: Path) -> ModelConfig:
    architectures = raw.get("architectures") or ["(none)"]
    architecture = str(architectures[0]) if isinstance(architectures, list) else str(architectures)
    asked = _unsupported_attention(raw, architecture)
    if asked:
        what, field = asked
        raise CpbenchError(
            f"{file} asks for {what} ({field} = {_shown(raw.get(field))}), which cpbench does not implement.",
            f"{REMEDIES.get(field, f'Set {field} to null')} to measure the model with full attention, or choose another model (cpbench list models).",
        )
    if architecture not in ARCHITECTURES:
        raise unknown(f"architecture in {file}:", architecture, ARCHITECTURES)
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) not in ("default", None):
        raise CpbenchError(
            f"{file} asks for scaled RoPE, which dense models here do not implement.",
            "Remove rope_scaling from the config; timing does not depend on it.",
        )
    rules = ARCHITECTURES[architecture]
    try:
        heads = raw["num_attention_heads"]
        return ModelConfig(
            name=file.parent.name or str(file),
            hidden=raw["hidden_size"],
            layers=raw["num_hidden_layers"],
            heads=heads,
            kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            intermediate=raw["intermediate_size"],
            vocab=raw["vocab_size"],
            rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 1e4))),
            norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=bool(raw.get("attention_bias", False)) or rules["qkv_bias"],
            qk_norm=rules["qk_norm"],
        )
    except KeyError as error:
        raise CpbenchError(f"{file} lacks {error.args[0]!r}.", "Give a complete config.json.") from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise CpbenchError(f"{file} holds a value of the wrong type: {error}.", "Give the config.json of a Hugging Face model.") from error


def _unsupported_attention(raw: dict[str, Any], architecture: str) -> tuple[str, str] | None:
    """Attention that a config asks for and no kernel here computes, and the field that asks for it. Dropping it would change the answers.

    Named by any field of public configs (transformers 5): windows and chunks of Mistral, Gemma, Qwen, Llama 4 and others, sinks of
    gpt-oss and MiMo, soft-caps of Gemma 2 and Grok. `layer_types` decides where it is given, as it does in transformers.
    """
    sinks = next((field for field, value in raw.items() if SINK_FIELD.search(field.lower()) and value), None)
    if sinks or raw.get("model_type") in SINKS_IN_THE_CODE:
        return "attention sinks", sinks or "model_type"
    soft_cap = next((field for field, value in raw.items() if SOFT_CAP_FIELD.search(field.lower()) and value), None)
    if soft_cap:
        return "soft-capped logits", soft_cap
    kinds = raw.get("layer_types")
    if isinstance(kinds, list):
        others = [kind for kind in kinds if kind != "full_attention"]
        named = {"sliding_attention": "a sliding window", "chunked_attention": "attention in chunks"}
        return (named.get(str(others[0]), f"layers of type {others[0]!r}"), "layer_types") if others else None
    if raw.get("attention_chunk_size"):
        return "attention in chunks", "attention_chunk_size"
    window = next((field for field in WINDOWS if raw.get(field)), None) or _sliding_window(raw, architecture)
    return ("a sliding window", window) if window else None


def _sliding_window(raw: dict[str, Any], architecture: str) -> str | None:
    """The field that turns `sliding_window` on; None if it is absent or off, or if no layer lies behind `max_window_layers`."""
    if not raw.get("sliding_window"):
        return None
    if not raw.get("use_sliding_window", architecture not in OFF_UNLESS_SAID):
        return None
    first, layers = raw.get("max_window_layers"), raw.get("num_hidden_layers")
    if isinstance(first, int) and isinstance(layers, int) and first >= layers:
        return None
    return "use_sliding_window" if "use_sliding_window" in raw else "sliding_window"


def _shown(value: Any) -> str:
    """A value of a config in few characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
