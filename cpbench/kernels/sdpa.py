"""What PyTorch itself brings for CUDA: its copy of FlashAttention 2, or cuDNN where head sizes differ and cuDNN takes them.

Relies on `aten._flash_attention_forward` of PyTorch 2.11 to 2.13, the operator under `torch.nn.attention.varlen.varlen_attn`: packed rows
with int32 lengths, a causal mask aligned to the bottom right, fewer kv heads than query heads, one head size, the LSE as [heads, rows]
(varlen_attn's documentation says the transpose; the operator and its fake say this). Where it has `block_table` and `num_splits` (2.13),
it reads pages of a multiple of 256 rows whose lengths are in `seqused_k`. fp32 on CUDA has no fused operator that returns the
log-sum-exp: `reference` runs there.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from cpbench.kernels.base import padding, same_head_size
from cpbench.kernels.cudnn import Cudnn
from cpbench.kernels.requirements import cuda_refusal, head_size_refusal
from cpbench.kernels.varlen import VarlenKernel, longest, on_device, with_lse

MAX_HEAD_SIZE = 256
PAGE_ROWS = 256


class Sdpa(VarlenKernel):
    name = "sdpa"
    summary = "PyTorch's own CUDA attention: flash, or cuDNN where head sizes differ (bf16, fp16)"

    def __init__(self) -> None:
        arguments = {argument.name for argument in torch.ops.aten._flash_attention_forward.default._schema.arguments}
        self.page_multiple = PAGE_ROWS if {"block_table", "num_splits"} <= arguments else None

    def available(self, device: str, dtype: str, dim_qk: int, dim_v: int) -> str | None:
        return cuda_refusal(device, dtype, (8, 9, 10, 11, 12)) or head_size_refusal(dim_qk, dim_v, MAX_HEAD_SIZE)

    def dispatched(self, dtype: str, dim_qk: int, dim_v: int) -> str:
        if _uses_cudnn(dtype, dim_qk, dim_v):
            return f"{self.name} (cudnn)"
        return f"{self.name} ({', '.join(filter(None, ['flash', padding(dim_qk, dim_v)]))})"

    def reads_pages(self, page_size: int, dim_qk: int, dim_v: int) -> bool:
        return dim_qk == dim_v and super().reads_pages(page_size, dim_qk, dim_v)

    def varlen_block(
        self, q_THD: Tensor, k_SGD: Tensor, v_SGE: Tensor, cu_q: Sequence[int], cu_k: Sequence[int], scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        dim_v = v_SGE.shape[2]
        if _uses_cudnn(str(q_THD.dtype).removeprefix("torch."), q_THD.shape[2], dim_v):
            return Cudnn().varlen_block(q_THD, k_SGD, v_SGE, cu_q, cu_k, scale, causal)
        return _call(*same_head_size(q_THD, k_SGD, v_SGE), cu_q, cu_k, scale, causal, dim_v, {})

    def paged_block(
        self, q_THD: Tensor, k_PpGD: Tensor, v_PpGE: Tensor, tables_RP: Tensor, cu_q: Sequence[int], keys: Sequence[int], scale: float
    ) -> tuple[Tensor, Tensor]:
        # one split: the merge of several is not laid out for packed queries (Dao-AILab/flash-attention, issue 1217)
        pages = {"seqused_k": on_device(keys, q_THD.device), "block_table": tables_RP, "num_splits": 1}
        return _call(q_THD, k_PpGD, v_PpGE, cu_q, (0, *accumulate(keys)), scale, True, v_PpGE.shape[3], pages)


def _uses_cudnn(dtype: str, dim_qk: int, dim_v: int) -> bool:
    return dim_qk != dim_v and Cudnn().available("cuda", dtype, dim_qk, dim_v) is None


def _call(
    q_THD: Tensor, k: Tensor, v: Tensor, cu_q: Sequence[int], cu_k: Sequence[int], scale: float, causal: bool, dim_v: int, pages: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    boundaries = (on_device(cu, q_THD.device) for cu in (cu_q, cu_k))
    attention = torch.ops.aten._flash_attention_forward
    out, lse = attention(q_THD, k, v, *boundaries, longest(cu_q), longest(cu_k), 0.0, causal, False, scale=scale, **pages)[:2]
    return with_lse(out[..., :dim_v], lse, q_THD.shape[1])
