"""FlashAttention 4, written in CuTe: `flash_attn.cute.flash_attn_varlen_func` of the package flash-attn-4, for Hopper and Blackwell.

Relies on the signature of flash-attn-4 4.0.0b36, whose parameters after `v` are passed by name, since `qv` comes before the lengths. With
`return_lse` it returns (out, lse), the LSE as [heads, rows]. Pages may have any size; with a page table the key lengths go into
`seqused_k` and `cu_seqlens_k` must be absent. Where a page is as long as the kernel's key tile, whole pages are loaded: rows behind the
last key must be finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cpbench.kernels.requirements import cuda_refusal, head_size_refusal, package_refusal
from cpbench.kernels.varlen import VarlenKernel, longest, on_device, with_lse

INSTALL = "pip install 'cpbench[flash4]'"
UNEQUAL_ON_BLACKWELL = (192, 128)
EQUAL_ON_BLACKWELL = 256


class Flash4(VarlenKernel):
    name = "flash4"
    summary = "FlashAttention 4 for Hopper and Blackwell, varlen and pages of any size (bf16, fp16)"
    page_multiple = 1

    def available(self, device: str, dtype: str, dim_qk: int, dim_v: int) -> str | None:
        reason = cuda_refusal(device, dtype, (9, 10, 11)) or _head_sizes(dim_qk, dim_v)
        return reason or package_refusal("flash_attn.cute", {"flash_attn_varlen_func": "return_lse"}, INSTALL)

    def varlen_block(
        self, q_THD: Tensor, k_SGD: Tensor, v_SGE: Tensor, cu_q: Sequence[int], cu_k: Sequence[int], scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        lengths = {"cu_seqlens_k": on_device(cu_k, q_THD.device), "max_seqlen_k": longest(cu_k)}
        return _call(q_THD, k_SGD, v_SGE, cu_q, scale, causal, lengths)

    def paged_block(
        self, q_THD: Tensor, k_PpGD: Tensor, v_PpGE: Tensor, tables_RP: Tensor, cu_q: Sequence[int], keys: Sequence[int], scale: float
    ) -> tuple[Tensor, Tensor]:
        lengths = {"seqused_k": on_device(keys, q_THD.device), "max_seqlen_k": max(keys), "page_table": tables_RP}
        return _call(q_THD, k_PpGD, v_PpGE, cu_q, scale, True, lengths)


def _head_sizes(dim_qk: int, dim_v: int) -> str | None:
    """Hopper takes any two sizes up to 256; Blackwell up to 128, 192 with 128, and 256 with 256."""
    if torch.cuda.get_device_capability()[0] == 9:
        return head_size_refusal(dim_qk, dim_v, 256)
    if (dim_qk, dim_v) in (UNEQUAL_ON_BLACKWELL, (EQUAL_ON_BLACKWELL, EQUAL_ON_BLACKWELL)):
        return None
    return head_size_refusal(dim_qk, dim_v, 128)


def _call(q_THD: Tensor, k: Tensor, v: Tensor, cu_q: Sequence[int], scale: float, causal: bool, lengths: dict[str, Any]) -> tuple[Tensor, Tensor]:
    from flash_attn.cute import flash_attn_varlen_func

    out, lse = flash_attn_varlen_func(
        q_THD,
        k,
        v,
        cu_seqlens_q=on_device(cu_q, q_THD.device),
        max_seqlen_q=longest(cu_q),
        softmax_scale=scale,
        causal=causal,
        return_lse=True,
        **lengths,
    )
    return with_lse(out, lse, q_THD.shape[1])
