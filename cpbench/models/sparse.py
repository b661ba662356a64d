"""DeepSeek sparse attention (V3.2): latent attention in which every query attends to the few keys that a lightning indexer selects.

What travels and is cached of a token is one row: the latent with its rotated key part, as in latent.py, and behind it the key of the
indexer. Rows are on their way while the indexer's queries are made. Which rows arrive where is decided by the strategy, how keys are
scored in indexer.py, and what is selected in selective_attention.py.

    n tokens   M hidden   R width of the latent   P rotated part   E head size of v   h heads
"""

from __future__ import annotations

from torch import Tensor

from cpbench.communicator import Incoming, Partial
from cpbench.models.config import ModelConfig
from cpbench.models.indexer import LightningIndexer
from cpbench.models.latent import MultiHeadLatentAttention, absorb_queries, release_outputs
from cpbench.models.linear import linear
from cpbench.models.weights import Weights
from cpbench.selective_attention import IndexQueries, SelectiveAttention
from cpbench.sharding import Shard
from cpbench.strategies.base import ParallelAttention
from cpbench.tracing.spans import PROJECT, RELEASE


class SparseLatentAttention(MultiHeadLatentAttention):
    """Weights of one layer's attention on one tensor-parallel rank; the indexer is whole on each."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, shard: Shard) -> None:
        super().__init__(config, weights, prefix, shard, absorbed=True)
        self.indexer = LightningIndexer(config, weights, f"{prefix}.indexer")

    def forward(self, x: Incoming, cos: Tensor, sin: Tensor, attention: ParallelAttention, layer: int) -> Partial:
        """Partial sums of the attention block's output for its normed input."""
        assert isinstance(attention, SelectiveAttention), "keys of a sparse model are selected"
        with PROJECT():
            c_q_nR, latent_nW, k_nD, gates_nH = x.whole(self._low_rank, self._latent, *self.indexer.projections)
            width = self.sizes.row_values
            rows_nW = attention.rows(layer, (latent_nW.shape[0], width + self.indexer.dim), latent_nW)
            self._place(latent_nW, cos, sin, rows_nW[:, :width])
            rows_nW[:, width:] = self.indexer.keys(k_nD, cos, sin)
            del latent_nW, k_nD
        collect = attention.collect(rows_nW, layer)
        with PROJECT():
            index = IndexQueries(*self.indexer.queries(c_q_nR, gates_nH, cos, sin))
            del gates_nH
        collected = collect()
        ids_nK = collected.select(index)
        del index
        with PROJECT():
            q_nhW = absorb_queries(self._heads(linear(c_q_nR, self.q_weight), cos, sin), self.kv_b_weight, self.sizes)
            del c_q_nR
        out_nhR = collected.attend(q_nhW, ids_nK)
        del q_nhW, ids_nK
        with RELEASE():
            return self._partial(release_outputs(out_nhR, self.kv_b_weight, self.sizes))
