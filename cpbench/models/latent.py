"""Multi-head latent attention (DeepSeek V2, arXiv 2405.04434) around a parallel attention: projections, RoPE, and the payload it moves.

What is cached and what travels is one row per token: the normed latent, and the rotated part of the keys that all heads share. It is the
same on every tensor-parallel rank, which has a slice of the heads. K and V of these heads are made from rows when they are opened
(*expanded*: 640 operations per score pair and head in DeepSeek V3), or never: then the projections that would make them are applied to
queries and outputs instead (*absorbed*: 2176 operations, and nothing to make), and rows are keys and values as they are.

    n tokens   M hidden   R width of the latent   P rotated part   N other part of a key   E head size of v   h heads
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cpbench.communicator import Incoming, Partial
from cpbench.models.config import LatentAttention, ModelConfig
from cpbench.models.linear import Projection, Weight, linear
from cpbench.models.norm import rms_norm
from cpbench.models.rope import rotate_neighbours
from cpbench.models.weights import Weights
from cpbench.sharding import ATTENTION, Shard
from cpbench.strategies.base import OpenRows, ParallelAttention
from cpbench.tracing.spans import PROJECT, RELEASE


class MultiHeadLatentAttention:
    """Weights of one layer's attention on one tensor-parallel rank, and the computation around the parallel attention."""

    axes = ATTENTION

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, shard: Shard, absorbed: bool) -> None:
        assert config.latent is not None, "a model with latent attention"
        self.eps, self.sizes, self.absorbed = config.norm_eps, config.latent, absorbed
        sizes, hidden, heads = self.sizes, config.hidden, config.heads // shard.size
        self.heads = range(shard.rank * heads, (shard.rank + 1) * heads)
        dim_q = sizes.nope_dim + sizes.rope_dim
        q_rows = range(self.heads.start * dim_q, self.heads.stop * dim_q)
        if sizes.q_rank is None:
            self.q_weight = weights.hold(weights.linear(f"{prefix}.q_proj.weight", (config.heads * dim_q, hidden), q_rows))
        else:
            self.q_a_weight = weights.hold(weights.linear(f"{prefix}.q_a_proj.weight", (sizes.q_rank, hidden)))
            self.q_a_norm = weights.norm(f"{prefix}.q_a_layernorm.weight", sizes.q_rank)
            self.q_weight = weights.hold(weights.linear(f"{prefix}.q_b_proj.weight", (config.heads * dim_q, sizes.q_rank), q_rows))
        self.kv_a_weight = weights.hold(weights.linear(f"{prefix}.kv_a_proj_with_mqa.weight", (sizes.row_values, hidden)))
        self.kv_a_norm = weights.norm(f"{prefix}.kv_a_layernorm.weight", sizes.kv_rank)
        self.kv_b_weight = kv_b_weight(config, weights, prefix, shard)
        o_columns = range(self.heads.start * sizes.v_dim, self.heads.stop * sizes.v_dim)
        self.o_weight = weights.hold(weights.linear(f"{prefix}.o_proj.weight", (hidden, config.heads * sizes.v_dim), columns=o_columns), is_summed=True)
        self.open_rows = latent_rows(self.kv_b_weight, sizes, absorbed, weights.plain)

    def forward(self, x: Incoming, cos: Tensor, sin: Tensor, attention: ParallelAttention, layer: int) -> Partial:
        """Partial sums of the attention block's output for its normed input."""
        with PROJECT():
            q_nhD, rows_nW = self._project(x, cos, sin, attention, layer)
        out_nhE = attention.attend(q_nhD, rows_nW, self.open_rows, layer)
        del q_nhD
        if self.absorbed:
            with RELEASE():
                out_nhE = release_outputs(out_nhE, self.kv_b_weight, self.sizes)
        return self._partial(out_nhE)

    def _project(self, x: Incoming, cos: Tensor, sin: Tensor, attention: ParallelAttention, layer: int) -> tuple[Tensor, Tensor]:
        """Queries [n, h, D], absorbed where that is asked for, and the rows that travel [n, R + P]."""
        if self.sizes.q_rank is None:
            q_nhD, latent_nW = x.cut(Projection(self.q_weight), self._latent)
        else:
            c_q_nR, latent_nW = x.whole(self._low_rank, self._latent)
        rows_nW = attention.rows(layer, (latent_nW.shape[0], latent_nW.shape[1]), latent_nW)
        self._place(latent_nW, cos, sin, rows_nW)
        del latent_nW
        if self.sizes.q_rank is not None:
            q_nhD = linear(c_q_nR, self.q_weight)
            del c_q_nR
        q_nhD = self._heads(q_nhD, cos, sin)
        return absorb_queries(q_nhD, self.kv_b_weight, self.sizes) if self.absorbed else q_nhD, rows_nW

    def _partial(self, out_nhE: Tensor) -> Partial:
        return Partial(out_nhE.flatten(1), self.axes, self.o_weight)

    @property
    def _low_rank(self) -> Projection:
        """What queries of all heads are made from, normed: [n, q_rank]."""
        return Projection(self.q_a_weight, then=lambda q_nR: rms_norm(q_nR, self.q_a_norm, self.eps))

    def _heads(self, q_nX: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Projected queries as heads [n, h, N + P], the last P values rotated in place."""
        q_nhD: Tensor = q_nX.unflatten(1, (len(self.heads), -1))
        part = q_nhD[..., self.sizes.nope_dim :]
        rotate_neighbours(part.clone(), cos, sin, part)
        return q_nhD

    @property
    def _latent(self) -> Projection:
        """The normed latent and the key part that is not rotated yet: [n, R + P]."""
        return Projection(self.kv_a_weight, then=self._normed)

    def _normed(self, latent_nW: Tensor) -> Tensor:
        """In place."""
        normed = latent_nW[:, : self.sizes.kv_rank]
        normed.copy_(rms_norm(normed, self.kv_a_norm, self.eps))
        return latent_nW

    def _place(self, latent_nW: Tensor, cos: Tensor, sin: Tensor, rows_nW: Tensor) -> None:
        """Write the rows [n, R + P] that are cached and travel: with the key part rotated."""
        rank = self.sizes.kv_rank
        rows_nW[:, :rank].copy_(latent_nW[:, :rank])
        rotate_neighbours(latent_nW[:, None, rank:], cos, sin, rows_nW[:, None, rank:])


def kv_b_weight(config: ModelConfig, weights: Weights, prefix: str, shard: Shard) -> Tensor:
    """What makes K and V of one rank's heads from latents: [h, N + E, R]."""
    assert config.latent is not None, "a model with latent attention"
    sizes, heads = config.latent, config.heads // shard.size
    out = sizes.nope_dim + sizes.v_dim
    rows = range(shard.rank * heads * out, (shard.rank + 1) * heads * out)
    weight_hOR: Tensor = weights.linear(f"{prefix}.kv_b_proj.weight", (config.heads * out, sizes.kv_rank), rows).unflatten(0, (heads, out))
    return weight_hOR


def latent_rows(weight_hOR: Tensor, sizes: LatentAttention, absorbed: bool, hold: Callable[[Tensor], Weight]) -> OpenRows:
    """Opens rows [S, R + P]: expanded into K [S, h, N + P] and V [S, h, E] of the heads asked for; absorbed as views [S, 1, R + P] and [S, 1, R]."""

    def absorbed_rows(rows_SW: Tensor, heads: range | None = None, /) -> tuple[Tensor, Tensor]:
        return rows_SW[:, None, : sizes.row_values], rows_SW[:, None, : sizes.kv_rank]  # an indexer's key may lie behind them

    def expanded_rows(rows_SW: Tensor, heads: range | None = None, /) -> tuple[Tensor, Tensor]:
        weight = weight_hOR if heads is None else weight_hOR[heads.start : heads.stop]
        kv_ShO = linear(rows_SW[:, : sizes.kv_rank], hold(weight.flatten(0, 1))).unflatten(1, weight.shape[:2])
        rotated = rows_SW[:, None, sizes.kv_rank : sizes.row_values].expand(-1, weight.shape[0], -1)
        return torch.cat([kv_ShO[..., : sizes.nope_dim], rotated], 2), kv_ShO[..., sizes.nope_dim :]

    return absorbed_rows if absorbed else expanded_rows


def absorb_queries(q_nhD: Tensor, weight_hOR: Tensor, sizes: LatentAttention) -> Tensor:
    """Queries against latents: [n, h, R + P]."""
    latent_hnR = torch.bmm(q_nhD[..., : sizes.nope_dim].transpose(0, 1), weight_hOR[:, : sizes.nope_dim])
    return torch.cat([latent_hnR.transpose(0, 1), q_nhD[..., sizes.nope_dim :]], 2)


def release_outputs(out_nhR: Tensor, weight_hOR: Tensor, sizes: LatentAttention) -> Tensor:
    """Outputs in the latent's width, [n, h, R], as values [n, h, E]."""
    return torch.bmm(out_nhR.transpose(0, 1), weight_hOR[:, sizes.nope_dim :].transpose(1, 2)).transpose(0, 1)
