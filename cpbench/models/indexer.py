"""The lightning indexer of DeepSeek V3.2: the small queries, keys and gates whose scores choose what a token attends to.

Its weights are replicated over tensor-parallel ranks, so that every rank of a token selects alike. One key head serves all query heads.
The first values of each head are rotated in half-split pairs, unlike those of the attention around it, with the same frequencies. How
scores become a selection is decided in kernels/selection.py. The Hadamard transform with which released code spreads outliers before it
quantises queries and keys to FP8 keeps dot products as they are; here they are scored as they are, so it is left out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cpbench.models.config import ModelConfig
from cpbench.models.linear import Projection
from cpbench.models.rope import rotate
from cpbench.models.weights import Weights

NORM_EPS = 1e-6  # of the keys' LayerNorm, whatever the model's own is


class LightningIndexer:
    """Weights of one layer's indexer. `prefix` is its own name, such as model.layers.0.self_attn.indexer."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str) -> None:
        latent, sizes = config.latent, config.indexer
        if latent is None or sizes is None or latent.q_rank is None:
            raise ValueError(f"{config.name} has no indexer, or no low-rank queries that it could read")
        self.heads, self.dim, self.rotated, self.top_k = sizes.heads, sizes.dim, latent.rope_dim, sizes.top_k
        self.q_weight = weights.linear(f"{prefix}.wq_b.weight", (self.heads * self.dim, latent.q_rank))
        self.k_weight = weights.linear(f"{prefix}.wk.weight", (self.dim, config.hidden))
        self.k_norm = weights.norm(f"{prefix}.k_norm.weight", self.dim)
        self.k_bias = weights.bias(f"{prefix}.k_norm.bias", self.dim)
        self.gate_weight = weights.linear(f"{prefix}.weights_proj.weight", (self.heads, config.hidden))

    @property
    def projections(self) -> tuple[Projection, Projection]:
        """Of the normed input: keys [n, D] that are not normed yet, and gates [n, H] that are not scaled."""
        return Projection(self.k_weight), Projection(self.gate_weight)

    def queries(self, c_q_nR: Tensor, gates_nH: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated queries [n, H, D] of the normed low-rank queries, and gates [n, H] of the heads in fp32 (fp64 for fp64).

        cos and sin [n, 1, rope_dim / 2] are those of the queries' positions.
        """
        q_nHD = self._rotated(F.linear(c_q_nR, self.q_weight).unflatten(1, (self.heads, self.dim)), cos, sin)
        return q_nHD, _wide(gates_nH).mul(self.heads**-0.5)

    def keys(self, k_nD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Normed and rotated keys [n, D]: what is cached of each token, and what travels to other ranks."""
        dtype, k_nD = k_nD.dtype, _wide(k_nD)
        k_nD = F.layer_norm(k_nD, (self.dim,), _wide(self.k_norm), _wide(self.k_bias), NORM_EPS).to(dtype)
        return self._rotated(k_nD.unsqueeze(1), cos, sin).squeeze(1)

    def _rotated(self, x_nHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotates the first values of each head in place."""
        head = x_nHD[..., : self.rotated]
        rotate(head.clone(), cos, sin, head)
        return x_nHD


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
