"""Reads a Hugging Face config.json: the numbers that cpbench needs, and a refusal by name of what it does not implement.

A config is untrusted and may ask for anything. What would change the answers is refused; what changes neither answers nor time is ignored.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cpbench.errors import CpbenchError, unknown
from cpbench.models.config import MAX_COUNT, MAX_SIZE, Experts, Indexer, LatentAttention, LlamaRope, ModelConfig, Yarn

Raw = dict[str, Any]

MAX_CONFIG_BYTES = 1 << 20
MAX_SHOWN = 60  # characters of a value in a message
COUNTED = ("num_experts", "num_local_experts", "n_routed_experts", "n_group", "topk_group", "first_k_dense_replace")
WINDOWS = ("sliding_window_size", "attention_window_size", "attention_window", "window_size", "local_attention", "local_attention_window_len")
OFF_UNLESS_SAID = ("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")  # their sliding_window counts only with use_sliding_window
SINKS_IN_THE_CODE = ("gpt_oss",)  # model types whose attention has sinks without a field that says so
SINK_FIELD = re.compile(r"(^|_)sinks?(_|$)")
SOFT_CAP_FIELD = re.compile(r"soft_?cap|logit_cap")
REMEDIES = {  # field -> what to do about it; any other is set to null
    "use_sliding_window": "Set use_sliding_window to false",
    "layer_types": "Make every entry of layer_types full_attention",
    "model_type": "Take a preset of the same sizes",
}
FULL_ATTENTION = ("full_attention", "indexed_attention")  # of the latter, the number of keys is a field of its own
# field -> the values that a layer here computes; a field that is left out has one of them
COMPUTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "partial_rotary_factor": (1,),
    "decoder_sparse_step": (1,),
    "moe_layer_freq": (1,),
    "rope_interleave": (True,),
    "topk_method": ("greedy", "group_limited_greedy", "noaux_tc"),
}
SCALED_ROPE = ("yarn",)
YARN_FIELDS = {"factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"}
ROPE_FIELDS = YARN_FIELDS | {"rope_type", "type", "rope_theta"}


def from_hugging_face(path: str | Path) -> ModelConfig:
    """Read a Hugging Face config.json, or the folder that holds one. Raises CpbenchError with what is wrong in it."""
    file = Path(path)
    try:
        file = file / "config.json" if file.is_dir() else file
        if file.stat().st_size > MAX_CONFIG_BYTES:
            raise CpbenchError(f"{file} is larger than 1 MiB.", "A config.json is a few kilobytes: is this the right file?")
        if not file.is_file():  # a device has no end
            raise CpbenchError(f"{file} is no file.", "Give a preset name (cpbench list models) or the path of a config.json.")
        raw = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CpbenchError(f"{file} cannot be read: {error.strerror}.", "Give a preset name (cpbench list models) or the path of a config.json.") from error
    except (ValueError, RecursionError) as error:
        raise CpbenchError(f"{file} is not JSON.", "Give the config.json of a Hugging Face model.") from error
    if not isinstance(raw, dict):
        raise CpbenchError(f"{file} holds no JSON object.", "Give the config.json of a Hugging Face model.")
    return _read(raw, file)


def _read(raw: Raw, file: Path) -> ModelConfig:
    architectures = raw.get("architectures") or ["(none)"]
    first = architectures[0] if isinstance(architectures, list) else architectures
    architecture = first if isinstance(first, str) else _shown(first)
    asked = _unsupported_attention(raw, architecture)
    if asked:
        what, field = asked
        raise CpbenchError(
            f"{file} asks for {what} ({field} = {_shown(raw.get(field))}), which cpbench does not implement.",
            f"{REMEDIES.get(field, f'Set {field} to null')} to measure the model with full attention, or choose another model (cpbench list models).",
        )
    if architecture not in ARCHITECTURES:
        raise unknown(f"architecture in {file}:", architecture, ARCHITECTURES)
    try:
        for field, values in COMPUTED.items():
            if raw.get(field) is not None and raw[field] not in values:
                raise _not_computed(file, f"{field} = {_shown(raw[field])}", f"Layers here have {field} = {' or '.join(map(_shown, values))}.")
        return ModelConfig(**_common(raw, file), **ARCHITECTURES[architecture](raw, file))
    except KeyError as error:
        raise CpbenchError(f"{file} lacks {error.args[0]!r}.", "Give a complete config.json.") from error
    except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise CpbenchError(f"{file} holds a value of the wrong type: {str(error)[:MAX_SHOWN]}.", "Give the config.json of a Hugging Face model.") from error


def _common(raw: Raw, file: Path) -> Raw:
    """What every decoder has."""
    rope = _rope(raw)
    return {
        "name": file.parent.resolve().name or str(file),
        "hidden": raw["hidden_size"],
        "layers": raw["num_hidden_layers"],
        "heads": raw["num_attention_heads"],
        "intermediate": raw["intermediate_size"],
        "vocab": raw["vocab_size"],
        "rope_theta": _number(rope["rope_theta"] if "rope_theta" in rope else raw.get("rope_theta", 1e4)),
        "norm_eps": _number(raw.get("rms_norm_eps", 1e-6)),
        "tied_embeddings": bool(raw.get("tie_word_embeddings", False)),
        "yarn": None if _is_llama_rope(rope) else _yarn(rope, file),
        "llama_rope": _llama_rope(rope, file) if _is_llama_rope(rope) else None,
    }


def _dense(bias: bool, qk_norm: bool) -> Callable[[Raw, Path], Raw]:
    """Grouped-query attention, with or without a bias on Q, K and V and a norm of Q and K."""

    def read(raw: Raw, _: Path) -> Raw:
        heads = raw["num_attention_heads"]
        return {
            "kv_heads": raw.get("num_key_value_heads") or heads,
            "head_dim": raw.get("head_dim") or raw["hidden_size"] // heads,
            "qkv_bias": bool(raw.get("attention_bias", False)) or bias,
            "qk_norm": qk_norm,
        }

    return read


def _qwen3_moe(raw: Raw, file: Path) -> Raw:
    """Qwen3 with experts, in every layer behind those of mlp_only_layers."""
    dense = raw.get("mlp_only_layers") or []
    if sorted(dense) != list(range(len(dense))):
        raise _not_computed(file, f"dense layers between sparse ones (mlp_only_layers = {_shown(dense)})", "Dense layers come first here.")
    count = _whole(raw, "num_experts" if "num_experts" in raw else "num_local_experts", file)
    top_k, width = _whole(raw, "num_experts_per_tok", file), _whole(raw, "moe_intermediate_size", file)
    experts = Experts(count, top_k, width, first=len(dense), normalised=bool(raw.get("norm_topk_prob", False)))
    return _dense(bias=False, qk_norm=True)(raw, file) | {"experts": _checked(experts, file)}


def _deepseek(*, version: int, indexer: bool = False) -> Callable[[Raw, Path], Raw]:
    """Latent attention and experts: V2 scores with a softmax and weighs as it scores, V3 with a sigmoid, a correction and normalised weights."""

    def read(raw: Raw, file: Path) -> Raw:
        q_rank = None if raw.get("q_lora_rank") is None else _whole(raw, "q_lora_rank", file)
        kv_rank, rope_dim, nope_dim, v_dim = (_whole(raw, name, file) for name in ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"))
        latent = LatentAttention(kv_rank, rope_dim, nope_dim, v_dim, q_rank)
        if latent.rope_dim % 2:
            raise CpbenchError(f"{file} has the odd qk_rope_head_dim {latent.rope_dim}.", f"RoPE rotates pairs: use {latent.rope_dim + 1}.")
        if raw.get("attention_bias"):
            raise _not_computed(file, "attention_bias = true", "Latent attention has no biases here.")
        fields = {"kv_heads": raw["num_attention_heads"], "head_dim": latent.nope_dim + latent.rope_dim, "qk_norm": False, "latent": latent}
        fields["experts"] = _deepseek_experts(raw, file, version)
        if indexer:
            fields["indexer"] = Indexer(*(_whole(raw, f"index_{name}", file) for name in ("n_heads", "head_dim", "topk")))
            if q_rank is None:
                raise _not_computed(file, "an indexer without q_lora_rank", "The indexer's queries come from the queries' latent row.")
        return fields

    return read


def _deepseek_experts(raw: Raw, file: Path, version: int) -> Experts:
    scoring = "softmax" if version == 2 else "sigmoid"
    normalised = bool(raw.get("norm_topk_prob", version != 2))
    if raw.get("scoring_func", scoring) != scoring or (version == 2 and normalised):
        field = "norm_topk_prob" if normalised and version == 2 else "scoring_func"
        raise _not_computed(file, f"{field} = {_shown(raw.get(field))}", f"DeepSeek V{version} has {field} = {'false' if field[0] == 'n' else scoring}.")
    grouped = version != 2 or raw.get("topk_method", "greedy") == "group_limited_greedy"
    experts = Experts(
        count=_whole(raw, "n_routed_experts", file),
        top_k=_whole(raw, "num_experts_per_tok", file),
        intermediate=_whole(raw, "moe_intermediate_size", file),
        shared=_whole(raw, "n_shared_experts", file) if raw.get("n_shared_experts") else 0,
        first=_first_sparse(raw, file),
        groups=_whole(raw, "n_group", file) if grouped and raw.get("n_group") is not None else 1,
        top_groups=_whole(raw, "topk_group", file) if grouped and raw.get("topk_group") is not None else 1,
        scoring=scoring,
        correction=version != 2,
        normalised=normalised,
        scale=_number(raw.get("routed_scaling_factor", 1.0)),
    )
    return _checked(experts, file)


def _first_sparse(raw: Raw, file: Path) -> int:
    """Dense layers before the first one with experts; `mlp_layer_types` decides where it is given, as it does in transformers."""
    kinds = raw.get("mlp_layer_types")
    if kinds is None:
        return _whole(raw, "first_k_dense_replace", file, least=0)
    first = sum(1 for kind in kinds if kind == "dense")
    if kinds != ["dense"] * first + ["sparse"] * (len(kinds) - first):
        raise _not_computed(file, f"dense layers between sparse ones (mlp_layer_types = {_shown(kinds)})", "Dense layers come first here.")
    return first


def _checked(experts: Experts, file: Path) -> Experts:
    """The experts, if so many can be chosen."""
    if experts.count % experts.groups:
        near = max(n for n in range(1, experts.groups) if experts.count % n == 0)
        raise CpbenchError(f"{file}: {experts.count} experts do not divide into {experts.groups} groups.", f"The nearest number of groups is {near}.")
    if experts.top_groups > experts.groups:
        raise CpbenchError(f"{file} chooses {experts.top_groups} of {experts.groups} groups.", f"Set topk_group to at most {experts.groups}.")
    most = experts.count // experts.groups * experts.top_groups
    if experts.top_k > most:
        raise CpbenchError(f"{file} chooses {experts.top_k} of {most} experts.", f"Set num_experts_per_tok to at most {most}.")
    return experts


ARCHITECTURES: dict[str, Callable[[Raw, Path], Raw]] = {
    "LlamaForCausalLM": _dense(bias=False, qk_norm=False),
    "Qwen2ForCausalLM": _dense(bias=True, qk_norm=False),
    "Qwen3ForCausalLM": _dense(bias=False, qk_norm=True),
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "DeepseekV2ForCausalLM": _deepseek(version=2),
    "DeepseekV3ForCausalLM": _deepseek(version=3),
    "DeepseekV32ForCausalLM": _deepseek(version=3, indexer=True),
}


def _rope(raw: Raw) -> Raw:
    """The fields of RoPE, as older configs (`rope_scaling`, `type`) and newer ones (`rope_parameters`, `rope_type`) give them."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise TypeError("rope_parameters is no object")
    return rope


