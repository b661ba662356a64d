"""Which keys a query of DeepSeek sparse attention attends to: scores of the lightning indexer and the best of them, on one device.

Scores are made for a tile of queries at a time and forgotten once its best keys are known, so memory grows with the number of keys and
not with its square. Whoever shares the work, the answer is the same: every product has the shape of a whole tile, whatever is left of
the queries or keys, since libraries choose the order of a sum by the shape of the product; and equal scores go to the lowest position.
This module decides what is selected, not among which keys (visible.py), what becomes of it (sparse_latent.py), nor how q and k are made.

    n query rows   S key rows   H heads of the indexer   D head size   K selected keys   t queries and s keys of a tile
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cpbench.buffers import Buffers
from cpbench.device_kind import kind_of
from cpbench.visible import TILES, Tile, Visible, require_visible

NARROW = (torch.float16, torch.bfloat16)


def select(
    q_nHD: Tensor,
    gates_nH: Tensor,
    keys_SD: Tensor,
    blocks: Sequence[Visible],
    top_k: int,
    buffers: Buffers | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """The key rows [n, top_k] (int32, ascending, -1 in unused slots) that score highest for each query among those it sees.

    Of query i and key j the score is sum_h gates[i, h] * relu(q[i, h] . k[j]) (DeepSeek V3.2); positive factors that all scores of a query
    share, such as D^-0.5, select nothing and are left out. A query that sees at most `top_k` keys gets all of them unscored. Rows that no
    block covers get none. fp16 and bf16 are scored in fp32. Raises ValueError for a block that sees more keys than it has.
    """
    require_visible(blocks)
    ids_nK = torch.full((q_nHD.shape[0], top_k), -1, dtype=torch.int32, device=q_nHD.device)
    scores = _Scores(tile or TILES[kind_of(q_nHD)], q_nHD, blocks, buffers or Buffers())
    for block in blocks:
        row, scored = block.queries.start, block.rows_seeing(top_k)
        if scored:
            ids_nK[row : row + scored] = _all_seen(block, scored, top_k, q_nHD.device)
        for first in range(scored, block.queries.rows, scores.tile.queries):
            last = min(first + scores.tile.queries, block.queries.rows)
            rows = slice(row + first, row + last)
            ids_nK[rows] = _best(scores.of(q_nHD[rows], gates_nH[rows], keys_SD, block, first), top_k) + block.keys.start
    return ids_nK


class _Scores:
    """Scores of one tile of queries to the keys they see, in space that all tiles share."""

    def __init__(self, tile: Tile, like_nHD: Tensor, blocks: Sequence[Visible], buffers: Buffers) -> None:
        self.tile = tile
        longest = max((block.most for block in blocks), default=0)
        wide = torch.promote_types(like_nHD.dtype, torch.float32)
        self._products_tHs = buffers.get("select_products", (tile.queries, like_nHD.shape[1], tile.keys), like_nHD, wide)
        self._scores_tS = buffers.get("select_scores", (tile.queries, -(-longest // tile.keys) * tile.keys), like_nHD, wide)

    def of(self, q_tHD: Tensor, gates_tH: Tensor, keys_SD: Tensor, block: Visible, first: int) -> Tensor:
        """Scores [t, keys seen by the last query], -inf where a query does not see the key. Its first query is row `first` of the block."""
        rows, products = q_tHD.shape[0], self._products_tHs
        least, most = block.seen(first), block.seen(first + rows - 1)
        q = _filled(operand(q_tHD), self.tile.queries).flatten(0, 1)
        gates_t1H = _filled(gates_tH.to(products.dtype), self.tile.queries).unsqueeze(1)
        for start in range(0, most, self.tile.keys):
            part = slice(block.keys.start + start, block.keys.start + min(start + self.tile.keys, most))
            product(q, _filled(operand(keys_SD[part]), self.tile.keys).t(), products.view(-1, self.tile.keys))
            products.clamp_min_(0)
            self._scores_tS[:, start : start + self.tile.keys] = torch.bmm(gates_t1H, products).squeeze(1)
        scores = self._scores_tS[:rows, :most]
        seen_t1 = torch.arange(least, most + 1, block.step, device=scores.device).unsqueeze(1)
        scores[:, least:].masked_fill_(torch.arange(least, most, device=scores.device) >= seen_t1, -torch.inf)
        return scores


def _best(scores_tS: Tensor, top_k: int) -> Tensor:
    """The columns [t, K] of the highest scores in ascending order; of those that tie for the last places the lowest.

    `torch.topk` says which value is the last one in, but not which of its equals. Every row has at least K finite scores.
    """
    last_t1 = scores_tS.topk(top_k, dim=1, sorted=False).values.amin(1, keepdim=True)
    chosen = scores_tS >= last_t1
    if chosen.is_meta:  # shapes alone: there are no scores to look for
        return chosen.new_empty(len(chosen), top_k, dtype=torch.int64)
    if bool((chosen.sum(1) > top_k).any()):
        tied = scores_tS == last_t1
        places_t1 = top_k - (scores_tS > last_t1).sum(1, keepdim=True)
        chosen &= ~tied | (tied.cumsum(1, dtype=torch.int32) <= places_t1)
    return chosen.nonzero()[:, 1].view(-1, top_k)


def _all_seen(block: Visible, rows: int, top_k: int, device: torch.device) -> Tensor:
    """All key rows that the first `rows` queries of a block see, and -1 behind them."""
    slots = torch.arange(top_k, dtype=torch.int32, device=device)
    seen_n1 = (torch.arange(rows, device=device) * block.step + block.first).unsqueeze(1)
    return torch.where(slots < seen_n1, slots + block.keys.start, -1)


def operand(x: Tensor) -> Tensor:
    """What is multiplied: processors without matrix units for half precision multiply fp32 several times faster."""
    return x.float() if kind_of(x) == "cpu" and x.dtype in NARROW else x


def product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a @ b of two matrices or two batches of them into `out`, in fp32 where they are narrower: a score in bf16 ties with its neighbours."""
    multiply = torch.mm if a.dim() == 2 else torch.bmm
    return multiply(a, b, out_dtype=torch.float32, out=out) if a.dtype in NARROW else multiply(a, b, out=out)


def _filled(x: Tensor, rows: int) -> Tensor:
    """With zeros behind its rows, so that there are `rows` of them."""
    missing = rows - x.shape[0]
    return F.pad(x, (0,) * (2 * x.dim() - 1) + (missing,)) if missing else x
