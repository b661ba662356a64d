"""Stand-ins for ring-flash-attn, yunchang and TransformerEngine: their signatures, and attention as each defines it, in fp64 on the CPU.

Only what cpbench calls is here. Signatures (names, order, defaults) are those of ring-flash-attn 0.1.8, yunchang 0.6.4 and
TransformerEngine 2.20.2; arguments that cpbench does not use must keep their defaults. The group is a `Group` of the local backend, so
the ranks are threads. Each function gathers K and V with the positions that its library gives to the rows of a rank, and computes its
own queries: rows in another order, swapped arguments or a dropped scale give another answer.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch

from tests.unit.flash_stand_in import lengths as piece_lengths


class StandIn:
    """The installed modules and the names of the functions that were called."""

    def __init__(self, monkeypatch):
        self.calls = []
        self.modules = {name: ModuleType(name) for name in ("ring_flash_attn", "yunchang", "transformer_engine", "transformer_engine.pytorch", "flash_attn")}
        for function in (self.ring(), self.ring_varlen()):
            setattr(self.modules["ring_flash_attn"], function.__name__, function)
        self.modules["yunchang"].UlyssesAttention = self.ulysses()
        self.modules["transformer_engine.pytorch"].DotProductAttention = self.dot_product_attention()
        for name, module in self.modules.items():
            module.__spec__ = ModuleSpec(name, None)
            monkeypatch.setitem(sys.modules, name, module)

    def ring(self):
        def zigzag_ring_flash_attn_func(
            q,
            k,
            v,
            dropout_p=0.0,
            softmax_scale=None,
            causal=False,
            window_size=(-1, -1),
            alibi_slopes=None,
            deterministic=False,
            return_attn_probs=False,
            group=None,
        ):
            assert (dropout_p, window_size, alibi_slopes, deterministic) == (0.0, (-1, -1), None, False)
            assert causal, "zigzag ring is meaningless for causal=False"
            self.calls.append("zigzag_ring_flash_attn_func")
            out, lse = over_ranks(q, k, v, softmax_scale, group, lambda rank: zigzag_positions([q.shape[1]], rank, group.size))
            return (out, lse, None) if return_attn_probs else out

        return zigzag_ring_flash_attn_func

    def ring_varlen(self):
        def zigzag_ring_flash_attn_varlen_func(
            q,
            k,
            v,
            cu_seqlens,
            max_seqlen,
            dropout_p=0.0,
            softmax_scale=None,
            causal=False,
            window_size=(-1, -1),
            alibi_slopes=None,
            deterministic=False,
            return_attn_probs=False,
            group=None,
        ):
            assert (dropout_p, window_size, alibi_slopes, deterministic) == (0.0, (-1, -1), None, False)
            assert causal, "zigzag ring is meaningless for causal=False"
            local = piece_lengths(cu_seqlens)
            assert cu_seqlens.dtype == torch.int32 and cu_seqlens[-1] == len(q) and max(local) == max_seqlen
            assert all(length % 2 == 0 for length in local)
            self.calls.append("zigzag_ring_flash_attn_varlen_func")
            sequences = torch.repeat_interleave(torch.arange(len(local)), torch.tensor(local))
            batch = (x.unsqueeze(0) for x in (q, k, v))
            out, lse = over_ranks(*batch, softmax_scale, group, lambda rank: zigzag_positions(local, rank, group.size), sequences)
            return (out[0], lse[0], None) if return_attn_probs else out[0]

        return zigzag_ring_flash_attn_varlen_func

    def ulysses(self):
        stand_in = self

        class UlyssesAttention(torch.nn.Module):
            def __init__(self, sequence_process_group=None, scatter_idx=2, gather_idx=1, use_sync=False, attn_type="fa"):
                super().__init__()
                assert (scatter_idx, gather_idx, use_sync, attn_type) == (2, 1, False, "fa")
                self.group = sequence_process_group

            def forward(
                self,
                query,
                key,
                value,
                dropout_p=0.0,
                softmax_scale=None,
                causal=False,
                window_size=(-1, -1),
                softcap=0.0,
                alibi_slopes=None,
                deterministic=False,
                return_attn_probs=False,
                *args,
            ):
                assert (dropout_p, window_size, softcap, alibi_slopes, deterministic, return_attn_probs) == (0.0, (-1, -1), 0.0, None, False, False)
                rows, size = query.shape[1], self.group.size
                assert query.shape[2] % size == key.shape[2] % size == 0, "heads are exchanged whole"
                assert causal, "cpbench measures causal attention"
                stand_in.calls.append("UlyssesAttention")
                return over_ranks(query, key, value, softmax_scale, self.group, lambda rank: torch.arange(rank * rows, (rank + 1) * rows))[0]

        return UlyssesAttention

    def dot_product_attention(self):
        stand_in = self

        class DotProductAttention(torch.nn.Module):
            def __init__(
                self,
                num_attention_heads,
                kv_channels,
                num_gqa_groups=None,
                attention_dropout=0.0,
                qkv_format="sbhd",
                attn_mask_type="causal",
                window_size=None,
                bottom_right_diagonal=None,
                softcap=0.0,
                sequence_parallel=False,
                tp_size=1,
                get_rng_state_tracker=None,
                tp_group=None,
                layer_number=None,
                attention_type="self",
                cp_group=None,
                cp_global_ranks=None,
                cp_stream=None,
                cp_comm_type="p2p",
                softmax_scale=None,
                softmax_type="vanilla",
                return_max_logit=False,
                name=None,
            ):
                super().__init__()
                assert (attention_dropout, softcap, sequence_parallel, tp_size, attention_type) == (0.0, 0.0, False, 1, "self")
                assert cp_comm_type in ("p2p", "all_gather", "a2a") and cp_stream is not None
                assert cp_global_ranks == list(cp_group.ranks)
                self.heads, self.dim, self.kv_heads = num_attention_heads, kv_channels, num_gqa_groups or num_attention_heads
                self.group, self.comm_type, self.scale, self.format, self.mask = cp_group, cp_comm_type, softmax_scale, qkv_format, attn_mask_type

            def forward(
                self,
                query_layer=None,
                key_layer=None,
                value_layer=None,
                attention_mask=None,
                qkv_format=None,
                cu_seqlens_q=None,
                cu_seqlens_kv=None,
                cu_seqlens_q_padded=None,
                cu_seqlens_kv_padded=None,
                max_seqlen_q=None,
                max_seqlen_kv=None,
                attn_mask_type=None,
                window_size=None,
                **unused,
            ):
                assert not unused and attention_mask is None and cu_seqlens_q is None and window_size is None
                assert (qkv_format or self.format, attn_mask_type or self.mask) == ("bshd", "causal")
                assert query_layer.shape[2:] == (self.heads, self.dim) and key_layer.shape[2:] == (self.kv_heads, self.dim) == value_layer.shape[2:]
                assert all(x.is_contiguous() for x in (query_layer, key_layer, value_layer))
                assert self.comm_type != "a2a" or self.kv_heads % self.group.size == 0, "cp_comm_type='a2a' requires num_heads % cp_size == 0"
                stand_in.calls.append(f"DotProductAttention {self.comm_type}")
                rows, group = query_layer.shape[1], self.group
                out, _ = over_ranks(query_layer, key_layer, value_layer, self.scale, group, lambda rank: zigzag_positions([rows], rank, group.size))
                return out.flatten(2)

        return DotProductAttention


def zigzag_positions(local, rank, size):
    """Positions of a rank's rows, sequence after sequence: block `rank` of 2 * size, then the same one counted from the end."""
    found = []
    for length in local:
        half = length // 2
        found += [torch.arange(block * half, (block + 1) * half) for block in (rank, 2 * size - 1 - rank)]
    return torch.cat(found)


def over_ranks(q, k, v, scale, group, positions_of, sequences=None):
    """Attention of this rank's queries [B, S, H, D] to the K and V of all ranks: (out [B, S, H, E], lse [B, H, S])."""
    assert q.dim() == k.dim() == v.dim() == 4 and q.shape[:2] == k.shape[:2] == v.shape[:2]
    assert q.shape[2] % k.shape[2] == 0 and k.shape[2] == v.shape[2] and q.shape[3] == k.shape[3]
    repeat = q.shape[2] // k.shape[2]
    k, v = (torch.cat(gathered(x, group), 1).double().repeat_interleave(repeat, 2) for x in (k, v))
    mine, theirs = positions_of(group.rank), torch.cat([positions_of(rank) for rank in range(group.size)])
    seen = theirs[None, :] <= mine[:, None]
    if sequences is not None:
        seen &= sequences.repeat(group.size)[None, :] == sequences[:, None]
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k) * (q.shape[3] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~seen, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).to(q.dtype), scores.logsumexp(-1).float()


def gathered(x, group):
    """The tensors of all ranks."""
    whole = x.new_empty(group.size * x.shape[0], *x.shape[1:])
    group.all_gather(whole, x.contiguous()).wait()
    return whole.chunk(group.size)