def _yarn(rope: Raw, file: Path) -> Yarn | None:
    """Scaled frequencies, if they are YaRN's. As in transformers, `mscale` counts only together with `mscale_all_dim`."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in ("default", None):
        return None
    others = sorted(name for name, value in rope.items() if name not in ROPE_FIELDS and value is not None)
    if kind not in SCALED_ROPE or others:
        what = f"{others[0]} = {_shown(rope[others[0]])}" if kind in SCALED_ROPE else f"rope_type = {_shown(kind)}"
        hint = "Remove rope_scaling from the config to measure it; timing does not depend on it. Of scaled RoPE, cpbench computes yarn and llama3."
        raise CpbenchError(f"{file} asks for scaled RoPE ({what}), which cpbench does not implement.", hint)
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
    if bool(mscale) != bool(all_dim):
        raise _not_computed(file, f"mscale = {_shown(mscale)} with mscale_all_dim = {_shown(all_dim)}", "Give both or none.")
    yarn = Yarn(
        factor=_number(rope["factor"]),
        original=_whole(rope, "original_max_position_embeddings", file),
        beta_fast=_number(rope.get("beta_fast") or 32),
        beta_slow=_number(rope.get("beta_slow") or 1),
        mscale=_number(mscale or 1),
        mscale_all_dim=_number(all_dim or 0),
    )
    if yarn.factor < 1:
        raise CpbenchError(f"{file} has the RoPE factor {yarn.factor:g}.", "A factor stretches positions: it is at least 1.")
    return yarn


def _is_llama_rope(rope: Raw) -> bool:
    return bool(rope.get("rope_type", rope.get("type")) == "llama3")


def _llama_rope(rope: Raw, file: Path) -> LlamaRope:
    """Scaled frequencies of Llama 3.1."""
    factor, low, high = (_number(rope[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
    found = LlamaRope(factor, _whole(rope, "original_max_position_embeddings", file), low, high)
    if found.factor < 1 or not 0 < found.low < found.high:
        what = f"factor {found.factor:g}, low_freq_factor {found.low:g} and high_freq_factor {found.high:g}"
        raise CpbenchError(f"{file} has RoPE of {what}.", "The factor is at least 1, and low_freq_factor below high_freq_factor; Llama 3.1 has 8, 1 and 4.")
    return found


def _whole(raw: Raw, name: str, file: Path, least: int = 1) -> int:
    value, most = raw[name], MAX_COUNT if name in COUNTED else MAX_SIZE
    if type(value) is not int or not least <= value <= most:
        raise CpbenchError(f"{file} has {name} = {_shown(value)}.", f"{name} is a whole number from {least} to {most:,}.")
    return value


def _number(value: Any) -> float:
    """What a layer can compute with. Raises ValueError, TypeError or OverflowError."""
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{number} is no number")
    return number


def _not_computed(file: Path, what: str, hint: str) -> CpbenchError:
    return CpbenchError(f"{file} asks for {what}, which cpbench does not implement.", hint)


def _unsupported_attention(raw: Raw, architecture: str) -> tuple[str, str] | None:
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
        others = [kind for kind in kinds if kind not in FULL_ATTENTION]
        named = {"sliding_attention": "a sliding window", "chunked_attention": "attention in chunks"}
        text = others[0] if others and isinstance(others[0], str) else ""
        what = f"layers of type {repr(text[:MAX_SHOWN]) if text else _shown(others[0])}" if others else ""
        return (named.get(text, what), "layer_types") if others else None
    if raw.get("attention_chunk_size"):
        return "attention in chunks", "attention_chunk_size"
    window = next((field for field in WINDOWS if raw.get(field)), None) or _sliding_window(raw, architecture)
    return ("a sliding window", window) if window else None


def _sliding_window(raw: Raw, architecture: str) -> str | None:
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
    try:
        text = json.dumps(value)
    except RecursionError:
        return "nested lists"
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."
