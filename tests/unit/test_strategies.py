"""Every registered strategy on the local backend: against one device in fp64, traffic and peak memory against their formulas.

A new strategy is picked up by the registry; nothing here names one except where its own rules are tested.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpbench.cell import Cell
from cpbench.distributed.local import LocalWorld
from cpbench.distributed.mesh import local_groups
from cpbench.formulas import live_bytes, score_pairs, traffic
from cpbench.kernels import load_kernel
from cpbench.layout import Layout
from cpbench.measure.memory import LiveTensors, OneBlock
from cpbench.models.config import ModelConfig
from cpbench.models.presets import load_config
from cpbench.program import Program, run_locally
from cpbench.strategies import STRATEGIES
from cpbench.strategies.ulysses import head_shards

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def one_thread_per_rank():
    """Ranks are threads here: more threads for each only contend."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


PARALLEL = [name for name, strategy in STRATEGIES.items() if name != "none" and not strategy.brings_collectives]
RANDOM_BATCHES = 300
COMBINATIONS = [(name, partition) for name in PARALLEL for partition in STRATEGIES[name].partitions]
HEADS = [(8, 8), (8, 2), (24, 4), (24, 8), (24, 24)]
TINY = load_config("qwen3-tiny")


def make(
    strategy="none", partition="contiguous", lengths=(64,), config=TINY, target="attention", dtype="float32", layers=1, prefixes=(), options=None, **sizes
):
    layout = Layout(ulysses=default_ulysses(strategy, sizes), **sizes)
    cell = Cell(target, config, layers, layout, strategy, partition, "auto", dtype, "cpu", tuple(lengths), prefixes=tuple(prefixes))
    return replace(cell, **(options or {}))


def default_ulysses(strategy, sizes):
    """A hybrid of two neighbours wherever the group can be cut."""
    return 2 if strategy == "usp" and sizes.get("cp", 1) % 2 == 0 else 1


def assembled(cell, kernel="cpu_flash"):
    """The rows of all ranks in packed order; heads of tensor-parallel ranks side by side for attention."""
    outputs = run_locally(cell, load_kernel(kernel), CPU)
    columns = []
    for tp in range(cell.layout.tp if cell.target == "attention" else 1):
        rows = None
        for rank, (tokens, output) in enumerate(outputs):
            if cell.layout.coordinates(rank).tp == tp:
                flat = output.rows.flatten(1)
                rows = flat.new_empty(cell.tokens, flat.shape[1]) if rows is None else rows
                rows[tokens] = flat
        columns.append(rows)
    return torch.cat(columns, 1), outputs[0][1]


def truth(cell):
    single = make(lengths=cell.lengths, config=cell.config, target=cell.target, dtype="float64", layers=cell.layers, prefixes=cell.prefixes)
    return run_locally(single, load_kernel("reference"), CPU, getattr(torch, cell.dtype))[0][1]


def error(rows, expected):
    return float((rows.double() - expected.flatten(1)).norm() / expected.norm())


@st.composite
def batches(draw):
    """A degree, and a batch of uneven lengths with prefixes, whole or in chunks; a short sequence may switch context parallelism off."""
    cp = draw(st.sampled_from([2, 3, 4, 8]))
    lengths = st.integers(1, 299) if draw(st.integers(0, 3)) == 0 else st.integers(2 * cp, 299)
    sequences = draw(st.lists(st.tuples(lengths, st.just(0) | st.integers(0, 299)), min_size=1, max_size=4))
    options = {"chunk": draw(st.none() | st.integers(2 * cp, 150)), "page_size": draw(st.none() | st.sampled_from([1, 16]))}
    return cp, tuple(length for length, _ in sequences), tuple(prefix for _, prefix in sequences), options


