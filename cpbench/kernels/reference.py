"""Plain softmax attention with matrix products, the truth that other kernels are held against (in fp64). Not for speed.

Query rows are taken in blocks so that the score matrix stays small. Works on every device and dtype; the arithmetic is done in
fp32, or fp64 for fp64 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpbench.kernels.base import Kernel

BLOCK_SCORES = 1 << 24


class Reference(Kernel):
    name = "reference"
    summary = "plain matrix products and softmax in fp32 or fp64; the truth, not for speed"

    def available(self, device: str, dtype: str, dim_qk: int, dim_v: int) -> str | None:
        return None

    def block(self, q_THD: Tensor, k_SGD: Tensor, v_SGE: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        working = torch.float64 if q_THD.dtype == torch.float64 else torch.float32
        group = q_THD.shape[1] // k_SGD.shape[1]
        k_HDS = k_SGD.to(working).repeat_interleave(group, 1).permute(1, 2, 0)
        v_HSE = v_SGE.to(working).repeat_interleave(group, 1).transpose(0, 1)
        rows, keys = q_THD.shape[0], k_SGD.shape[0]
        out_THE = q_THD.new_empty(rows, q_THD.shape[1], v_SGE.shape[2])
        lse_HT = torch.empty(q_THD.shape[1], rows, dtype=working, device=q_THD.device)
        step = max(1, BLOCK_SCORES // (keys * q_THD.shape[1]))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            score_HTS = q_THD[start:stop].to(working).transpose(0, 1) @ k_HDS * scale
            if causal:
                row = torch.arange(start, stop, device=q_THD.device)[:, None]
                score_HTS.masked_fill_(torch.arange(keys, device=q_THD.device) > row, float("-inf"))
            lse_HT[:, start:stop] = score_HTS.logsumexp(-1)
            weight_HTS = (score_HTS - lse_HT[:, start:stop, None]).exp_()
            out_THE[start:stop] = (weight_HTS @ v_HSE).transpose(0, 1)
        return out_THE, lse_HT
