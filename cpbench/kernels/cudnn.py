"""cuDNN's fused attention through PyTorch's operator `aten._scaled_dot_product_cudnn_attention`, which returns the log-sum-exp.

Relies on the operator of PyTorch 2.11 to 2.13: [1, heads, rows, head size] in and out, the LSE as [1, heads, rows, 1], a causal mask that
is aligned to the top left (plans call it on squares), fewer kv heads than query heads as they are, head sizes that may differ. It does not
take a single key: that call, whose softmax is 1, is done by the reference. Limits are those of PyTorch's own check
(sdp_utils.cpp): 128; 256 on Hopper from cuDNN 9.10; 192 with 128 on Blackwell from 9.11.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cpbench.kernels.base import Kernel
from cpbench.kernels.reference import Reference
from cpbench.kernels.requirements import cuda_refusal, head_size_refusal

LARGE_HEADS = 91000  # cuDNN 9.10.0
MLA_HEADS = 91100


class Cudnn(Kernel):
    name = "cudnn"
    summary = "cuDNN's fused attention, head sizes may differ (bf16, fp16)"

    def available(self, device: str, dtype: str, dim_qk: int, dim_v: int) -> str | None:
        reason = cuda_refusal(device, dtype, (8, 9, 10, 11, 12))
        if reason:
            return reason
        version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
        if version is None or version < 90000:
            return "needs cuDNN 9 in this PyTorch"
        return head_size_refusal(dim_qk, dim_v, _largest_head(version, torch.cuda.get_device_capability(), dim_qk, dim_v))

    def block(self, q_THD: Tensor, k_SGD: Tensor, v_SGE: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
        if k_SGD.shape[0] == 1:
            return Reference().block(q_THD, k_SGD, v_SGE, scale, causal)
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_THD, k_SGD, v_SGE))
        out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
        return out.squeeze(0).transpose(0, 1), lse.reshape(lse.shape[1], -1)


def _largest_head(version: int, capability: tuple[int, int], dim_qk: int, dim_v: int) -> int:
    if version >= LARGE_HEADS and capability == (9, 0):
        return 256
    if version >= MLA_HEADS and capability[0] == 10 and (dim_qk, dim_v) == (192, 128):
        return 192
    return 128
