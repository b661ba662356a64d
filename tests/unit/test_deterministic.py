"""The same bits in every layout: trees, products in blocks of one shape, attention in fixed blocks, and hidden states and logits with all of them."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpbench.against import Job, Runner
from cpbench.answer import solve
from cpbench.cell import Cell
from cpbench.deterministic import COLUMNS, DEPTH, ROWS, TILE, deterministic_reason, run_of
from cpbench.distributed.collectives import Recorder
from cpbench.distributed.deterministic import tree_all_reduce, tree_reduce_scatter, tree_sum
from cpbench.distributed.local import LocalWorld
from cpbench.distributed.mesh import local_groups
from cpbench.kernels import load_kernel
from cpbench.layout import Layout
from cpbench.logprobs import ROUNDINGS, Rule
from cpbench.models.config import ModelConfig
from cpbench.models.held import Models
from cpbench.models.invariant import InvariantWeight, in_blocks, invariant_linear, sum_of_experts
from cpbench.models.presets import PRESETS
from cpbench.numerics import judge, small_cell
from cpbench.one_device import OneDevice
from cpbench.plan import unsupported
from cpbench.program import run_locally

CPU, FIXED = torch.device("cpu"), load_kernel("fixed_blocks")
DTYPES = [torch.float32, torch.bfloat16]


def test_levels_of_the_tree():
    """(0 + 1) + (2 + 3): in fp16, 2048 + 1 is 2048 and 1 + 1 is 2."""
    parts = [torch.tensor([value], dtype=torch.float16) for value in (2048.0, 1.0, 1.0, 1.0)]
    assert tree_sum(parts).item() == 2048 + 2
    assert tree_sum([torch.tensor([value], dtype=torch.float16) for value in (1.0, 1.0, 2048.0, 1.0)]).item() == 2050
    with pytest.raises(ValueError, match="power of two of parts, not 3"):
        tree_sum([torch.zeros(1)] * 3)


@pytest.mark.parametrize("rows", [1, 2, 7, 64])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_sums_over_ranks_are_those_of_the_tree_on_one(size, rows):
    generator = torch.Generator().manual_seed(rows)
    parts = [torch.randn(rows, 3, generator=generator).bfloat16() for _ in range(size)]
    expected = tree_sum([part.clone() for part in parts])
    world, shares = LocalWorld(size, 20), [rows // size + (rank < rows % size) for rank in range(size)]

    def program(rank):
        recorder = Recorder()
        group = world.group("tp", range(size), rank, recorder)
        mine, everywhere = tree_reduce_scatter(group, parts[rank].clone(), shares), parts[rank].clone()
        tree_all_reduce(group, everywhere)
        return mine, everywhere, recorder.traffic.bytes

    results = world.run(program)
    assert torch.equal(torch.cat([mine for mine, _, _ in results]), expected)
    assert all(torch.equal(everywhere, expected) for _, everywhere, _ in results)
    row, sent = 3 * 2, sum(rows - share for share in shares)
    assert sum(received for _, _, received in results) == row * (2 * (size - 1) * rows + sent), "twice a reduce-scatter, and a gather"


@pytest.mark.parametrize(("tiles", "run"), [(1, 1), (2, 2), (3, 3), (4, 2), (8, 2), (24, 3), (28, 7), (76, 19), (96, 3), (100, 25), (148, 37)])
def test_runs_of_tiles(tiles, run):
    assert run_of(tiles) == run


def operands(inputs, outputs, rows, dtype):
    generator = torch.Generator().manual_seed(inputs)
    return torch.randn(rows, inputs, generator=generator).to(dtype), torch.randn(outputs, inputs, generator=generator).to(dtype)


def over_ranks(x, w, tp, multiply):
    part = x.shape[1] // tp
    cuts = [slice(rank * part, (rank + 1) * part) for rank in range(tp)]
    return tree_sum([multiply(x[:, cut].contiguous(), w[:, cut].contiguous()) for cut in cuts])


def invariant(x, w):
    return invariant_linear(x, InvariantWeight(w, is_summed=True))


def plain_tree(x, w):
    """Pairs of tiles, then pairs of these; an odd one waits for the next level."""
    level = [(x[:, k : k + TILE].float() @ w[:, k : k + TILE].float().T).to(x.dtype) for k in range(0, x.shape[1], TILE)]
    while len(level) > 1:
        level = [*(a + b for a, b in zip(level[::2], level[1::2], strict=False)), *(level[-1:] if len(level) % 2 else [])]
    return level[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tiles", [8, 12, 24, 28, 76])
def test_a_product_has_the_same_bits_however_its_inputs_are_cut(tiles, dtype):
    x, w = operands(tiles * TILE, 40, 70, dtype)
    whole = invariant(x, w)
    for tp in (1, 2, 4):
        assert torch.equal(over_ranks(x, w, tp, invariant), whole)
    error = (whole.double() - x.double() @ w.double().T).norm() / whole.double().norm()
    assert error < (1e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("tiles", [12, 24, 28, 76])
def test_a_plain_tree_has_other_bits_where_the_number_of_tiles_has_an_odd_factor(tiles):
    x, w = operands(tiles * TILE, 40, 70, torch.bfloat16)
    assert not torch.equal(over_ranks(x, w, 4, plain_tree), plain_tree(x, w))


def test_inputs_that_are_no_whole_tiles():
    with pytest.raises(ValueError, match="200 inputs are no multiple of the tile of 128"):
        invariant(*operands(200, 4, 2, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_summed", [False, True])
def test_a_product_of_a_row_and_a_column_does_not_depend_on_the_others(dtype, is_summed):
    x, w = operands(DEPTH + TILE, 2 * COLUMNS + 100, 2 * ROWS + 50, dtype)
    whole, threads = invariant_linear(x, InvariantWeight(w, is_summed)), torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            for rows, columns in product([slice(0, 1), slice(5, 8), slice(ROWS - 1, ROWS + 1), slice(1, None)], [slice(0, 1), slice(33, 300), slice(7, None)]):
                assert torch.equal(invariant_linear(x[rows], InvariantWeight(w[columns], is_summed)), whole[rows, columns])
    finally:
        torch.set_num_threads(threads)


@given(rows=st.integers(0, 40), width=st.sampled_from([1, 3, 8, 16, 48, 20000]), first=st.integers(0, 39))
@settings(max_examples=40, deadline=None)
def test_an_elementwise_function_in_blocks(rows, width, first):
    x = torch.linspace(-9, 9, rows * width).view(rows, width)
    whole = in_blocks(torch.sigmoid, x)
    assert whole.shape == x.shape
    torch.testing.assert_close(whole, x.sigmoid())
    assert torch.equal(in_blocks(torch.sigmoid, x[first:].contiguous()), whole[first:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_a_query_does_not_depend_on_other_queries_and_heads(dtype):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, heads, dim, generator=generator).to(dtype) for n, heads, dim in ((300, 6, 48), (700, 2, 48), (700, 2, 32)))
    out, lse = FIXED.block(q, k, v, 0.2, True)
    for first, last, head in [(0, 300, 3), (0, 1, 0), (130, 299, 0), (299, 300, 3)]:
        keys = 700 - 300 + last
        part, part_lse = FIXED.block(q[first:last, head : head + 3], k[:keys, head // 3, None], v[:keys, head // 3, None], 0.2, True)
        assert torch.equal(part, out[first:last, head : head + 3])
        assert torch.equal(part_lse, lse[head : head + 3, first:last])
    expected, expected_lse = load_kernel("reference")._bottom_right(q.double(), k.double(), v.double(), 0.2)
    torch.testing.assert_close(out.double(), expected, atol=1e-6 if dtype == torch.float32 else 2e-2, rtol=1e-2)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_are_added_in_the_tree_of_their_numbers(dtype):
    generator = torch.Generator().manual_seed(1)
    experts, top_k, rows = 16, 5, 30
    chosen = torch.stack([torch.randperm(experts, generator=generator)[:top_k].sort().values for _ in range(rows)])
    values = torch.randn(rows, top_k, 4, generator=generator).to(dtype)
    leaves = torch.zeros(rows, experts, 4, dtype=dtype).scatter_(1, chosen[..., None].expand_as(values), values)
    expected = tree_sum([leaves[:, expert].clone() for expert in range(experts)])
    assert torch.equal(sum_of_experts(values.flatten(0, 1).clone(), chosen, experts), expected)


DENSE = ModelConfig("dense", 256, 2, 8, 4, 64, 1536, 512)
BIASED = ModelConfig("biased", 256, 2, 24, 4, 64, 1536, 512, qkv_bias=True, qk_norm=False)
WIDE_EXPERTS = {
    name: replace(PRESETS[name], heads=16, vocab=512, experts=replace(PRESETS[name].experts, intermediate=256))
    for name in ("deepseek-v2-tiny", "deepseek-v3-tiny")
}
MIXTURES = [replace(PRESETS["qwen3-moe-tiny"], vocab=512), *WIDE_EXPERTS.values()]
ACROSS = [("allgather", "zigzag"), ("allgather", "contiguous"), ("ulysses", "contiguous"), ("ulysses", "zigzag"), ("ulysses-gather", "replicated")]
LENGTHS = (101, 67, 130)


def make(config, layout, strategy="none", partition="contiguous", dtype="float32", **options):
    return Cell("prefill", config, 2, Layout.parse(layout), strategy, partition, "auto", dtype, "cpu", LENGTHS, deterministic=True, **options)


def results_of(cell):
    """Hidden states in the order of tokens, and logits with all columns."""
    assert unsupported(cell) is None
    rows, shards = {}, {}
    for rank, (tokens, output) in enumerate(run_locally(cell, FIXED, CPU)):
        rows |= dict(zip(tokens.tolist(), output.rows, strict=False))
        if output.first:
            shards[cell.layout.coordinates(rank).tp] = output.first.logits_BV
    return torch.stack([rows[token] for token in sorted(rows)]), torch.cat([shards[tp] for tp in sorted(shards)], 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [DENSE, BIASED], ids=lambda config: config.name)
def test_dense_models_have_the_same_bits_in_every_layout(config, dtype):
    rows, logits = results_of(make(config, "cp1", dtype=dtype))
    assert len(rows) == sum(LENGTHS) and len(logits) == len(LENGTHS)
    cells = [make(config, name, dtype=dtype) for name in ("tp2", "tp4", "tp4sp", "pp2tp2")]
    cells += [make(config, name, *way, dtype=dtype) for way in ACROSS for name in ("cp2", "cp4", "cp2tp2sp")]
    for cell in cells:
        got_rows, got_logits = results_of(cell)
        assert torch.equal(got_rows, rows) and torch.equal(got_logits, logits), cell.id


@pytest.mark.parametrize("options", [{"prefixes": (0, 40, 17)}, {"chunk": 48}], ids=["prefixes", "chunks"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_also_behind_cached_tokens_and_in_chunks(dtype, options):
    rows, logits = results_of(make(DENSE, "cp1", dtype=dtype, **options))
    if "chunk" in options:  # nor does it matter that there are chunks
        assert torch.equal(results_of(make(DENSE, "cp1", dtype=dtype))[0], rows)
    for way in [("allgather", "zigzag"), ("ulysses", "contiguous"), ("ulysses-gather", "replicated")]:
        cell = make(DENSE, "cp2tp2", *way, dtype=dtype, **options)
        got_rows, got_logits = results_of(cell)
        assert torch.equal(got_rows, rows) and torch.equal(got_logits, logits), cell.id


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", MIXTURES, ids=lambda config: config.name)
def test_mixtures_of_experts_have_the_same_bits_in_every_layout(config, dtype):
    rows, logits = results_of(make(config, "cp1", dtype=dtype))
    cells = [make(config, name, dtype=dtype) for name in ("tp2/ep2", "tp2/dp2", "tp2sp/ep2", "pp2tp2/ep2")]
    cells += [make(config, name, *way, dtype=dtype) for way in ACROSS for name in ("cp2/ep2", "cp2tp2sp/ep4")]
    for cell in cells:
        got_rows, got_logits = results_of(cell)
        assert torch.equal(got_rows, rows) and torch.equal(got_logits, logits), cell.id


@pytest.mark.parametrize("rounding", list(ROUNDINGS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_log_probabilities_have_the_same_bits_in_every_layout(dtype, rounding):
    config = replace(DENSE, vocab=1000)
    cells = [make(config, name, dtype=dtype) for name in ("cp1", "tp2", "tp4", "tp4sp")]
    cells += [make(config, "cp2tp2", *way, dtype=dtype) for way in [("allgather", "zigzag"), ("ulysses", "contiguous")]]
    one, *others = [Runner(Job(cell), Rule(0.7, rounding)).record().samples for cell in cells]
    assert [len(sample) for sample in one] == [length - 1 for length in LENGTHS]
    assert all(other == one for other in others)


def test_without_it_bits_differ():
    """So that the tests above say something."""
    plain = [replace(make(DENSE, name, dtype="bfloat16"), deterministic=False) for name in ("cp1", "tp4")]
    one, other = (results_of(cell)[0] for cell in plain)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("name", ["tp4", "tp2sp", "cp2tp2"])
@pytest.mark.parametrize("config", [DENSE, *MIXTURES], ids=lambda config: config.name)
def test_answers_and_traffic_are_those_of_the_formulas(config, name):
    layout = name if config.experts is None else f"{name}/ep{Layout.parse(name).world_size}"
    if config is not DENSE and name == "tp4":
        layout = "tp2/ep2"
    cell = make(config, layout, *(("allgather", "zigzag") if "cp" in name else ()))
    world = LocalWorld(cell.world_size, 60)
    answers = world.run(lambda rank: solve(cell, local_groups(cell.layout, world, rank), FIXED, CPU, Models()))[0]
    check = judge(answers, FIXED, OneDevice(CPU))
    assert check.passed, check.reason
    assert check.bitwise_equal


def test_what_is_proved_of_a_wide_model_can_run_where_the_model_can():
    """The narrow one has whole tiles too."""
    seen = 0
    for config, name in product(PRESETS.values(), ["tp2", "tp4", "tp8", "tp16", "tp4/ep4", "tp8sp/ep8", "cp2/ep2"]):
        cell = replace(make(config, name, *(("allgather", "zigzag") if "cp" in name else ())), lengths=(512,), prefixes=(0,))
        if unsupported(cell) is None:
            assert unsupported(small_cell(cell)) is None, cell.id
            seen += 1
    assert seen > 40


@pytest.mark.parametrize(("planted", "reason"), [("rows", "1 of 298 tokens of rank 1 have other bits"), ("logits", "logits have other bits")])
def test_an_answer_with_other_bits_is_wrong(planted, reason):
    cell = make(DENSE, "tp2")
    world = LocalWorld(2, 60)
    *before, answer = world.run(lambda rank: solve(cell, local_groups(cell.layout, world, rank), FIXED, CPU, Models()))[0]
    with torch.inference_mode():
        changed = answer.copies[1] if planted == "rows" else answer.logits
        changed[2, 5] = torch.nextafter(changed[2, 5], torch.tensor(9.0, dtype=changed.dtype))
    check = judge([*before, answer], FIXED, OneDevice(CPU))
    assert not check.passed and reason in check.reason


@pytest.mark.parametrize(
    ("cell", "what", "near"),
    [
        (make(PRESETS["qwen3-tiny"], "tp4"), "256 inputs of o_proj do not cut into tiles of 128 over tp=4", "the nearest valid layout is tp2"),
        (make(replace(DENSE, intermediate=128), "tp2sp"), "128 inputs of down_proj do not cut", "the nearest valid layout is cp1"),
        (make(replace(DENSE, intermediate=192), "cp1"), "192 inputs of down_proj are no multiple of 128", "deterministic=false"),
        (make(replace(DENSE, heads=24, kv_heads=3, intermediate=1536), "tp3"), "tp=3 is no power of two", "the nearest valid layout is cp1"),
        (make(DENSE, "dp2tp2"), "cuts feed-forward blocks over dp too", "the nearest valid layout is tp2"),
        (make(DENSE, "cp2", "ring", "zigzag"), "ring merges parts", "the nearest strategy is allgather"),
        (make(DENSE, "cp2", "allgather", "interleave"), "interleave does not allow", "partition=zigzag"),
        (make(DENSE, "cp2", "allgather", "zigzag", head_groups=2), "head_groups=2 does not allow", "head_groups=1"),
        (make(DENSE, "tp2sp", sp_chunks=2), "not as sp_chunks=2 does", "sp_chunks=1"),
        (make(DENSE, "cp1", quant="fp8"), "quant=fp8", "quant=none"),
        (replace(make(DENSE, "cp1"), kernel="cpu_flash"), "not cpu_flash", "kernel=auto"),
        (make(PRESETS["deepseek-v3-tiny"], "cp1", mla="absorbed"), "makes K and V of latents", "mla=expanded"),
        (make(PRESETS["deepseek-v3.2-tiny"], "cp1"), "select theirs", "deterministic=false"),
        (make(MIXTURES[0], "tp2"), "/tp=2 cuts an expert", "the nearest valid layout is tp2/ep2"),
        (make(MIXTURES[0], "tp2/ep2", dispatch="gather"), "dispatch=gather adds up", "the nearest valid value is dispatch=alltoall"),
        (make(MIXTURES[0].with_experts(12), "cp1"), "12 are no power of two", "experts=8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_why_a_cell_cannot_be_deterministic(cell, what, near):
    reason = deterministic_reason(cell)
    assert what in reason and reason.endswith(near), reason
    assert deterministic_reason(replace(cell, deterministic=False)) is None
    if near.startswith("the nearest valid layout is "):
        nearest = replace(cell, layout=Layout.parse(near.rpartition(" ")[2]))
        assert unsupported(nearest) is None
