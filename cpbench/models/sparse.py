"""DeepSeek sparse attention (V3.2): latent attention in which every query attends to the few keys that a lightning indexer selects.

What travels and is cached of a token is one row: the latent with its rotated key part, as in latent.py, and behind it the key of the
indexer. Rows are on their way while the indexer's queries are made. Which rows arrive where is decided by the strategy, how keys are
scored in indexer.py, and what is selected in selective_attention.py.

    n tokens   M hidden   R width of the latent   P rotated part   E head size of v   h heads
"""

from __future__ import annotations

from torch import Tensor

from cpbench.communicator import Partial
from cpbench.models.config import ModelConfig
from cpbench.models.indexer import LightningIndexer
from cpbench.models.latent import MultiHeadLatentAttention, absorb_queries, release_outputs
from cpbench.models.linear import linear
from cpbench.models.weights import Weights
from cpbench.selective_attention import IndexQueries, SelectiveAttention
from cpbench.sharding import Shard
from cpbench.strategies.base import ParallelAttention


class SparseLatentAttention(MultiHeadLatentAttention):
    """Weights of one layer's attention on one tensor-parallel rank; the indexer is whole on each."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, shard: Shard) -> None:
        super().__init__(config, weights, prefix, shard, absorbed=True)
        self.indexer = LightningIndexer(config, weights, f"{prefix}.indexer")

    def forward(self, x_nM: Tensor, cos: Tensor, sin: Tensor, attention: ParallelAttention, layer: int) -> Partial:
        """Partial sums of the attention block's output [n, M] for the normed input [n, M]."""
        assert isinstance(attention, SelectiveAttention), "keys of a sparse model are selected"
        width = self.sizes.row_values
        rows_nW = attention.rows(layer, (x_nM.shape[0], width + self.indexer.dim), x_nM)
        self._latent(x_nM, cos, sin, rows_nW[:, :width])
        rows_nW[:, width:] = self.indexer.keys(x_nM, cos, sin)
        collect = attention.collect(rows_nW, layer)
        c_q_nR = self._low_rank(x_nM)
        index = IndexQueries(*self.indexer.queries(c_q_nR, x_nM, cos, sin))
        del x_nM
        collected = collect()
        ids_nK = collected.select(index)
        del index
        q_nhW = absorb_queries(self._heads(c_q_nR, cos, sin), self.kv_b_weight, self.sizes)
        del c_q_nR
        out_nhR = collected.attend(q_nhW, ids_nK)
        del q_nhW, ids_nK
        return Partial(linear(release_outputs(out_nhR, self.kv_b_weight, self.sizes).flatten(1), self.o_weight), self.axes)
