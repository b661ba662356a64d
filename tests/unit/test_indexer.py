"""The lightning indexer against Hugging Face's, and which keys are selected: by brute force, over tiles, ties and context-parallel ranks."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpbench.kernels.selection import select
from cpbench.measure.memory import LiveTensors
from cpbench.models.config import Indexer, LatentAttention, ModelConfig
from cpbench.models.indexer import LightningIndexer
from cpbench.models.weights import RandomWeights
from cpbench.partition import PARTITIONS, Block, split
from cpbench.segments import Span, place
from cpbench.visible import Tile, Visible, visible_keys

CPU = torch.device("cpu")


def config():
    """With enough heads that none but planted scores are equal: of few heads all products may be negative, and the score 0."""
    latent = LatentAttention(kv_rank=32, rope_dim=8, nope_dim=16, v_dim=16, q_rank=48)
    return ModelConfig("sparse", 64, 1, 4, 4, 24, 64, 64, latent=latent, indexer=Indexer(16, 32, 8))


class GivenWeights:
    def __init__(self, state):
        self.linear = self.norm = self.bias = lambda name, shape: self._checked(state[name], shape)

    @staticmethod
    def _checked(value, shape):
        assert tuple(value.shape) == (shape if isinstance(shape, tuple) else (shape,))
        return value.detach()


def brute_force(q, gates, keys, seen, top_k):
    """The positions that one query selects among its first `seen` keys: by score, then by position."""
    scores = torch.einsum("h,hs->s", gates, (q @ keys[:seen].T).relu()).tolist()
    return sorted(sorted(range(seen), key=lambda j: (-scores[j], j))[:top_k])


def whole_numbers(*shape, generator):
    """Small enough that every score is exact in fp32, whatever the order of its sums, and that many are equal."""
    return torch.randint(-2, 3, shape, generator=generator).float()


@torch.no_grad()
def test_queries_keys_gates_and_selection_are_those_of_transformers():
    hf = pytest.importorskip("transformers.models.deepseek_v32.modeling_deepseek_v32")
    hf_config = hf.DeepseekV32Config(
        hidden_size=64, q_lora_rank=48, qk_rope_head_dim=8, head_dim=8, index_n_heads=16, index_head_dim=32, index_topk=8, num_hidden_layers=1
    )
    hf_config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 40.0, "original_max_position_embeddings": 4096}
    torch.manual_seed(0)
    oracle = hf.DeepseekV32Indexer(hf_config, 0)
    for parameter in oracle.parameters():
        parameter.normal_()
    ours = LightningIndexer(config(), GivenWeights({f"p.{name}": value for name, value in oracle.named_parameters()}), "p")
    n = 60
    x, c_q = torch.randn(n, 64), torch.randn(n, 48)
    cos, sin = hf.DeepseekV32RotaryEmbedding(hf_config)(x[None], torch.arange(n)[None])
    causal = torch.full((n, n), -torch.inf).triu(1)[None]
    theirs = oracle(x[None], c_q[None], (cos, sin), causal, None)[0]

    half = [part[0, :, None, :4] for part in (cos, sin)]
    k, gates = (projection(x) for projection in ours.projections)
    q, gates = ours.queries(c_q, gates, *half)
    k = ours.keys(k, *half)
    assert q.shape == (n, 16, 32) and gates.shape == (n, 16) and k.shape == (n, 32)
    ids = select(q, gates, k, [Visible(Span(0, n), Span(0, n), 1)], 8)
    for i in range(n):
        assert set(ids[i].tolist()) - {-1} == set(theirs[i].tolist()) & set(range(i + 1)), f"query {i}"


def test_the_weights_of_bf16_keys_are_normalised_in_fp32():
    torch.manual_seed(0)
    ours = LightningIndexer(config(), RandomWeights(0, torch.bfloat16, CPU), "p")
    x = torch.randn(100, 64, dtype=torch.bfloat16)
    none = torch.ones(100, 1, 4), torch.zeros(100, 1, 4)
    k = x.float() @ ours.k_weight.float().T
    normed = (k - k.mean(1, keepdim=True)) / (k.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    expected = normed * ours.k_norm.float() + ours.k_bias.float()
    got = ours.keys(ours.projections[0](x), *none)
    assert got.dtype == torch.bfloat16
    assert ((got - expected).square().mean() / expected.square().mean()).sqrt() < 4e-3
    assert ours.queries(torch.randn(100, 48, dtype=torch.bfloat16), ours.projections[1](x), *none)[1].dtype == torch.float32


def test_only_the_first_values_of_a_head_are_rotated():
    ours = LightningIndexer(config(), RandomWeights(0, torch.float32, CPU), "p")
    x = torch.randn(5, 64)
    still, quarter = (torch.ones(5, 1, 4), torch.zeros(5, 1, 4)), (torch.zeros(5, 1, 4), torch.ones(5, 1, 4))
    plain, turned = (ours.keys(ours.projections[0](x), *angles) for angles in (still, quarter))
    assert torch.equal(turned[:, 8:], plain[:, 8:])
    assert torch.equal(turned[:, :4], -plain[:, 4:8]) and torch.equal(turned[:, 4:8], plain[:, :4])


def test_a_model_without_an_indexer_is_refused():
    with pytest.raises(ValueError, match="no indexer"):
        LightningIndexer(ModelConfig("dense", 64, 1, 4, 4, 16, 64, 64), RandomWeights(0, torch.float32, CPU), "p")


@pytest.mark.parametrize("tile", [None, Tile(1, 1), Tile(3, 7), Tile(64, 16)])
def test_ties_go_to_the_lowest_position_and_tiles_change_nothing(tile):
    generator = torch.Generator().manual_seed(0)
    n, heads, dim, top_k = 90, 3, 16, 11
    q, gates, keys = (whole_numbers(*shape, generator=generator) for shape in ((n, heads, dim), (n, heads), (n, dim)))
    keys[20:40] = keys[3]
    ids = select(q, gates, keys, [Visible(Span(0, n), Span(0, n), 1)], top_k, tile=tile)
    assert ids.dtype == torch.int32
    tied = 0
    for i in range(n):
        expected = brute_force(q[i], gates[i], keys, i + 1, top_k)
        tied += expected != brute_force(q[i], gates[i], keys, i + 1, top_k + 1)[: len(expected)]
        assert ids[i].tolist() == expected + [-1] * (top_k - len(expected)), f"query {i}"
    assert tied > 20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_of_real_sizes_select_the_same_bits(dtype):
    torch.manual_seed(0)
    n = 700
    q, gates, keys = torch.randn(n, 64, 128).to(dtype), torch.randn(n, 64), torch.randn(n, 128).to(dtype)
    keys[100:200] = keys[:100]
    block = [Visible(Span(0, n), Span(0, n), 1)]
    reference = select(q, gates, keys, block, 64)
    for tile in (Tile(16, 512), Tile(64, 1024), Tile(8, 64)):
        assert torch.equal(select(q, gates, keys, block, 64, tile=tile), reference)
    exact = torch.einsum("nh,nhs->ns", gates.double(), (q.double() @ keys.double().T).relu())
    for i in (64, 300, 699):
        best = exact[i, : i + 1].topk(65).values
        chosen = exact[i, reference[i].long()]
        assert chosen.min() >= best[63] - 1e-4 and len(set(reference[i].tolist())) == 64


def test_keys_behind_a_query_are_never_read():
    torch.manual_seed(0)
    q, gates, keys = torch.randn(40, 2, 16), torch.randn(40, 2), torch.randn(200, 16)
    expected = select(q, gates, keys, [Visible(Span(0, 40), Span(0, 140), 101)], 9)
    keys[140:] = torch.nan
    assert torch.equal(select(q, gates, keys, [Visible(Span(0, 40), Span(0, 200), 101)], 9), expected)
    keys[101:140] = torch.inf
    assert torch.equal(select(q[:1], gates[:1], keys, [Visible(Span(0, 1), Span(0, 200), 101)], 9), expected[:1])


def test_a_query_that_sees_few_keys_gets_all_of_them_and_a_row_of_no_block_none():
    q, gates, keys = torch.randn(6, 2, 16), torch.randn(6, 2), torch.randn(50, 16)
    ids = select(q, gates, keys, [Visible(Span(1, 5), Span(10, 30), 2, step=3)], 8)
    assert ids[[0, 5]].tolist() == [[-1] * 8] * 2
    assert ids[1].tolist() == [10, 11, -1, -1, -1, -1, -1, -1] and ids[3].tolist() == [*range(10, 18)]
    assert ids[4].tolist() != ids[3].tolist() and ids[4].min() >= 10 and ids[4].max() < 21


@pytest.mark.parametrize("block", [Visible(Span(0, 4), Span(0, 10), 8), Visible(Span(0, 4), Span(0, 10), 0), Visible(Span(0, 2), Span(0, 4), 1, 4)])
def test_a_block_that_sees_more_keys_than_it_has_is_refused(block):
    with pytest.raises(ValueError, match=re.escape("does not see between 1 and")):
        select(torch.randn(4, 2, 16), torch.randn(4, 2), torch.randn(10, 16), [block], 2)


batches = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30)), min_size=1, max_size=3)


@given(st.sampled_from(sorted(PARTITIONS)), batches, st.integers(1, 4), st.integers(1, 12), st.booleans(), st.integers(0, 999))
def test_context_parallel_ranks_select_what_one_device_selects(partition, batch, cp, top_k, exact, seed):
    lengths, prefixes = [new for new, _ in batch], [cached for _, cached in batch]
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    shapes = (total, 2, 16), (total, 2), (total + sum(prefixes) + 3, 16)
    make = whole_numbers if exact else torch.randn
    q, gates, keys = (make(*shape, generator=generator) for shape in shapes)
    spans, row = {}, 3
    for sequence, (new, cached) in enumerate(batch):
        spans[sequence] = Span(row, row + new + cached)
        row += new + cached
    whole = split("contiguous", lengths, 1, prefixes)
    expected = select(q, gates, keys, visible_keys(place(whole.ranks[0]), spans), top_k)
    cut = split(partition, lengths, cp, prefixes)
    for rank in range(cp):
        tokens = torch.tensor([token for part in cut.tokens(rank) for token in part])
        ids = select(q[tokens], gates[tokens], keys, visible_keys(place(cut.ranks[rank]), spans), top_k)
        assert torch.equal(ids, expected[tokens])


def test_blocks_see_what_lies_before_them():
    blocks = [(Block(0, 4, 6), 0), (Block(1, 30, 41, 4), 2)]
    assert visible_keys(blocks, {0: Span(0, 9), 1: Span(9, 60)}) == (
        Visible(Span(0, 2), Span(0, 9), 5, 1),
        Visible(Span(2, 5), Span(9, 60), 31, 4),
    )


def test_memory_grows_with_the_keys_and_not_with_their_square():
    def peak(tokens):
        q, gates, keys = torch.randn(tokens, 1, 8), torch.randn(tokens, 1), torch.randn(tokens, 8)
        tracker = LiveTensors(CPU, lambda: [("given", q), ("given", gates), ("given", keys)])
        with tracker:
            select(q, gates, keys, [Visible(Span(0, tokens), Span(0, tokens), 1)], 32, tile=Tile(256, 2048))
        return tracker.peak

    peaks = [peak(tokens) for tokens in (4096, 8192, 16384)]
    growth = (peaks[2] - peaks[1]) / (peaks[1] - peaks[0])
    assert 1.9 < growth < 2.1, peaks  # twice the tokens: quadratic growth would be 4
