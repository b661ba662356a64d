"""The decoder: embedding, pre-norm layers, final norm, logits of the last token of each sequence, and the first token.

Activations are packed [n, M]: this rank's tokens of all sequences. The decoder knows its tensor-parallel shard of the weights and
calls two things for everything that crosses ranks: the communicator between blocks, and the parallel attention inside one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cpbench.communicator import Communicator
from cpbench.models.attention import GroupedQueryAttention
from cpbench.models.config import ModelConfig
from cpbench.models.mlp import DenseMLP
from cpbench.models.norm import rms_norm
from cpbench.models.rope import cos_sin
from cpbench.models.weights import RandomWeights
from cpbench.strategies.base import ParallelAttention


@dataclass(frozen=True)
class Shard:
    """Which tensor-parallel slice of the model this is."""

    rank: int
    size: int


class DecoderLayer:
    """x += attention(norm(x)); x += mlp(norm(x)), with partial sums completed in between."""

    def __init__(self, config: ModelConfig, weights: RandomWeights, index: int, shard: Shard) -> None:
        prefix = f"model.layers.{index}"
        self.index = index
        self.eps = config.norm_eps
        self.attention = GroupedQueryAttention(config, weights, f"{prefix}.self_attn", shard.rank, shard.size)
        self.mlp = DenseMLP(config, weights, f"{prefix}.mlp", shard.rank, shard.size)
        self.input_norm = weights.norm(f"{prefix}.input_layernorm.weight", config.hidden)
        self.mlp_norm = weights.norm(f"{prefix}.post_attention_layernorm.weight", config.hidden)

    def forward(self, x_nM: Tensor, cos: Tensor, sin: Tensor, attention: ParallelAttention, communicator: Communicator) -> Tensor:
        """Adds this layer to `x_nM` in place."""
        x_nM.add_(communicator.complete(self.attention.forward(rms_norm(x_nM, self.input_norm, self.eps), cos, sin, attention, self.index)))
        return x_nM.add_(communicator.complete(self.mlp.forward(rms_norm(x_nM, self.mlp_norm, self.eps))))


@dataclass(frozen=True)
class FirstTokens:
    """Greedy first token of each sequence, and the gap between its logit and the next one."""

    tokens: list[int]
    margins: list[float]
    logits_BV: Tensor  # this rank's vocabulary shard, fp32


class Decoder:
    """`layers` decoder layers with or without their ends (embedding, final norm and head)."""

    def __init__(self, config: ModelConfig, weights: RandomWeights, layers: int, shard: Shard, ends: bool) -> None:
        self.config = config
        self.layers = [DecoderLayer(config, weights, index, shard) for index in range(layers)]
        if ends:
            width = config.vocab // shard.size
            self.vocabulary = range(shard.rank * width, (shard.rank + 1) * width)
            shape = (config.vocab, config.hidden)
            self.embedding = weights.linear("model.embed_tokens.weight", shape, self.vocabulary)
            self.head = self.embedding if config.tied_embeddings else weights.linear("lm_head.weight", shape, self.vocabulary)
            self.final_norm = weights.norm("model.norm.weight", config.hidden)

    def embed(self, ids_n: Tensor, communicator: Communicator) -> Tensor:
        """Hidden states [n, M] of token ids [n]; each tensor-parallel rank looks up its part of the vocabulary."""
        first, size = self.vocabulary.start, len(self.vocabulary)
        if size == self.config.vocab:
            return F.embedding(ids_n, self.embedding)
        local = ids_n - first
        elsewhere = (local < 0) | (local >= size)
        x_nM = F.embedding(local.masked_fill_(elsewhere, 0), self.embedding)
        return communicator.complete(x_nM.masked_fill_(elsewhere[:, None], 0))

    def run_layers(self, x_nM: Tensor, positions_n: Tensor, attention: ParallelAttention, communicator: Communicator) -> Tensor:
        """All layers over the hidden states of this rank's tokens, in place."""
        cos, sin = cos_sin(positions_n, self.config.head_dim, self.config.rope_theta)
        for layer in self.layers:
            x_nM = layer.forward(x_nM, cos, sin, attention, communicator)
        return x_nM

    def first_tokens(self, last_BM: Tensor, communicator: Communicator) -> FirstTokens:
        """Final norm and head on the last token of each sequence only: a server needs no other logits of a prefill."""
        logits_BV = F.linear(rms_norm(last_BM, self.final_norm, self.config.norm_eps), self.head).float()
        tokens, margins = communicator.greedy(logits_BV, self.vocabulary.start)
        return FirstTokens(tokens, margins, logits_BV)

    def parameters(self) -> list[Tensor]:
        """Every weight tensor held, each once."""
        found: dict[int, Tensor] = {}
        for holder in [self, *self.layers, *(part for layer in self.layers for part in (layer.attention, layer.mlp))]:
            for value in vars(holder).values():
                if isinstance(value, torch.Tensor):
                    found[id(value)] = value
        return list(found.values())
