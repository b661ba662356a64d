"""What shape a decoder has: the numbers of a Hugging Face config.json that cpbench needs, checked and named.

Pure data: no torch. The layers that these numbers describe are in the other modules of this package; hugging_face.py reads config.json.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from cpbench.errors import CpbenchError

MAX_SIZE = 1 << 31  # of any number of a config; real ones are far below
MAX_COUNT = 1 << 16  # of what is gone through one by one: layers, heads, experts


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
class LlamaRope:
    """Rotary frequencies stretched as Llama 3.1 does: waves longer than `original` / `low` by the factor, shorter than `original` / `high` not."""

    factor: float
    original: int  # positions that the model was trained on
    low: float = 1.0
    high: float = 4.0


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
    llama_rope: LlamaRope | None = None

    def __post_init__(self) -> None:
        for field in ("hidden", "layers", "heads", "kv_heads", "head_dim", "intermediate", "vocab"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise CpbenchError(f"Model {self.name!r} has {field} = {repr(value)[:60]}.", f"{field} must be a whole number of at least 1.")
            most = MAX_COUNT if field in ("layers", "heads", "kv_heads") else MAX_SIZE
            if value > most:
                raise CpbenchError(f"Model {self.name!r} has {field} above {most:,}.", f"The nearest valid value is {most}.")
        if not (math.isfinite(self.rope_theta) and self.rope_theta > 0 and math.isfinite(self.norm_eps) and self.norm_eps >= 0):
            raise CpbenchError(f"Model {self.name!r} has rope_theta {self.rope_theta} and norm_eps {self.norm_eps}.", "Qwen3 has 1e6 and 1e-6.")
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
        parts = {"latent": LatentAttention, "experts": Experts, "indexer": Indexer, "yarn": Yarn, "llama_rope": LlamaRope}
        return cls(**{name: parts[name](**value) if name in parts and value is not None else value for name, value in data.items()})

    @property
    def rotary_dim(self) -> int:
        """Values of a query or key head that are rotated."""
        return self.head_dim if self.latent is None else self.latent.rope_dim

    def kinds(self, layers: range) -> dict[int, int]:
        """One of these layers for each kind, dense and sparse, and how many of them are of its kind."""
        dense = len(layers) if self.experts is None else min(max(self.experts.first - layers.start, 0), len(layers))
        return {layer: count for layer, count in ((layers.start, dense), (layers.stop - 1, len(layers) - dense)) if count}

    def is_sparse(self, layer: int) -> bool:
        """Whether the feed-forward block of a layer is a mixture of experts."""
        return self.experts is not None and layer >= self.experts.first

    def with_experts(self, count: int) -> ModelConfig:
        """The same model with fewer or more experts, all else as it is; its name says so. Raises CpbenchError where they cannot be so many."""
        experts = self.experts
        if experts is None:
            raise CpbenchError(f"{self.name} has no experts.", "Leave experts out, or choose another model (cpbench list models).")
        chosen_from = -(-experts.top_k // experts.top_groups)  # of a group, at least
        least = experts.groups * max(chosen_from, 2 if experts.correction else 1)
        if count < least or count % experts.groups:
            near = max(least, round(count / experts.groups) * experts.groups)
            what = f"{experts.top_k} of {count} experts in {experts.groups} groups, of which {experts.top_groups} count, cannot be chosen"
            raise CpbenchError(f"{self.name}: {what}.", f"The nearest valid value is experts={near}.")
        return replace(self, name=f"{self.name}-e{count}", experts=replace(experts, count=count))

    def reduced(self) -> ModelConfig:
        """The same heads and rules with a narrow width and two layers at most: what numerics are checked on where the model is wide."""
        smaller = replace(self, hidden=min(self.hidden, 256), layers=min(self.layers, 2), intermediate=min(self.intermediate, 512), vocab=min(self.vocab, 8192))
        if self.indexer is not None:  # so few that short sequences have keys to leave out
            smaller = replace(smaller, indexer=replace(self.indexer, top_k=min(self.indexer.top_k, 48)))
        if self.experts is None:
            return smaller
        width = self.experts.intermediate
        while width >= 256 and width % 32 == 0:
            width //= 2
        return replace(smaller, experts=replace(self.experts, intermediate=width, first=min(self.experts.first, 1)))
