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
from cpbench.distributed.collectives import LocalWorld
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
PARALLEL = [name for name in STRATEGIES if name != "none"]
COMBINATIONS = [(name, partition) for name in PARALLEL for partition in STRATEGIES[name].partitions]
TINY = load_config("qwen3-tiny")


def make(strategy="none", partition="contiguous", lengths=(64,), config=TINY, target="attention", dtype="float32", layers=1, **sizes):
    return Cell(target, config, layers, Layout(**sizes), strategy, partition, "auto", dtype, "cpu", tuple(lengths))


def assembled(cell, kernel="cpu_flash"):
    """The rows of all ranks in packed order; heads of tensor-parallel ranks side by side for attention."""
    outputs = run_locally(cell, load_kernel(kernel), CPU)
    columns = []
    for tp in range(cell.layout.tp if cell.target == "attention" else 1):
        rows = None
        for rank, (tokens, output) in enumerate(outputs):
            if cell.layout.coordinates(rank)["tp"] == tp:
                flat = output.rows.flatten(1)
                rows = flat.new_empty(cell.tokens, flat.shape[1]) if rows is None else rows
                rows[tokens] = flat
        columns.append(rows)
    return torch.cat(columns, 1), outputs[0][1]


def truth(cell):
    single = make(lengths=cell.lengths, config=cell.config, target=cell.target, dtype="float64", layers=cell.layers)
    return run_locally(single, load_kernel("reference"), CPU, getattr(torch, cell.dtype))[0][1]


def error(rows, expected):
    return float((rows.double() - expected.flatten(1)).norm() / expected.norm())


@given(
    st.sampled_from(COMBINATIONS),
    st.sampled_from([2, 3, 4, 8]).flatmap(lambda cp: st.tuples(st.just(cp), st.lists(st.integers(2 * cp, 120), min_size=1, max_size=3))),
    st.sampled_from([(8, 8), (8, 2), (24, 4), (24, 8), (24, 24)]),
)
@settings(max_examples=120, deadline=None)
def test_any_batch_gives_the_answer_of_one_device_and_moves_what_the_formula_says(combination, batch, heads):
    (name, partition), (cp, lengths) = combination, batch
    config = ModelConfig("test", 64, 1, heads[0], heads[1], 16, 64, 64)
    cell = make(name, partition, lengths, config, cp=cp)
    if STRATEGIES[name].check(cell) is not None:
        return
    world = LocalWorld(cell.world_size)

    def program(rank):
        groups = local_groups(cell.layout, world, rank)
        program = Program(cell, groups, load_kernel("cpu_flash"), CPU)
        output = program.run()
        assert groups.recorder.reset() == traffic(cell, rank)
        return program.tokens, output.rows.flatten(1)

    rows = torch.empty(cell.tokens, heads[0] * 16)
    for tokens, mine in world.run(program):
        rows[tokens] = mine
    assert error(rows, truth(cell).rows) < 1e-6


@pytest.mark.parametrize("sizes", [{"cp": 4}, {"cp": 2, "tp": 2}, {"cp": 4, "tp": 2}, {"tp": 4}, {"tp": 8}], ids=str)
@pytest.mark.parametrize(("name", "partition"), COMBINATIONS)
@pytest.mark.parametrize("target", ["layer", "prefill"])
def test_every_layout_of_the_model_gives_the_same_answer(name, partition, sizes, target):
    if "cp" not in sizes:
        name, partition = "none", "contiguous"
    cell = make(name, partition, (75, 33), target=target, layers=2, **sizes)
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


@pytest.mark.parametrize(("name", "partition"), COMBINATIONS)
@pytest.mark.parametrize("target", ["attention", "layer", "prefill"])
@pytest.mark.parametrize(("dtype", "kv_cache"), [("float32", "keep"), ("bfloat16", "drop")])
def test_peak_of_live_tensors_is_the_closed_form(name, partition, target, dtype, kv_cache):
    """cp=8, every rank: within 5%, which is the small block of the memory pass, norm statistics, and index tensors."""
    config, length = replace(TINY, vocab=512), 32768 if target == "attention" else 16384
    cell = Cell(target, config, 2 if target == "prefill" else 1, Layout(cp=8), name, partition, "auto", dtype, "cpu", (length,), 0, kv_cache)
    world = LocalWorld(8)

    def program(rank):
        program = Program(cell, local_groups(cell.layout, world, rank), OneBlock(load_kernel("cpu_flash")), CPU)
        program.prepare()
        tracker = LiveTensors(CPU, program.tensors)
        with tracker:
            program.run()
        return tracker.peak, tracker.by_category

    for rank, (peak, categories) in enumerate(world.run(program)):
        assert peak == pytest.approx(live_bytes(cell, rank), rel=0.05), (rank, categories)
        assert sum(categories.values()) == peak


def test_score_pairs_add_up_to_the_causal_triangle_of_all_heads():
    for (name, partition), cp, tp in itertools.product(COMBINATIONS, (2, 4), (1, 2)):
        cell = make(name, partition, (100, 64), cp=cp, tp=tp)
        total = sum(score_pairs(cell, rank) for rank in range(cell.world_size))
        assert total == TINY.heads * sum(n * (n + 1) // 2 for n in cell.lengths), (name, partition)


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
    assert "use zigzag" in STRATEGIES["ring"].check(make("ring", "spiral", cp=2))
    assert "shorter than 2*cp" in STRATEGIES["ring"].check(make("ring", "zigzag", (10,), cp=8))
    assert "cp1" in STRATEGIES["none"].check(make("none", cp=2))
