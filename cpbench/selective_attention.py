"""Attention to a few keys of each query, chosen among all that it sees (DeepSeek sparse attention), across context-parallel ranks.

A strategy brings the rows; here they are put into the order of positions, each query selects among those it sees, and attends to what it
selected. What is planned is in visible.py, the arithmetic in kernels/, what rows, queries and scores are made of in models/.

    n query rows   S key rows   H heads of the indexer   D head size of it   h heads of the attention   W, R width of a row and of its value
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cpbench.choices import ChoiceLog, Note
from cpbench.kernels.selection import select
from cpbench.kernels.sparse_latent import attend_selected
from cpbench.strategies.base import ParallelAttention, in_position_order
from cpbench.tracing.spans import KERNEL, SELECT
from cpbench.visible import InOrder, Visible


@dataclass(frozen=True)
class IndexQueries:
    """What a query selects keys by: small queries [n, H, D], and gates [n, H] of their heads."""

    q_nHD: Tensor
    gates_nH: Tensor


@dataclass(frozen=True)
class SelectiveAttention(ParallelAttention):
    """A strategy that brings all rows, with its plan and context. `tokens_n`: the place in the batch of each query row."""

    order: InOrder
    tokens_n: Tensor
    log: ChoiceLog

    def collect(self, rows_nW: Tensor, layer: int) -> Callable[[], Collected]:
        """Start to bring all rows that the rank's queries see, and return what waits for them."""
        arrived = self.strategy.collect(self._with_cached(rows_nW, layer), self.plan, self.context, layer)

        def collected() -> Collected:
            return Collected(in_position_order(arrived(), self.order, self.context.buffers, "select_ordered"), self, layer)

        return collected


@dataclass(frozen=True)
class Collected:
    """All rows that a rank's queries see, in the order of sequences and positions: [S, values of a row]. Valid until the next layer collects."""

    rows_SW: Tensor
    attention: SelectiveAttention
    layer: int

    def select(self, index: IndexQueries) -> Tensor:
        """The selected rows [n, K] of every query, by the index keys at the end of each row."""
        shape, visible, log = self.attention.context.shape, self.attention.order.visible, self.attention.log
        keys_SD = self.rows_SW[:, shape.qk_dim :]
        with SELECT():
            ids_nK = select(index.q_nHD, index.gates_nH, keys_SD, visible, shape.top_k, self.attention.context.buffers)
        if not log.watching and log.forced_LNK is None:
            return ids_nK
        first_n1 = _firsts(visible, ids_nK)
        used_nK = ids_nK if log.forced_LNK is None else _moved(log.forced_LNK[self.layer, self.attention.tokens_n].to(ids_nK), first_n1)
        if log.watching:
            scores_nE = dense_scores(index, keys_SD, visible) if log.detailed else None
            own, used = (_moved(ids, -first_n1) for ids in (ids_nK, used_nK))
            log.notes.append(Note(self.layer, [], self.attention.tokens_n, used, own, scores_nE))
        return used_nK

    def attend(self, q_nhW: Tensor, ids_nK: Tensor) -> Tensor:
        """Attention of absorbed queries to their selected rows: out [n, h, R] in q's dtype."""
        context, width = self.attention.context, q_nhW.shape[2]
        blocks = self.attention.order.visible
        with KERNEL():
            return attend_selected(q_nhW, self.rows_SW[:, :width], ids_nK, blocks, context.scale, context.shape.v_dim, context.buffers)[0]

    def answer(self, index: IndexQueries, q_nhW: Tensor) -> Tensor:
        """Select and attend: out [n, h, R]."""
        return self.attend(q_nhW, self.select(index))


def dense_scores(index: IndexQueries, keys_SD: Tensor, blocks: tuple[Visible, ...]) -> Tensor:
    """Scores [n, longest sequence] of every query for every key of its sequence, -inf for those that it does not see. For short inputs."""
    wide = index.gates_nH.dtype
    scores_nS = torch.full((len(index.q_nHD), max((block.keys.rows for block in blocks), default=0)), -torch.inf, dtype=wide, device=keys_SD.device)
    for block in blocks:
        rows, keys = slice(*block.queries), keys_SD[slice(*block.keys)].to(wide)
        products_nHS = torch.einsum("nhd,sd->nhs", index.q_nHD[rows].to(wide), keys).clamp_min_(0)
        scores = torch.einsum("nh,nhs->ns", index.gates_nH[rows], products_nHS)
        seen_n1 = (torch.arange(block.queries.rows, device=scores.device) * block.step + block.first).unsqueeze(1)
        scores_nS[rows, : block.keys.rows] = scores.masked_fill(torch.arange(block.keys.rows, device=scores.device) >= seen_n1, -torch.inf)
    return scores_nS


def _firsts(blocks: tuple[Visible, ...], like_nK: Tensor) -> Tensor:
    """The first key row [n, 1] of each query's sequence."""
    first_n1 = torch.zeros_like(like_nK[:, :1])
    for block in blocks:
        first_n1[slice(*block.queries)] = block.keys.start
    return first_n1


def _moved(ids_nK: Tensor, by_n1: Tensor) -> Tensor:
    """Ids with an offset; unused slots stay -1."""
    return torch.where(ids_nK < 0, ids_nK, ids_nK + by_n1)
