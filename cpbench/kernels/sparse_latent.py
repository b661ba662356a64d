"""Attention of each query to the latent rows that were selected for it: the absorbed form of multi-head latent attention, on one device.

All heads of a query share its rows, so a tile of queries is one batch of products: its rows are copied together, multiplied with the
queries, and their first `kv_rank` values with the weights. Queries that see no more keys than may be selected attend to all of them
where they lie. How many queries make a tile is decided by a budget of bytes, so memory does not grow with the number of keys. Which
rows are selected is decided in selection.py.

    n query rows   S latent rows   K selected rows   H heads   W width of a row: R latent values, then the rotated ones   t queries of a tile
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpbench.buffers import Buffers
from cpbench.device_kind import kind_of
from cpbench.kernels.selection import operand, product
from cpbench.segments import Span
from cpbench.visible import TILE_BYTES, Visible, pieces, require_visible, rows_attending_to_all, rows_attending_to_selected


def attend_selected(
    q_nHW: Tensor,
    rows_SW: Tensor,
    ids_nK: Tensor,
    blocks: Sequence[Visible],
    scale: float,
    kv_rank: int,
    buffers: Buffers | None = None,
    tile_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of every query to its selected rows: (out [n, H, R] in q's dtype, lse [H, n] in fp32, fp64 for fp64).

    `q_nHW` is absorbed: its scores with latent rows are those of the heads' own keys. The value of a row is its first `kv_rank` values.
    `ids_nK` is what `select` returned for the same blocks: queries that see at most K rows attend to all of them, for the others every
    slot is used. Rows that no block covers give zeros and an lse of -inf. Raises ValueError for a block that sees more rows than it has.
    """
    require_visible(blocks)
    (n, heads, width), top_k = q_nHW.shape, ids_nK.shape[1]
    tiles = _Tiles(rows_SW, scale, kv_rank, buffers or Buffers())
    out_nHR = q_nHW.new_zeros(n, heads, kv_rank)
    lse_Hn = q_nHW.new_full((heads, n), -torch.inf, dtype=tiles.wide)
    values = (tile_bytes or TILE_BYTES[kind_of(q_nHW)]) // tiles.wide.itemsize
    for block in blocks:
        seeing_all = block.rows_seeing(top_k)
        for first, last in pieces(0, seeing_all, rows_attending_to_all(block, (heads, kv_rank), top_k, values)):
            rows = slice(block.queries.start + first, block.queries.start + last)
            seen = range(block.seen(first), block.seen(last - 1) + 1, block.step)
            out_nHR[rows], lse_Hn[:, rows] = tiles.attend_all(operand(q_nHW[rows]), block.keys, seen)
        for first, last in pieces(seeing_all, block.queries.rows, rows_attending_to_selected((heads, width, kv_rank), top_k, values)):
            rows = slice(block.queries.start + first, block.queries.start + last)
            out_nHR[rows], lse_Hn[:, rows] = tiles.attend(operand(q_nHW[rows]), ids_nK[rows])
    return out_nHR, lse_Hn


class _Tiles:
    """Attention of one tile of queries: (out [t, H, R], lse [H, t]), in space that all tiles share, so valid until the next one."""

    def __init__(self, rows_SW: Tensor, scale: float, kv_rank: int, buffers: Buffers) -> None:
        self.wide = torch.promote_types(rows_SW.dtype, torch.float32)
        self._rows_SW, self._scale, self._kv_rank, self._buffers = rows_SW, scale, kv_rank, buffers

    def attend(self, q_tHW: Tensor, ids_tK: Tensor) -> tuple[Tensor, Tensor]:
        """To the selected rows of each query, which are copied together."""
        rows, width = self._rows_SW, q_tHW.shape[2]
        gathered = torch.index_select(rows, 0, ids_tK.flatten(), out=self._buffers.get("select_rows", (ids_tK.numel(), width), rows))
        if q_tHW.dtype != rows.dtype:
            gathered = self._buffers.get("select_wide", (ids_tK.numel(), width), rows, q_tHW.dtype).copy_(gathered)
        gathered_tKW = gathered.view(*ids_tK.shape, width)
        scores_tHK = product(q_tHW, gathered_tKW.mT, self._space("weights", *q_tHW.shape[:2], ids_tK.shape[1]))
        weights_tHK, sum_tH1, lse_Ht = _softmax(scores_tHK.mul_(self._scale))
        out_tHR = self._space("out", *q_tHW.shape[:2], self._kv_rank)
        return product(weights_tHK.to(q_tHW.dtype), gathered_tKW[..., : self._kv_rank], out_tHR).div_(sum_tH1), lse_Ht

    def attend_all(self, q_tHW: Tensor, keys: Span, seen: range) -> tuple[Tensor, Tensor]:
        """Causal: query i to the first seen[i] rows of `keys`, which all queries share."""
        (queries, heads, _), most = q_tHW.shape, seen[-1]
        rows_SW = operand(self._rows_SW[keys.start : keys.start + most])
        scores_tHS = product(q_tHW.flatten(0, 1), rows_SW.t(), self._space("weights", queries * heads, most)).view(queries, heads, most)
        hidden = torch.arange(most, device=q_tHW.device) >= torch.tensor(seen, device=q_tHW.device).view(-1, 1, 1)
        weights_tHS, sum_tH1, lse_Ht = _softmax(scores_tHS.mul_(self._scale).masked_fill_(hidden, -torch.inf))
        out = product(weights_tHS.to(q_tHW.dtype).flatten(0, 1), rows_SW[:, : self._kv_rank], self._space("out", queries * heads, self._kv_rank))
        return out.view(queries, heads, -1).div_(sum_tH1), lse_Ht

    def _space(self, name: str, *shape: int) -> Tensor:
        return self._buffers.get(f"select_{name}", shape, self._rows_SW, self.wide)


def _softmax(scores_tHS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The numerators in place, their sums [t, H, 1], and the lse [H, t]. Results are divided by the sums: they are narrower than the scores."""
    largest_tH1 = scores_tHS.amax(-1, keepdim=True)
    weights_tHS = scores_tHS.sub_(largest_tH1).exp_()
    sum_tH1 = weights_tHS.sum(-1, keepdim=True)
    return weights_tHS, sum_tH1, (largest_tH1 + sum_tH1.log()).squeeze(-1).t()
