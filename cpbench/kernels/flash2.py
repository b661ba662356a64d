"""FlashAttention 2: `flash_attn_varlen_func` of the package flash-attn, for every launch.

Relies on the signature of flash-attn 2.8.3 (2.8.3.post2 read): keyword arguments `max_seqlen_q`, `max_seqlen_k`, `softmax_scale`, `causal`,
`return_attn_probs`, `block_table`; with `return_attn_probs` it returns (out, lse, None) with the LSE as [heads, rows] (before 2.6 it was
padded per sequence: such a version is refused, having no `softcap`). It takes one head size for q, k and v, so others are padded. With a
block table, k and v are pages of a multiple of 256 rows, and `cu_seqlens_k` only says how many keys each request sees, so that two
requests may read the same pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from cpbench.kernels.base import padding, same_head_size
from cpbench.kernels.requirements import cuda_refusal, head_size_refusal, package_refusal
from cpbench.kernels.varlen import VarlenKernel, longest, on_device, with_lse

MAX_HEAD_SIZE = 256
INSTALL = "pip install --no-build-isolation 'cpbench[flash]' builds it, with nvcc"


class Flash2(VarlenKernel):
    name = "flash2"
    summary = "FlashAttention 2 (flash-attn), varlen and pages of 256 (bf16, fp16)"
    page_multiple = 256

    def available(self, device: str, dtype: str, dim_qk: int, dim_v: int) -> str | None:
        reason = cuda_refusal(device, dtype, (8, 9, 10, 11, 12)) or head_size_refusal(dim_qk, dim_v, MAX_HEAD_SIZE)
        return reason or package_refusal("flash_attn.flash_attn_interface", {"flash_attn_varlen_func": "softcap"}, INSTALL)

    def dispatched(self, dtype: str, dim_qk: int, dim_v: int) -> str:
        padded = padding(dim_qk, dim_v)
        return f"{self.name} ({padded})" if padded else self.name

    def reads_pages(self, page_size: int, dim_qk: int, dim_v: int) -> bool:
        return dim_qk == dim_v and super().reads_pages(page_size, dim_qk, dim_v)

    def varlen_block(
        self, q_THD: Tensor, k_SGD: Tensor, v_SGE: Tensor, cu_q: Sequence[int], cu_k: Sequence[int], scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        return _call(*same_head_size(q_THD, k_SGD, v_SGE), cu_q, cu_k, scale, causal, v_SGE.shape[2])

    def paged_block(
        self, q_THD: Tensor, k_PpGD: Tensor, v_PpGE: Tensor, tables_RP: Tensor, cu_q: Sequence[int], keys: Sequence[int], scale: float
    ) -> tuple[Tensor, Tensor]:
        cu_k = (0, *accumulate(keys))
        return _call(q_THD, k_PpGD, v_PpGE, cu_q, cu_k, scale, True, v_PpGE.shape[3], tables_RP)


def _call(
    q_THD: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Sequence[int],
    cu_k: Sequence[int],
    scale: float,
    causal: bool,
    dim_v: int,
    tables_RP: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    from flash_attn.flash_attn_interface import flash_attn_varlen_func

    out, lse, _ = flash_attn_varlen_func(
        q_THD,
        k,
        v,
        cu_seqlens_q=on_device(cu_q, q_THD.device),
        cu_seqlens_k=on_device(cu_k, q_THD.device),
        max_seqlen_q=longest(cu_q),
        max_seqlen_k=longest(cu_k),
        softmax_scale=scale,
        causal=causal,
        return_attn_probs=True,
        block_table=tables_RP,
    )
    return with_lse(out[..., :dim_v], lse, q_THD.shape[1])
