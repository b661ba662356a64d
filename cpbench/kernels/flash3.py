"""FlashAttention 3 for Hopper: the module flash_attn_interface, which is built from the `hopper` folder of Dao-AILab/flash-attention.

Relies on the signatures of that folder in 2026 (commit 01afd16): `flash_attn_varlen_func` with `return_attn_probs` (builds of 2.8.3's
time return no LSE from it and are refused), and `flash_attn_with_kvcache` with `page_table`, `cache_seqlens`, `cu_seqlens_q` and
`return_softmax_lse` for pages of any size. Both return the LSE as [heads, rows] where queries are packed. The package flash-attn-3 on
PyPI is an empty placeholder.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cpbench.kernels.requirements import cuda_refusal, head_size_refusal, package_refusal
from cpbench.kernels.varlen import VarlenKernel, longest, on_device, with_lse

MAX_HEAD_SIZE = 256
INSTALL = "build it in the hopper folder of github.com/Dao-AILab/flash-attention (flash-attn-3 on PyPI is empty)"
CALLED = {"flash_attn_varlen_func": "return_attn_probs", "flash_attn_with_kvcache": "page_table"}


class Flash3(VarlenKernel):
    name = "flash3"
    summary = "FlashAttention 3 for Hopper, varlen and pages of any size (bf16, fp16)"
    page_multiple = 1

    def available(self, device: str, dtype: str, dim_qk: int, dim_v: int) -> str | None:
        reason = cuda_refusal(device, dtype, (9,)) or head_size_refusal(dim_qk, dim_v, MAX_HEAD_SIZE)
        if reason is None and dim_qk != dim_v and not (128 < dim_qk <= 192 and 96 < dim_v <= 128):
            reason = f"takes head sizes that differ only near 192 for q and k and 128 for v, not {dim_qk} and {dim_v}"
        return reason or package_refusal("flash_attn_interface", CALLED, INSTALL)

    def varlen_block(
        self, q_THD: Tensor, k_SGD: Tensor, v_SGE: Tensor, cu_q: Sequence[int], cu_k: Sequence[int], scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        from flash_attn_interface import flash_attn_varlen_func

        out, lse = flash_attn_varlen_func(
            q_THD,
            k_SGD,
            v_SGE,
            cu_seqlens_q=on_device(cu_q, q_THD.device),
            cu_seqlens_k=on_device(cu_k, q_THD.device),
            max_seqlen_q=longest(cu_q),
            max_seqlen_k=longest(cu_k),
            softmax_scale=scale,
            causal=causal,
            return_attn_probs=True,
        )
        return with_lse(out, lse, q_THD.shape[1])

    def paged_block(
        self, q_THD: Tensor, k_PpGD: Tensor, v_PpGE: Tensor, tables_RP: Tensor, cu_q: Sequence[int], keys: Sequence[int], scale: float
    ) -> tuple[Tensor, Tensor]:
        from flash_attn_interface import flash_attn_with_kvcache

        out, lse, *_ = flash_attn_with_kvcache(
            q_THD,
            k_PpGD,
            v_PpGE,
            cache_seqlens=on_device(keys, q_THD.device),
            page_table=tables_RP,
            cu_seqlens_q=on_device(cu_q, q_THD.device),
            max_seqlen_q=longest(cu_q),
            softmax_scale=scale,
            causal=True,
            num_splits=1,  # long prompts fill the device; a split would only cost another pass over the output
            return_softmax_lse=True,
        )
        return with_lse(out, lse, q_THD.shape[1])
