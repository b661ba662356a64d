"""PyTorch's fused CUDA attention through the two operators that return the log-sum-exp: flash and cuDNN.

Flash is used where it can (half precision, equal head sizes); cuDNN takes head sizes of q/k and v that differ. fp32 on CUDA has no
fused operator that returns the log-sum-exp: `reference` runs there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpbench.kernels.base import Kernel

MAX_FLASH_DIM = 256


class Sdpa(Kernel):
    name = "sdpa"
    summary = "PyTorch's fused CUDA attention: flash, or cuDNN where head sizes differ (bf16, fp16)"

    def available(self, device: str, dtype: str, dim_qk: int, dim_v: int) -> str | None:
        if device != "cuda":
            return f"runs on cuda, not on {device}"
        if not torch.cuda.is_available():
            return "no CUDA device is visible, or this PyTorch is a CPU build"
        if dtype not in ("bfloat16", "float16"):
            return f"takes bfloat16 and float16, not {dtype}"
        if max(dim_qk, dim_v) > MAX_FLASH_DIM:
            return f"takes head sizes up to {MAX_FLASH_DIM}, not {max(dim_qk, dim_v)}"
        if dim_qk != dim_v and not torch.backends.cudnn.is_available():
            return "head sizes of q/k and v differ, which needs cuDNN"
        return None

    def block(self, q_THD: Tensor, k_SGD: Tensor, v_SGE: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        group = q_THD.shape[1] // k_SGD.shape[1]
        k_SHD, v_SHE = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k_SGD, v_SGE))
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_THD, k_SHD, v_SHE))
        if q_THD.shape[2] == v_SGE.shape[2]:
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)[:2]
        else:
            out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
        return out.squeeze(0).transpose(0, 1), lse.reshape(lse.shape[1], -1)[:, : q_THD.shape[0]]
