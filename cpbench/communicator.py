"""What must be gathered, scattered or reduced between the blocks of a decoder layer. Models call this and hold no collective.

Tensor parallelism: a row-parallel linear leaves partial sums, and the communicator completes them. Context parallelism: the last token
of a sequence lives on one rank, and the communicator brings its hidden state to all. Attention across ranks is not here: that is the
strategies' part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpbench.distributed.mesh import Groups


class Communicator:
    """The exchanges of one rank under one layout."""

    def __init__(self, groups: Groups) -> None:
        self._tp = groups.tp
        self._cp = groups.cp

    def complete(self, partial_nM: Tensor) -> Tensor:
        """Sum the partial sums of the tensor-parallel ranks, in place."""
        self._tp.all_reduce(partial_nM)
        return partial_nM

    def share_last(self, last_BM: Tensor, token_sharded: bool) -> Tensor:
        """The hidden state of each sequence's last token [batch, M] on every rank, from rows that are zero except on the one that holds it.

        Where every context-parallel rank computes every token, all have it.
        """
        if token_sharded:
            self._cp.all_reduce(last_BM)  # every other rank adds zeros, which is exact
        return last_BM

    def greedy(self, logits_BV: Tensor, first: int) -> tuple[list[int], list[float]]:
        """Arg-max over the vocabulary shards, and the gap to the runner-up, both from fp32 logits. The lowest index wins a tie.

        `logits_BV` is this rank's shard, `first` the vocabulary index of its first column.
        """
        batch = logits_BV.shape[0]
        logits = logits_BV.float()
        best, index = logits.max(1)
        rest = logits.scatter(1, index[:, None], float("-inf")).max(1)
        mine = torch.stack([best.double(), index.double() + first, rest[0].double(), rest[1].double() + first], 1)
        everyone = mine.new_empty(self._tp.size * batch, 4)
        self._tp.all_gather(everyone, mine.contiguous()).wait()
        tokens, margins = [], []
        for shards in everyone.view(self._tp.size, batch, 4).transpose(0, 1).tolist():
            candidates = sorted(((-value, column) for row in shards for value, column in (row[:2], row[2:])))
            tokens.append(int(candidates[0][1]))
            margins.append(candidates[1][0] - candidates[0][0])
        return tokens, margins
