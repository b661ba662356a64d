"""Which bytes are tried: valid inputs of each kind, broken in the ways in which files are broken and attackers break them.

An input is a function of its kind and a number, so that a finding is found again. What reads it is in targets.py.
"""

from __future__ import annotations

import copy
import json
import random
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from cpbench.scenario import Scenario

ROOT = Path(__file__).parents[2]
SIZES = ["36k", "1M", "1.5M", "36_000", "2%", "0.02", "250ms", "1.5h", "20m", "8GiB", "0", "9007199254740992"]
LAYOUTS = ["cp4tp2", "cp8u4", "tp4sp", "pp2dp2cp4tp2sp", "cp2tp4/ep4tp2", "dp2/dp2", "cp1", "cp1024", "cp2tp4/ep8"]
HEADER = {"__metadata__": {"format": "pt"}, "model.norm.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
INDEXED = {"weight_map": {"model.norm.weight": "a.safetensors", "lm_head.weight": "a.safetensors"}, "metadata": {"total_size": 4}}
CONFIGS: list[dict[str, Any]] = [
    {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 512,
        "vocab_size": 8192,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": 4,
        "layer_types": ["full_attention"] * 4,
    },
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "intermediate_size": 512,
        "vocab_size": 8192,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    {
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 512,
        "vocab_size": 8192,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 128,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    },
    {
        "architectures": ["DeepseekV32ForCausalLM"],
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "intermediate_size": 512,
        "vocab_size": 8192,
        "q_lora_rank": 96,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 128,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "index_n_heads": 4,
        "index_head_dim": 32,
        "index_topk": 64,
        "rope_scaling": {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096},
    },
]
# what a value becomes: other types, bounds of numbers, long and strange texts, deep and long lists
NASTY: list[Any] = [None, True, False, 0, 1, -1, 2, 3, 7, 1024, 2**31, 2**53, 2**63, 10**30, 10**400, 0.0, -0.5, 1e308, float("inf"), float("nan")]
NASTY += ["", " ", "0", "-1", "1e5", "nan", "a" * 300, "a" * 5000, "\ud800", "a\0b", "é\u202e\x1b[31m", "../../etc/passwd", "/dev/zero", "{}", "[bold]x[/"]
NASTY += ["1k,2k", ",".join(["64"] * 3000), "none", "ring", "all", "u4r2", "cp2", "36k", [], {}, [[]], [{}], [1, 2], ["a"], {"a": 1}, [0] * 3000]
PIECES = [b"\0", b"\xff\xfe", b"[" * 200, b"{" * 200, b"]" * 50, b"9" * 5000, b"0x" + b"f" * 5000, b"1:" * 200 + b"1", b"1:" * 200 + b"1.5", b"-", b"%", b"'"]
PIECES += [
    b'"\\UFFFFFFFF"',
    b'"\\ud800"',
    b"!!python/object/apply:os.system ['true']",
    b"!!int ''",
    b"!!timestamp x",
    b"!!binary '='",
    b"&a [*a]",
    b"<<: {a: 1}",
]
PIECES += [
    b"? [a]",
    b"%YAML 9.9\n---\n",
    b"...\n---\n",
    b"\t",
    b"2024-99-99",
    b".inf",
    b".nan",
    b"~",
    b"#" * 300,
    b"|",
    b">-",
    b'"',
    b",",
    b":",
    b"1e999",
    b"NaN",
]
PIECES += [b"k", b"M", b"_", b".", "\u0664\u0662k".encode(), b"1" * 39 + b"k", b"cp", b"tp2", b"u3", b"sp", b"/", b"ep7", b"dp1025", b"999999", b"cp01"]


@lru_cache
def seeds(kind: str) -> list[bytes]:
    """Valid inputs of a kind."""
    if kind in ("sizes", "layouts"):
        return [text.encode() for text in (SIZES if kind == "sizes" else LAYOUTS)]
    if kind == "scenario":
        return [file.read_bytes() for file in sorted((ROOT / "scenarios").glob("*.yaml"))]
    if kind == "config":
        return [json.dumps(entry).encode() for entry in CONFIGS]
    if kind == "weights":
        return [json.dumps(HEADER).encode(), json.dumps(INDEXED).encode()]
    return [small for file in sorted((ROOT / "results" / "samples").glob("*.json")) for small in _small_results(json.loads(file.read_bytes()))]


def made(kind: str, number: int) -> bytes:
    """One input."""
    chance = random.Random(f"{kind}/{number}")
    data = chance.choice(seeds(kind))
    if kind not in ("sizes", "layouts") and chance.random() < 0.7:
        data = _restructured(kind, data, chance)
    for _ in range(chance.choice([0, 0, 1, 1, 2, 4]) if kind not in ("sizes", "layouts") else chance.randint(1, 3)):
        data = _broken(kind, data, chance)
    return data


def _small_results(whole: dict[str, Any]) -> list[bytes]:
    """A sample with two cells, and as the journal of a run that has not ended."""
    small = whole | {"cells": whole["cells"][:2]}
    head = {key: value for key, value in small.items() if key != "cells"}
    lines = [{"type": "header", "result": head}, *({"type": "cell", "cell": cell} for cell in small["cells"])]
    return [json.dumps(small).encode(), "".join(json.dumps(line) + "\n" for line in lines).encode()]


def _restructured(kind: str, data: bytes, chance: random.Random) -> bytes:
    """Values, names and entries replaced, so that the text stays what it was and what it says does not."""
    if kind == "scenario":
        value = yaml.safe_load(data)
        for _ in range(chance.randint(1, 3)):
            value[chance.choice([*Scenario.model_fields, *value])] = copy.deepcopy(chance.choice([*NASTY, *value.values()]))
        _change(value, chance)
        return yaml.safe_dump(value, sort_keys=False).encode(errors="replace")
    if len(lines := data.splitlines()) > 1:
        place = chance.randrange(len(lines))
        return b"\n".join([*lines[:place], _restructured("", lines[place], chance), *lines[place + 1 :]])
    value = json.loads(data)
    for _ in range(chance.randint(1, 3)):
        _change(value, chance)
    return json.dumps(value).encode()


def _change(value: Any, chance: random.Random) -> None:
    """One entry anywhere in nested lists and dictionaries is replaced, removed, doubled or renamed."""
    while isinstance(value, dict | list) and value:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = chance.choice(keys)
        if isinstance(value[key], dict | list) and value[key] and chance.random() < 0.8:
            value = value[key]
            continue
        action = chance.randrange(6)
        if action == 0:
            del value[key]
        elif action == 1 and isinstance(value, dict):
            value[str(chance.choice(NASTY))[:400]] = value.pop(key)
        elif action == 2 and isinstance(value, list):
            value.append(copy.deepcopy(value[key]))
        else:
            value[key] = copy.deepcopy(chance.choice(NASTY))
        return


def _broken(kind: str, data: bytes, chance: random.Random) -> bytes:
    """Bytes changed, cut out, doubled, put in, or the rest of another input."""
    start = chance.randrange(len(data) + 1)
    end = min(len(data), start + chance.choice([1, 1, 2, 8, 64, 1000]))
    piece = chance.choice(PIECES)
    action = chance.randrange(6)
    if action == 0:
        return data[:start] + bytes([chance.randrange(256)]) + data[start + 1 :]
    if action == 1:
        return data[:start] + data[end:]
    if action == 2:
        return data[:end] + data[start:end] * chance.choice([1, 3, 50]) + data[end:]
    if action == 3:
        other = chance.choice(seeds(kind))
        return data[:start] + other[min(start, len(other)) :]
    return data[:start] + piece + data[start if action == 4 else end :]
