"""Attention whose bits depend on a query, its keys and their positions, and on nothing else: not on how many queries a call has, nor where
they are cut, nor which heads a rank has.

Scores and outputs are products of one shape: some query rows, padded, times keys in blocks that begin at a sequence's first token. A row's
softmax is one call over all keys that its block of queries may see. Keys behind a query have the weight zero, so that it does not matter how
many of them there are. In fp32, or fp64 for fp64. Many small products make it slower than a fused kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from cpbench.deterministic import KEYS, QUERIES
from cpbench.kernels.base import Kernel


class FixedBlocks(Kernel):
    name = "fixed_blocks"
    summary = "products of one shape, with the same bits in every layout (fp32, bf16, fp16, fp64)"
    takes_all_keys = True

    def available(self, device: str, dtype: str, dim_qk: int, dim_v: int) -> str | None:
        return None

    def block(self, q_THD: Tensor, k_SGD: Tensor, v_SGE: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        """As in `Kernel`; `causal` is aligned to the bottom right and takes S >= T."""
        (rows, heads, _), keys = q_THD.shape, len(k_SGD)
        wide = torch.promote_types(q_THD.dtype, torch.float32)
        out_THE = q_THD.new_empty(rows, heads, v_SGE.shape[2])
        lse_HT = torch.empty(heads, rows, dtype=wide, device=q_THD.device)
        blocks = -(-keys // KEYS) * KEYS
        group = heads // k_SGD.shape[1]
        scores = torch.empty(QUERIES * blocks, dtype=wide, device=q_THD.device)
        column_S = torch.arange(blocks, device=q_THD.device)
        for head in range(heads):
            if head % group == 0:
                k_SD, v_SE = (pad(x[:, head // group].to(wide), (0, 0, 0, blocks - keys)) for x in (k_SGD, v_SGE))
            for first in range(0, rows, QUERIES):
                last = min(first + QUERIES, rows)
                q_tD = pad(q_THD[first:last, head].to(wide), (0, 0, 0, QUERIES - (last - first)))
                seen_t1 = torch.arange(first, first + QUERIES, device=q_THD.device)[:, None] + (keys - rows + 1)
                seen_t1 = seen_t1.clamp_(max=keys) if causal else torch.full_like(seen_t1, keys)
                width = -(-(keys - rows + last if causal else keys) // KEYS) * KEYS
                score_tS = scores[: QUERIES * width].view(QUERIES, width)
                for key in range(0, width, KEYS):
                    torch.mm(q_tD, k_SD[key : key + KEYS].T, out=score_tS[:, key : key + KEYS])
                score_tS.mul_(scale).masked_fill_(column_S[:width] >= seen_t1, float("-inf"))
                largest_t = score_tS.amax(1)
                weight_tS = score_tS.softmax(1)
                lse_HT[head, first:last] = (largest_t - weight_tS.amax(1).log())[: last - first]
                out_tE = weight_tS[:, :KEYS] @ v_SE[:KEYS]
                for key in range(KEYS, width, KEYS):
                    out_tE.addmm_(weight_tS[:, key : key + KEYS], v_SE[key : key + KEYS])
                out_THE[first:last, head] = out_tE[: last - first]
        return out_THE, lse_HT