@pytest.mark.timeout(1200)  # most of a minute on two cores
@given(st.sampled_from(COMBINATIONS), batches(), st.sampled_from(HEADS), st.data())
@settings(max_examples=RANDOM_BATCHES, deadline=None)
def test_any_batch_gives_the_answer_of_one_device_and_moves_what_the_formula_says(combination, batch, heads, data):
    (name, partition), (cp, lengths, prefixes, options) = combination, batch
    config = ModelConfig("test", 64, 1, heads[0], heads[1], 16, 64, 64)
    if name == "allgather":
        options = {**options, "head_groups": data.draw(st.sampled_from([1, 2]))}
    cell = make(name, partition, lengths, config, prefixes=prefixes, options=options, cp=cp)
    if name == "usp":
        degree = data.draw(st.sampled_from([u for u in range(1, cp + 1) if cp % u == 0]))
        cell = replace(cell, layout=Layout(cp=cp, ulysses=degree))
    if STRATEGIES[name].check(cell) is not None:
        return
    world = LocalWorld(cell.world_size)

    def program(rank):
        groups = local_groups(cell.layout, world, rank)
        program = Program(cell, groups, load_kernel("cpu_flash"), CPU)
        program.keeps_rows = True
        output = program.run()
        assert groups.recorder.reset() == traffic(cell, rank)
        return program.tokens, output.rows.flatten(1)

    rows = torch.empty(cell.tokens, heads[0] * 16)
    for tokens, mine in world.run(program):
        rows[tokens] = mine
    assert error(rows, truth(cell).rows) < 1e-6


@pytest.mark.parametrize(("name", "partition"), COMBINATIONS)
def test_three_sequences_with_prefixes_on_four_ranks_are_the_dense_answer_to_the_last_digits_of_fp64(name, partition):
    cell = make(name, partition, (41, 8, 130), prefixes=(7, 90, 0), dtype="float64", cp=4)
    assert error(assembled(cell, "reference")[0], truth(cell).rows) < 1e-14


@pytest.mark.parametrize("heads", [(8, 8), (8, 2)])
def test_slicing_heads_and_gathering_them_is_full_attention_bit_for_bit(heads):
    """Where nothing is merged, each head is computed on its own, whatever the number of heads on a rank; kv heads may be fewer than ranks."""
    config = ModelConfig("test", 64, 1, *heads, 64, 64, 64)
    sliced = make("ulysses-gather", "replicated", (300, 77), config, cp=4)
    whole = make(lengths=sliced.lengths, config=config)
    assert torch.equal(assembled(sliced)[0], assembled(whole)[0])


@pytest.mark.parametrize(("name", "partition"), [("ulysses", "contiguous"), ("ulysses", "zigzag"), ("ulysses-gather", "replicated")])
def test_a_packed_batch_is_its_sequences_one_by_one_bit_for_bit(name, partition):
    """Inputs are functions of the place in the batch: the first sequence alone is the beginning of the packed batch."""
    config = ModelConfig("test", 64, 1, 8, 2, 64, 64, 64)
    packed = assembled(make(name, partition, (300, 77), config, cp=4))[0]
    first = assembled(make(name, partition, (300,), config, cp=4))[0]
    assert torch.equal(packed[:300], first)


@pytest.mark.parametrize("sizes", [{"cp": 4}, {"cp": 2, "tp": 2}, {"cp": 4, "tp": 2}, {"tp": 4}, {"tp": 8}], ids=str)
@pytest.mark.parametrize(("name", "partition"), COMBINATIONS)
@pytest.mark.parametrize("target", ["layer", "prefill"])
def test_every_layout_of_the_model_gives_the_same_answer(name, partition, sizes, target):
    """Three sequences with prefixes, in chunks."""
    if "cp" not in sizes:
        name, partition = "none", "contiguous"
    cell = make(name, partition, (75, 33, 8), target=target, layers=2, prefixes=(10, 0, 40), options={"chunk": 30}, **sizes)
    if STRATEGIES[name].check(cell):
        pytest.skip(STRATEGIES[name].check(cell))
    rows, output = assembled(cell)
    expected = truth(cell)
    assert error(rows, expected.rows) < 5e-6
    if target == "prefill":
        assert output.first.tokens == expected.first.tokens
        assert output.first.margins == pytest.approx(expected.first.margins, abs=1e-4)


@pytest.mark.parametrize(("name", "partition"), COMBINATIONS)
def test_bf16_at_eight_ranks_stays_within_1_25_of_one_device(name, partition):
    cell = make(name, partition, (512,), dtype="bfloat16", cp=8)
    single = make(lengths=(512,), dtype="bfloat16")
    expected = truth(cell).rows
    assert error(assembled(cell)[0], expected) <= 1.25 * error(assembled(single)[0], expected)


KEPT = [
    ("float32", {}, False),
    ("bfloat16", {"kv_cache": "drop"}, False),
    ("bfloat16", {}, True),
    ("float32", {"kv_cache": "drop"}, True),
    ("float32", {"chunk": 6000}, True),
    ("bfloat16", {"chunk": 6000, "cache_tokens": 40000}, False),
]


