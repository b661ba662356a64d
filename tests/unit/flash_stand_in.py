"""Stand-ins for the attention libraries that need a GPU: their public signatures, layouts and demands, computed in fp64 on the CPU.

Only what cpbench calls is here. Signatures (names, order, defaults) and result layouts are those of flash-attn 2.8.3, the hopper folder
of FlashAttention at commit 01afd16, flash-attn-4 4.0.0b36, and two operators of PyTorch 2.13, which are registered for the CPU so that
PyTorch's own schema checks the call. The real ones refuse fp32; these compute it, so that a test can be exact. Arguments that cpbench
does not use must keep their defaults.
"""

import sys
from types import ModuleType

import torch

FA2 = "flash_attn.flash_attn_interface"
FA3 = "flash_attn_interface"
FA4 = "flash_attn.cute"


class StandIn:
    """The installed modules and a record of the calls: a list of (function, number of sequences)."""

    def __init__(self, monkeypatch):
        self.calls = []
        self.modules = {}
        for name, functions in {
            "flash_attn": (),
            FA2: (self.fa2_varlen(),),
            FA3: (self.fa3_varlen(), self.fa3_with_kvcache()),
            FA4: (self.fa4_varlen(),),
        }.items():
            module = ModuleType(name)
            for function in functions:
                setattr(module, function.__name__, function)
            self.modules[name] = module
            monkeypatch.setitem(sys.modules, name, module)
        self.library = torch.library.Library("aten", "IMPL")
        self.library.impl("_flash_attention_forward", self.aten_flash, "CPU")
        self.library.impl("_scaled_dot_product_cudnn_attention", self.aten_cudnn, "CPU")

    def fa2_varlen(self):
        def flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            dropout_p=0.0,
            softmax_scale=None,
            causal=False,
            window_size=(-1, -1),
            softcap=0.0,
            alibi_slopes=None,
            deterministic=False,
            return_attn_probs=False,
            block_table=None,
        ):
            assert (dropout_p, window_size, softcap, alibi_slopes, deterministic) == (0.0, (-1, -1), 0.0, None, False)
            assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256, "FA2 has one head size"
            if block_table is not None:
                assert k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
                k, v = pages(k, v, block_table, lengths(cu_seqlens_k))
            out, lse = self.packed("flash_attn_varlen_func", q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)
            return (out, lse, None) if return_attn_probs else out

        return flash_attn_varlen_func

    def fa3_varlen(self):
        def flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            seqused_q=None,
            seqused_k=None,
            softmax_scale=None,
            causal=False,
            qv=None,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            window_size=(-1, -1),
            attention_chunk=0,
            softcap=0.0,
            num_splits=1,
            pack_gqa=None,
            deterministic=False,
            sm_margin=0,
            return_attn_probs=False,
        ):
            assert (seqused_q, seqused_k, qv, window_size, attention_chunk, softcap) == (None, None, None, (-1, -1), 0, 0.0)
            out, lse = self.packed("flash_attn_varlen_func", q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)
            return (out, lse) if return_attn_probs else out

        return flash_attn_varlen_func

    def fa3_with_kvcache(self):
        def flash_attn_with_kvcache(
            q,
            k_cache,
            v_cache,
            k=None,
            v=None,
            qv=None,
            rotary_cos=None,
            rotary_sin=None,
            cache_seqlens=None,
            cache_batch_idx=None,
            cache_leftpad=None,
            page_table=None,
            cu_seqlens_q=None,
            cu_seqlens_k_new=None,
            max_seqlen_q=None,
            rotary_seqlens=None,
            q_descale=None,
            k_descale=None,
            v_descale=None,
            softmax_scale=None,
            causal=False,
            window_size=(-1, -1),
            attention_chunk=0,
            softcap=0.0,
            rotary_interleaved=True,
            scheduler_metadata=None,
            num_splits=0,
            pack_gqa=None,
            sm_margin=0,
            return_softmax_lse=False,
        ):
            assert all(x is None for x in (k, v, qv, cache_batch_idx, cache_leftpad, cu_seqlens_k_new)), "no new keys here"
            assert k_cache.stride(-1) == 1, "k_cache must have contiguous last dimension"
            assert v_cache.stride(-1) == 1, "v_cache must have contiguous last dimension"
            assert cache_seqlens.dtype == torch.int32
            keys, values = pages(k_cache, v_cache, page_table, cache_seqlens.tolist())
            cu_k = torch.nn.functional.pad(cache_seqlens.cumsum(0, dtype=torch.int32), (1, 0))
            longest = int(cache_seqlens.max())
            out, lse = self.packed("flash_attn_with_kvcache", q, keys, values, cu_seqlens_q, cu_k, max_seqlen_q, longest, softmax_scale, causal)
            return (out, lse) if return_softmax_lse else out

        return flash_attn_with_kvcache

    def fa4_varlen(self):
        def flash_attn_varlen_func(
            q,
            k,
            v,
            qv=None,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            max_seqlen_q=None,
            max_seqlen_k=None,
            min_seqlen_k=None,
            seqused_q=None,
            seqused_k=None,
            gather_kv_indices=None,
            page_table=None,
            softmax_scale=None,
            causal=False,
            window_size=(None, None),
            learnable_sink=None,
            softcap=0.0,
            num_splits=1,
            pack_gqa=None,
            deterministic=False,
            score_mod=None,
            score_mod_bwd=None,
            mask_mod=None,
            block_sparse_tensors=None,
            aux_tensors=None,
            aux_scalars=None,
            return_lse=False,
            scheduler_metadata=None,
            seqlen_k_per_split=None,
            disable_scheduler_metadata=False,
            gather_bwd_recompute_p=False,
            gather_bwd_token_chunk=None,
        ):
            assert all(x is None for x in (qv, min_seqlen_k, seqused_q, gather_kv_indices, learnable_sink, mask_mod, score_mod))
            if page_table is not None:
                assert cu_seqlens_k is None, "page_table is not supported with cu_seqlens_k"
                assert seqused_k.dtype == torch.int32
                k, v = pages(k, v, page_table, seqused_k.tolist())
                cu_seqlens_k = torch.nn.functional.pad(seqused_k.cumsum(0, dtype=torch.int32), (1, 0))
            out, lse = self.packed("flash_attn_varlen_func", q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)
            return out, lse if return_lse else None

        return flash_attn_varlen_func

    def aten_flash(
        self,
        query,
        key,
        value,
        cum_seq_q,
        cum_seq_k,
        max_q,
        max_k,
        dropout_p,
        is_causal,
        return_debug_mask,
        *,
        scale=None,
        window_size_left=None,
        window_size_right=None,
        seqused_k=None,
        alibi_slopes=None,
        block_table=None,
        num_splits=None,
    ):
        assert (dropout_p, return_debug_mask, window_size_left, window_size_right, alibi_slopes) == (0.0, False, None, None, None)
        assert query.shape[-1] == key.shape[-1] == value.shape[-1] <= 256, "one head size"
        if block_table is not None:
            assert key.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256"
            assert lengths(cum_seq_k) == seqused_k.tolist()
            assert num_splits == 1
            key, value = pages(key, value, block_table, seqused_k.tolist())
        out, lse = self.packed("_flash_attention_forward", query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, scale, is_causal)
        nothing = torch.empty(0)
        return out, lse, nothing, nothing, nothing

    def aten_cudnn(self, query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
        assert (attn_bias, compute_log_sumexp, dropout_p, return_debug_mask) == (None, True, 0.0, False)
        assert key.shape[2] > 1, "cudnn SDPA does not support key/value sequence length 1"
        assert not is_causal or query.shape[2] == key.shape[2], "aligned to the top left: only squares mean what a plan means"
        self.calls.append(("_scaled_dot_product_cudnn_attention", query.shape[0]))
        out, lse = attention(*(x.squeeze(0).transpose(0, 1) for x in (query, key, value)), scale, is_causal)
        nothing = torch.empty(0)
        out, lse = out.transpose(0, 1)[None].contiguous(), lse[None, :, :, None].contiguous()
        return out, lse, nothing, nothing, query.shape[2], key.shape[2], nothing, nothing, nothing

    def packed(self, function, q, k, v, cu_q, cu_k, max_q, max_k, scale, causal):
        """(out [T, H, E], lse [H, T]) of packed sequences, with what every library of the family demands."""
        assert cu_q.dtype == cu_k.dtype == torch.int32, "cumulative lengths must be int32"
        assert cu_q.is_contiguous() and cu_k.is_contiguous()
        assert len(cu_q) == len(cu_k)
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "contiguous last dimension"
        assert q.dim() == k.dim() == v.dim() == 3
        assert q.dtype == k.dtype == v.dtype
        assert k.shape[:2] == v.shape[:2] and q.shape[1] % k.shape[1] == 0 and q.shape[2] == k.shape[2]
        assert cu_q[0] == cu_k[0] == 0 and cu_q[-1] == len(q) and cu_k[-1] == len(k), "lengths cover the rows"
        assert max(lengths(cu_q)) == max_q and max(lengths(cu_k)) == max_k
        self.calls.append((function, len(cu_q) - 1))
        parts = [
            attention(q[q0:q1], k[k0:k1], v[k0:k1], scale, causal)
            for q0, q1, k0, k1 in zip(cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:], strict=False)
        ]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], 1).contiguous()


def lengths(cu):
    return cu.diff().tolist()


def pages(k, v, table, keys):
    """The rows of every request, one after the other, out of its pages."""
    assert table.dtype == torch.int32 and table.stride(-1) == 1 and len(table) == len(keys)
    assert k.dim() == v.dim() == 4 and k.stride(-1) == v.stride(-1) == 1
    return [torch.cat([x[row.long()].flatten(0, 1)[:count] for row, count in zip(table, keys, strict=True)]) for x in (k, v)]


def attention(q, k, v, scale, causal):
    """Softmax attention in fp64, causal from the bottom right, rounded to q's dtype; the LSE in fp32."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    score = q.double().transpose(0, 1) @ k.transpose(1, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        seen = torch.ones(q.shape[0], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[0])
        score = score.masked_fill(~seen, float("-inf"))
    return (score.softmax(-1) @ v).transpose(0, 1).to(q.dtype).contiguous(), score.logsumexp(-1).float()
