"""Grouped-query attention of Llama, Qwen2 and Qwen3 around a parallel attention: projections, qk-norm, RoPE, and the payload it moves.

Under tensor parallelism a rank has a slice of the query heads and the kv heads that those need (one at least, then replicated). The
output is a partial sum, which the communicator completes. How K and V reach other ranks is the strategy's business.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cpbench.communicator import Incoming, Partial
from cpbench.models.config import ModelConfig
from cpbench.models.linear import Projection
from cpbench.models.norm import rms_norm
from cpbench.models.rope import rotate
from cpbench.models.weights import Weights
from cpbench.sharding import ATTENTION, Shard
from cpbench.strategies.base import ParallelAttention, keys_and_values
from cpbench.tracing.spans import PROJECT


@dataclass(frozen=True)
class HeadSlice:
    """The query and kv heads of one tensor-parallel rank."""

    q: range
    kv: range

    @classmethod
    def of(cls, config: ModelConfig, shard: Shard) -> HeadSlice:
        heads, kv_heads = config.heads // shard.size, max(1, config.kv_heads // shard.size)
        first_kv = shard.rank * config.kv_heads // shard.size
        return cls(range(shard.rank * heads, (shard.rank + 1) * heads), range(first_kv, first_kv + kv_heads))


def _rows(heads: range, dim: int) -> range:
    return range(heads.start * dim, heads.stop * dim)


class GroupedQueryAttention:
    """Weights of one layer's attention on one tensor-parallel rank, and the computation around the parallel attention."""

    axes = ATTENTION

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, shard: Shard) -> None:
        self.config = config
        heads = HeadSlice.of(config, shard)
        dim, hidden = config.head_dim, config.hidden
        self.heads, self.kv_heads = len(heads.q), len(heads.kv)
        self.open_rows = keys_and_values(dim)
        parts = [("q_proj", config.heads, heads.q), ("k_proj", config.kv_heads, heads.kv), ("v_proj", config.kv_heads, heads.kv)]
        qkv = [weights.linear(f"{prefix}.{name}.weight", (n * dim, hidden), _rows(part, dim)) for name, n, part in parts]
        self.qkv_weight = weights.hold(torch.cat(qkv))
        self.qkv_bias = None
        if config.qkv_bias:
            self.qkv_bias = torch.cat([weights.bias(f"{prefix}.{name}.bias", n * dim, _rows(part, dim)) for name, n, part in parts])
        self.o_weight = weights.hold(weights.linear(f"{prefix}.o_proj.weight", (hidden, config.heads * dim), columns=_rows(heads.q, dim)), is_summed=True)
        self.q_norm = weights.norm(f"{prefix}.q_norm.weight", dim) if config.qk_norm else None
        self.k_norm = weights.norm(f"{prefix}.k_norm.weight", dim) if config.qk_norm else None

    def forward(self, x: Incoming, cos: Tensor, sin: Tensor, attention: ParallelAttention, layer: int) -> Partial:
        """Partial sums of the attention block's output for its normed input."""
        with PROJECT():
            q_nHD, rows_nW = self._project(x, cos, sin, attention, layer)
        out_nHD = attention.attend(q_nHD, rows_nW, self.open_rows, layer)
        del q_nHD
        return Partial(out_nHD.flatten(1), self.axes, self.o_weight)

    def _project(self, x: Incoming, cos: Tensor, sin: Tensor, attention: ParallelAttention, layer: int) -> tuple[Tensor, Tensor]:
        """Rotated queries [n, H, D], and rotated K next to V in the rows that travel [n, 2 * G * D]."""
        (qkv,) = x.cut(Projection(self.qkv_weight, self.qkv_bias))
        dim, n = self.config.head_dim, qkv.shape[0]
        q, k, v = qkv.unflatten(1, (-1, dim)).split([self.heads, self.kv_heads, self.kv_heads], 1)
        rows_nW = attention.rows(layer, (n, 2 * self.kv_heads * dim), qkv)
        k_out, v_out = self.open_rows(rows_nW)
        v_out.copy_(v)
        rotate(k if self.k_norm is None else rms_norm(k, self.k_norm, self.config.norm_eps), cos, sin, k_out)
        q_nHD = qkv.new_empty(n, self.heads, dim)
        rotate(q if self.q_norm is None else rms_norm(q, self.q_norm, self.config.norm_eps), cos, sin, q_nHD)
        return q_nHD, rows_nW
