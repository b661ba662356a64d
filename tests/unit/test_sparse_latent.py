"""Attention to selected latent rows: against dense attention, against a mask over all rows, and against Hugging Face's DeepSeek V3.2."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpbench.kernels.selection import select
from cpbench.kernels.sparse_latent import attend_selected
from cpbench.measure.memory import LiveTensors
from cpbench.models.config import Indexer, LatentAttention, ModelConfig
from cpbench.models.indexer import LightningIndexer
from cpbench.models.latent import absorb_queries, release_outputs
from cpbench.models.rope import rotate_neighbours
from cpbench.partition import split
from cpbench.segments import Span, place
from cpbench.visible import Visible, visible_keys

CPU = torch.device("cpu")
RANK, WIDTH, SCALE = 24, 32, 0.17
LIMITS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 8e-3}


def relative_rmse(got, expected):
    return ((got.double() - expected.double()).square().mean() / expected.double().square().mean()).sqrt().item()


def masked(q, rows, chosen):
    """Softmax attention in fp64 of queries [n, H, W] to the rows that `chosen` [n, S] marks: (out [n, H, R], lse [H, n])."""
    scores = torch.einsum("nhw,sw->nhs", q.double(), rows.double()) * SCALE
    scores = scores.masked_fill(~chosen[:, None], -torch.inf)
    return scores.softmax(-1) @ rows.double()[:, :RANK], scores.logsumexp(-1).T


def random_ids(n, first, top_k, step=1):
    """Selections as `select` makes them: [n, top_k], ascending, of the keys that each query sees."""
    ids = torch.full((n, top_k), -1, dtype=torch.int32)
    for i in range(n):
        seen = first + i * step
        size = min(seen, top_k)
        ids[i, :size] = torch.randperm(seen)[:size].sort().values.int()
    return ids


def marked(ids, keys):
    chosen = torch.zeros(ids.shape[0], keys + 1, dtype=torch.bool)
    return chosen.scatter(1, ids.long().where(ids >= 0, keys), True)[:, :keys]


@pytest.mark.parametrize("tile_bytes", [None, 1, 20_000])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("top_k", [100, 64, 16])
def test_where_all_keys_may_be_selected_it_is_dense_attention_and_elsewhere_a_mask(dtype, top_k, tile_bytes):
    torch.manual_seed(0)
    n = 64
    q, rows = torch.randn(n, 3, WIDTH).to(dtype), torch.randn(n, WIDTH).to(dtype)
    blocks = [Visible(Span(0, n), Span(0, n), 1)]
    ids = random_ids(n, 1, top_k)
    out, lse = attend_selected(q, rows, ids, blocks, SCALE, RANK, tile_bytes=tile_bytes)
    causal = torch.ones(n, n, dtype=torch.bool).tril()
    expected, expected_lse = masked(q, rows, causal if top_k >= n else marked(ids, n))
    assert out.dtype == dtype and lse.dtype == torch.promote_types(dtype, torch.float32)
    assert relative_rmse(out, expected) < LIMITS[dtype]
    assert relative_rmse(lse, expected_lse) < min(LIMITS[dtype], 1e-6)
    if top_k < n:
        assert relative_rmse(out, masked(q, rows, causal)[0]) > 0.05


def test_large_scores_do_not_overflow():
    torch.manual_seed(0)
    q, rows = 100 * torch.randn(30, 2, WIDTH), torch.randn(30, WIDTH)
    ids = random_ids(30, 1, 8)
    out, lse = attend_selected(q, rows, ids, [Visible(Span(0, 30), Span(0, 30), 1)], SCALE, RANK)
    expected, expected_lse = masked(q, rows, marked(ids, 30))
    assert lse.max() > 100
    assert relative_rmse(out, expected) < 1e-4 and relative_rmse(lse, expected_lse) < 1e-6


def test_rows_of_no_block_are_zero():
    out, lse = attend_selected(torch.randn(4, 2, WIDTH), torch.randn(9, WIDTH), random_ids(4, 5, 3), [Visible(Span(1, 3), Span(0, 9), 5)], SCALE, RANK)
    assert out[[0, 3]].abs().max() == 0 and out[1:3].abs().min() > 0
    assert lse[:, [0, 3]].eq(-torch.inf).all() and lse[:, 1:3].isfinite().all()


def test_a_block_that_sees_more_rows_than_it_has_is_refused():
    with pytest.raises(ValueError, match="does not see"):
        attend_selected(torch.randn(4, 2, WIDTH), torch.randn(9, WIDTH), random_ids(4, 7, 3), [Visible(Span(0, 4), Span(0, 9), 7)], SCALE, RANK)


batches = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 20)), min_size=1, max_size=3)


@given(st.sampled_from(["zigzag", "interleave"]), batches, st.integers(1, 4), st.integers(1, 12), st.integers(0, 999))
def test_context_parallel_ranks_together_answer_as_one_device(partition, batch, cp, top_k, seed):
    lengths, prefixes = [new for new, _ in batch], [cached for _, cached in batch]
    torch.manual_seed(seed)
    n, keys = sum(lengths), sum(lengths) + sum(prefixes)
    q_i, gates, k_i = torch.randn(n, 2, 16), torch.randn(n, 2), torch.randn(keys, 16)
    q, rows = torch.randn(n, 2, WIDTH), torch.randn(keys, WIDTH)
    spans, row = {}, 0
    for sequence, (new, cached) in enumerate(batch):
        spans[sequence] = Span(row, row + new + cached)
        row += new + cached
    one_device = visible_keys(place(split("contiguous", lengths, 1, prefixes).ranks[0]), spans)
    whole_ids = select(q_i, gates, k_i, one_device, top_k)
    expected, expected_lse = masked(q, rows, marked(whole_ids, keys))
    cut = split(partition, lengths, cp, prefixes)
    for rank in range(cp):
        tokens = torch.tensor([token for part in cut.tokens(rank) for token in part])
        blocks = visible_keys(place(cut.ranks[rank]), spans)
        ids = select(q_i[tokens], gates[tokens], k_i, blocks, top_k)
        out, lse = attend_selected(q[tokens], rows, ids, blocks, SCALE, RANK, tile_bytes=5000)
        assert relative_rmse(out, expected[tokens]) < 1e-6
        assert torch.allclose(lse.double(), expected_lse[:, tokens], atol=1e-5)


@torch.no_grad()
def test_the_attention_of_deepseek_v32_in_transformers():
    hf = pytest.importorskip("transformers.models.deepseek_v32.modeling_deepseek_v32")
    sizes = LatentAttention(kv_rank=32, rope_dim=8, nope_dim=16, v_dim=20, q_rank=48)
    config = ModelConfig("sparse", 64, 1, 4, 4, 24, 64, 64, latent=sizes, indexer=Indexer(16, 32, 8))
    hf_config = hf.DeepseekV32Config(
        hidden_size=64, num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=1, q_lora_rank=48, kv_lora_rank=32, qk_rope_head_dim=8,
        head_dim=8, qk_nope_head_dim=16, v_head_dim=20, index_n_heads=16, index_head_dim=32, index_topk=8, attn_implementation="eager",
    )  # fmt: skip
    hf_config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 4096, "mscale_all_dim": 1.0}
    torch.manual_seed(0)
    oracle = hf.DeepseekV32Attention(hf_config, 0)
    for parameter in oracle.parameters():
        parameter.normal_(std=0.3)
    n = 50
    x = torch.randn(n, 64)
    cos, sin = hf.DeepseekV32RotaryEmbedding(hf_config)(x[None], torch.arange(n)[None])
    causal = torch.full((1, 1, n, n), torch.finfo(torch.float32).min).triu(1)
    expected = oracle(x[None], (cos, sin), causal)[0][0]

    half = [part[0, :, None, :4] for part in (cos, sin)]
    state = dict(oracle.named_parameters())
    weights = type("Given", (), {name: staticmethod(lambda name, shape: state[name].detach()) for name in ("linear", "norm", "bias")})
    indexer = LightningIndexer(config, weights, "indexer")
    c_q = oracle.q_a_layernorm(oracle.q_a_proj(x))
    q = oracle.q_b_proj(c_q).view(n, 4, 24)
    latent = oracle.kv_a_proj_with_mqa(x)
    rows = torch.cat([oracle.kv_a_layernorm(latent[:, :32]), latent[:, 32:]], 1)
    for part in (q[..., 16:], rows[:, None, 32:]):
        rotate_neighbours(part.clone(), *half, part)
    kv_b = oracle.kv_b_proj.weight.view(4, 36, 32)
    blocks = [Visible(Span(0, n), Span(0, n), 1)]
    k, gates = (projection(x) for projection in indexer.projections)
    ids = select(*indexer.queries(c_q, gates, *half), indexer.keys(k, *half), blocks, 8)
    out, _ = attend_selected(absorb_queries(q, kv_b, sizes), rows, ids, blocks, oracle.scaling, 32)
    answer = release_outputs(out, kv_b, sizes).flatten(1) @ oracle.o_proj.weight.T
    assert relative_rmse(answer, expected) < 2e-6


def test_memory_grows_with_the_rows_and_not_with_their_square():
    def peak(tokens):
        q, rows = torch.randn(tokens, 1, WIDTH), torch.randn(tokens, WIDTH)
        ids = torch.arange(16, dtype=torch.int32).repeat(tokens, 1)
        tracker = LiveTensors(CPU, lambda: [("given", q), ("given", rows), ("given", ids)])
        with tracker:
            attend_selected(q, rows, ids, [Visible(Span(0, tokens), Span(0, tokens), 1)], SCALE, RANK, tile_bytes=1 << 20)
        return tracker.peak

    peaks = [peak(tokens) for tokens in (4096, 8192, 16384)]
    growth = (peaks[2] - peaks[1]) / (peaks[1] - peaks[0])
    assert 1.9 < growth < 2.1, peaks  # twice the tokens: quadratic growth would be 4
