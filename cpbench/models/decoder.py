"""The decoder: embedding, pre-norm layers, final norm, logits of the last token of each sequence, and the first token.

Activations are packed [n, M]: this rank's tokens of all sequences. A decoder is what one rank has of the model: its pipeline stage's
layers, cut as its place in the layout says. It calls two things for everything that crosses ranks: the communicator around blocks, and
the parallel attention inside one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cpbench.cell import Cell
from cpbench.communicator import Communicator, Partial
from cpbench.models.attention import GroupedQueryAttention
from cpbench.models.config import ModelConfig
from cpbench.models.indexer import LightningIndexer
from cpbench.models.invariant import InvariantWeight
from cpbench.models.latent import MultiHeadLatentAttention
from cpbench.models.linear import QuantisedWeight, linear
from cpbench.models.mlp import DenseMLP
from cpbench.models.moe import SparseMLP
from cpbench.models.norm import rms_norm
from cpbench.models.rope import cos_sin
from cpbench.models.router import Router
from cpbench.models.sparse import SparseLatentAttention
from cpbench.models.weights import Weights
from cpbench.sharding import VOCABULARY, Shard, shard_of
from cpbench.strategies.base import ParallelAttention
from cpbench.tracing.spans import ATTENTION, LAYER, MLP, OUTPUT

EMBEDDING = "model.embed_tokens.weight"
# what a layer shows to who watches it, in the order in which it runs: rows [n, M] that a rank holds between blocks
SHOWN = ("input norm", "attention", "residual after attention", "feed-forward norm", "feed-forward", "residual")
Watch = Callable[[str, Tensor], None]  # a module by name, and its output, which is only to be looked at


def shown(watch: Watch | None, x_nM: Tensor, module: str, layer: int | None = None) -> Tensor:
    """The output of a module, which who watches has seen."""
    if watch is not None:
        watch(module if layer is None else f"layer {layer}, {module}", x_nM)
    return x_nM


@dataclass(frozen=True)
class Slice:
    """What one rank has of a model: layers, the embedding in front or the head behind them, and its parts of their weights.

    `absorbed`: latent attention works in the latent's width (latent.py).
    """

    layers: Sequence[int]
    embedding: bool
    head: bool
    attention: Shard
    mlp: Shard
    vocabulary: Shard
    experts: Shard
    columns: Shard  # of each expert
    absorbed: bool = False

    @classmethod
    def of(cls, cell: Cell, rank: int) -> Slice:
        """The slice of a global rank of a cell."""
        layout, place = cell.layout, cell.layout.coordinates(rank)
        ends = cell.target == "prefill"
        attention, mlp, vocabulary = (shard_of(layout, place, axes) for axes in (GroupedQueryAttention.axes, DenseMLP.axes, VOCABULARY))
        embedding, head = ends and place.pp == 0, ends and place.pp == layout.pp - 1
        experts, columns = (shard_of(layout, place, (axis,)) if cell.config.experts else Shard(0, 1) for axis in ("ep", "moe_tp"))
        return cls(cell.stage_layers(place.pp), embedding, head, attention, mlp, vocabulary, experts, columns, cell.absorbed)


def _attention(config: ModelConfig, weights: Weights, prefix: str, part: Slice) -> GroupedQueryAttention | MultiHeadLatentAttention:
    if config.latent is None:
        return GroupedQueryAttention(config, weights, prefix, part.attention)
    if config.indexer is not None:
        return SparseLatentAttention(config, weights, prefix, part.attention)
    return MultiHeadLatentAttention(config, weights, prefix, part.attention, part.absorbed)


def _feed_forward(config: ModelConfig, weights: Weights, prefix: str, layer: int, part: Slice) -> DenseMLP | SparseMLP:
    if not config.is_sparse(layer):
        return DenseMLP(config, weights, prefix, part.mlp)
    return SparseMLP(config, weights, prefix, layer, part.experts, part.columns, part.mlp)


class DecoderLayer:
    """x += attention(norm(x)); x += mlp(norm(x)), with tokens gathered and partial sums completed in between."""

    def __init__(self, config: ModelConfig, weights: Weights, index: int, part: Slice) -> None:
        prefix = f"model.layers.{index}"
        self.index = index
        self.eps = config.norm_eps
        self.attention = _attention(config, weights, f"{prefix}.self_attn", part)
        self.mlp = _feed_forward(config, weights, f"{prefix}.mlp", index, part)
        self.input_norm = weights.norm(f"{prefix}.input_layernorm.weight", config.hidden)
        self.mlp_norm = weights.norm(f"{prefix}.post_attention_layernorm.weight", config.hidden)

    def forward(
        self, x_nM: Tensor, cos: Tensor, sin: Tensor, attention: ParallelAttention | None, communicator: Communicator, watch: Watch | None = None
    ) -> Tensor:
        """Adds this layer to `x_nM` in place. Without attention (and rows) the rank only helps with the tokens of others."""
        index = self.index
        with LAYER(index):
            if attention is not None:
                with ATTENTION():
                    self._attend(x_nM, cos, sin, attention, communicator, watch)
            with MLP():
                out_nM = self.mlp.forward(lambda: shown(watch, rms_norm(x_nM, self.mlp_norm, self.eps), "feed-forward norm", index), communicator)
                return shown(watch, x_nM.add_(shown(watch, out_nM, "feed-forward", index)), "residual", index)

    def _attend(self, x_nM: Tensor, cos: Tensor, sin: Tensor, attention: ParallelAttention, communicator: Communicator, watch: Watch | None) -> None:
        """x += attention(norm(x))."""
        block, index = self.attention, self.index
        normed = communicator.incoming(shown(watch, rms_norm(x_nM, self.input_norm, self.eps), "input norm", index), block.axes)
        partial = block.forward(normed, cos, sin, attention, index)
        with OUTPUT():
            x_nM.add_(shown(watch, communicator.complete(partial), "attention", index))
        shown(watch, x_nM, "residual after attention", index)


@dataclass(frozen=True)
class FirstTokens:
    """Greedy first token of each sequence, and the gap between its logit and the next one."""

    tokens: list[int]
    margins: list[float]
    logits_BV: Tensor  # this rank's vocabulary shard, fp32


class Decoder:
    """One rank's slice of a model."""

    def __init__(self, config: ModelConfig, weights: Weights, part: Slice) -> None:
        self.config = config
        self.layers = [DecoderLayer(config, weights, index, part) for index in part.layers]
        width, tables = config.vocab // part.vocabulary.size, dict[str, Tensor]()
        self.vocabulary = range(part.vocabulary.rank * width, (part.vocabulary.rank + 1) * width)

        def table(name: str) -> Tensor:
            if name not in tables:
                tables[name] = weights.linear(name, (config.vocab, config.hidden), self.vocabulary)
            return tables[name]

        if part.embedding:
            self.embedding = table(EMBEDDING)
        if part.head:
            self.head = weights.plain(table(EMBEDDING if config.tied_embeddings else "lm_head.weight"))
            self.final_norm = weights.norm("model.norm.weight", config.hidden)

    def embed(self, ids_n: Tensor, communicator: Communicator) -> Tensor:
        """Hidden states of the rows held here, of token ids [n]; each tensor-parallel rank looks up its part of the vocabulary."""
        first, size = self.vocabulary.start, len(self.vocabulary)
        if size == self.config.vocab:
            return F.embedding(ids_n, self.embedding)
        local = ids_n - first
        elsewhere = (local < 0) | (local >= size)
        x_nM = F.embedding(local.masked_fill_(elsewhere, 0), self.embedding)
        return communicator.complete(Partial(x_nM.masked_fill_(elsewhere[:, None], 0), VOCABULARY))

    def run_layers(
        self, x_nM: Tensor, positions_n: Tensor, attention: ParallelAttention | None, communicator: Communicator, watch: Watch | None = None
    ) -> Tensor:
        """This stage's layers over the hidden states of this rank's tokens, in place. `watch` is called with what SHOWN names, of each layer."""
        cos, sin = cos_sin(positions_n, self.config.rotary_dim, self.config.rope_theta, self.config.yarn, self.config.llama_rope)
        for layer in self.layers:
            x_nM = layer.forward(x_nM, cos, sin, attention, communicator, watch)
        return x_nM

    def final_normed(self, x_nM: Tensor) -> Tensor:
        """The input [n, M] of the head."""
        return rms_norm(x_nM, self.final_norm, self.config.norm_eps)

    def logits(self, normed_nM: Tensor) -> Tensor:
        """This rank's vocabulary shard [n, V / tp] of the logits of normed rows, in the model's dtype."""
        return linear(normed_nM, self.head)

    def first_tokens(self, last_BM: Tensor, communicator: Communicator) -> FirstTokens:
        """Final norm and head on the last token of each sequence only: a server needs no other logits of a prefill."""
        logits_BV = self.logits(self.final_normed(last_BM)).float()
        tokens, margins = communicator.greedy(logits_BV, self.vocabulary.start)
        return FirstTokens(tokens, margins, logits_BV)

    def parameters(self) -> list[Tensor]:
        """Every weight tensor held, each once."""
        return parameters_of(self)


PARTS = (list, QuantisedWeight, InvariantWeight, DecoderLayer, GroupedQueryAttention, MultiHeadLatentAttention, LightningIndexer, DenseMLP, SparseMLP, Router)


def parameters_of(part: object) -> list[Tensor]:
    """Every weight tensor of a decoder or a part of one, each once."""
    return list({id(tensor): tensor for tensor in _tensors(part)}.values())


def _tensors(part: object) -> Iterator[Tensor]:
    """The tensors of a part of a model, and of the parts that it has."""
    for value in part if isinstance(part, list) else vars(part).values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, PARTS):
            yield from _tensors(value)
