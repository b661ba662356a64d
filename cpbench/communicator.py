"""What must be gathered, scattered or reduced between the blocks of a decoder layer. Models call this and hold no collective.

A block says over which axes its weights are cut. `gather` brings the tokens that such a block must see, `complete` sums its partial
results and returns each rank its own rows; which collectives these are is decided in sharding.py. Vocabulary shards, the last token of a
sequence and the first generated one are here too. Attention across ranks is not here: that is the strategies' part, and hidden states go
from stage to stage in pipeline.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpbench.distributed.mesh import Groups
from cpbench.sharding import Axes, Exchange, TokenRows, exchange


class Communicator:
    """The exchanges of one rank in one step of a pass, of whose tokens every rank has `rows`."""

    def __init__(self, groups: Groups, rows: TokenRows) -> None:
        self._groups, self._rows = groups, rows
        self._tp, self._cp = groups.tp, groups.cp
        self._plans: dict[Axes, Exchange] = {}

    def gather(self, x_nM: Tensor, weights: Axes) -> Tensor:
        """The rows that a block must see whose weights are cut over the axes `weights`: those of other ranks too where an axis cuts both."""
        for step in self._exchange(weights).gathers:
            gathered = x_nM.new_empty(sum(step.rows), x_nM.shape[1])
            self._groups.along(step.axis).all_gather_rows(gathered, x_nM.contiguous(), step.rows).wait()
            x_nM = gathered
        return x_nM

    def complete(self, partial_nM: Tensor, weights: Axes) -> Tensor:
        """Sum the partial results of a block over the axes that cut its weights. Returns this rank's rows; in place where nothing was gathered.

        Ranks that a sum is over have the same rows, so without rows none of them calls.
        """
        plan = self._exchange(weights)
        for step in reversed(plan.gathers):
            group = self._groups.along(step.axis)
            mine = partial_nM.new_empty(step.rows[group.rank], partial_nM.shape[1])
            group.reduce_scatter_rows(mine, partial_nM, step.rows)
            partial_nM = mine
        for axis in plan.sums if len(partial_nM) else ():
            self._groups.along(axis).all_reduce(partial_nM)
        return partial_nM

    def _exchange(self, weights: Axes) -> Exchange:
        if weights not in self._plans:
            self._plans[weights] = exchange(self._groups.layout, self._groups.place, self._rows, weights)
        return self._plans[weights]

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