@pytest.mark.parametrize(("name", "partition"), COMBINATIONS)
@pytest.mark.parametrize(("dtype", "options", "prefix"), KEPT)
def test_peak_of_live_tensors_of_attention_is_the_closed_form(name, partition, dtype, options, prefix):
    """cp=8, every rank: within 5%, which is the small block of the memory pass, norm statistics, and index tensors."""
    if partition == "interleave" and "chunk" in options:
        pytest.skip("many short calls: the small blocks of the memory pass are more than that")
    hold_against_the_closed_form(make(name, partition, (16384,), TINY, "attention", dtype, 1, (8192,) if prefix else (), options, cp=8))


@pytest.mark.parametrize("name", PARALLEL)
@pytest.mark.parametrize(("target", "kept"), [("layer", KEPT[0]), ("layer", KEPT[-1]), ("prefill", KEPT[0])])
def test_peak_of_live_tensors_of_a_decoder_is_the_closed_form(name, target, kept):
    dtype, options, _ = kept
    layers = 2 if target == "prefill" else 1
    hold_against_the_closed_form(make(name, STRATEGIES[name].partitions[0], (8192,), replace(TINY, vocab=512), target, dtype, layers, (), options, cp=4))


def hold_against_the_closed_form(cell):
    """Chunks: 7%, because buffers of different steps need not be largest together."""
    world = LocalWorld(cell.world_size)

    def program(rank):
        program = Program(cell, local_groups(cell.layout, world, rank), OneBlock(load_kernel("cpu_flash")), CPU)
        program.prepare()
        program.run()  # buffers grow from chunk to chunk in the first pass, and in no other
        tracker = LiveTensors(CPU, program.tensors)
        with tracker:
            program.run()
        return tracker.peak, tracker.by_category

    for rank, (peak, categories) in enumerate(world.run(program)):
        assert peak == pytest.approx(live_bytes(cell, rank), rel=0.07 if cell.chunk else 0.05), (rank, categories)
        assert sum(categories.values()) == peak


def test_score_pairs_add_up_to_the_causal_triangle_of_all_heads():
    for (name, partition), cp, tp in itertools.product(COMBINATIONS, (2, 4), (1, 2)):
        cell = make(name, partition, (100, 64), prefixes=(30, 0), options={"chunk": 40}, cp=cp, tp=tp)
        total = sum(score_pairs(cell, rank) for rank in range(cell.world_size))
        assert total == TINY.heads * (30 * 100 + sum(n * (n + 1) // 2 for n in cell.lengths)), (name, partition)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "degree", "expected"),
    [
        (8, 2, 8, [(0,), (0,), (0,), (0,), (1,), (1,), (1,), (1,)]),
        (8, 2, 2, [(0,), (1,)]),
        (8, 8, 2, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        (12, 4, 6, [(0, 0), (0, 1), (1, 1), (2, 2), (2, 3), (3, 3)]),
    ],
)
def test_ulysses_sends_each_rank_the_kv_heads_of_its_query_heads(heads, kv_heads, degree, expected):
    shards = head_shards(heads, kv_heads, degree)
    assert list(shards.kv_sources) == expected
    for rank, sources in enumerate(shards.kv_sources):
        for local in range(shards.q_heads):
            kv = sources[local * shards.kv_heads // shards.q_heads]
            assert kv == (rank * shards.q_heads + local) * kv_heads // heads


def test_impossible_cells_say_the_nearest_possible_one():
    assert "cp=4" in STRATEGIES["ulysses"].check(make("ulysses", cp=3, lengths=(64,))) or "cp=2" in STRATEGIES["ulysses"].check(make("ulysses", cp=3))
    assert "cp=2" in STRATEGIES["ulysses-gather"].check(make("ulysses-gather", "replicated", cp=3))
    assert "use zigzag" in STRATEGIES["ring"].check(make("ring", "spiral", cp=2))
    assert STRATEGIES["ring"].check(make("ring", "zigzag", (10,), cp=8)) is None, "a short batch runs without context parallelism"
    assert "use usp" in STRATEGIES["ring"].check(replace(make("ring", "zigzag"), layout=Layout(cp=4, ulysses=2)))
    assert "u=2" in STRATEGIES["usp"].check(replace(make("usp", "zigzag", config=replace(TINY, heads=2, kv_heads=2)), layout=Layout(cp=6, ulysses=3)))
    assert "head_groups=2" in STRATEGIES["allgather"].check(make("allgather", "zigzag", options={"head_groups": 3}, cp=2))
    assert "cp1" in STRATEGIES["none"].check(make("none", cp=2))
