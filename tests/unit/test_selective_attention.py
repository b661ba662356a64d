"""Sparse attention across ranks: the answer of one device, the same keys wherever they come from, planted faults, and closed forms."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from cpbench import selective_attention
from cpbench.answer import solve
from cpbench.cell import Cell
from cpbench.distributed.local import LocalWorld
from cpbench.distributed.mesh import local_groups
from cpbench.formulas import flops, flops_of_rank, live_bytes, score_pairs, traffic
from cpbench.kernels import dispatched, load_kernel
from cpbench.layout import Layout
from cpbench.measure.device import open_device
from cpbench.measure.memory import measure_peaks
from cpbench.models.config import Indexer
from cpbench.models.held import Models
from cpbench.models.presets import PRESETS
from cpbench.numerics import judge, small_cell
from cpbench.one_device import OneDevice
from cpbench.partition import Block, split, switched_off
from cpbench.plan import unsupported
from cpbench.program import Program, alone, run_locally
from cpbench.segments import place
from cpbench.strategies import STRATEGIES
from cpbench.visible import InOrder, in_order

CPU, KERNEL = torch.device("cpu"), load_kernel("cpu_flash")
ONE_DEVICE = OneDevice(CPU)
TINY = PRESETS["deepseek-v3.2-tiny"]
DENSE = replace(TINY, experts=None)
LENGTHS, PREFIXES = (101, 67, 130), (0, 40, 17)


def make(layout="cp2", partition="zigzag", dtype="float32", lengths=LENGTHS, target="prefill", config=DENSE, **options):
    strategy = "none" if Layout.parse(layout).cp == 1 else "allgather"
    layers = 2 if target == "prefill" else 1
    return Cell(target, config, layers, Layout.parse(layout), strategy, partition, "auto", dtype, "cpu", tuple(lengths), **options)


def answers_of(cell):
    assert unsupported(cell) is None
    world = LocalWorld(cell.world_size, 60)
    return world.run(lambda rank: solve(cell, local_groups(cell.layout, world, rank), KERNEL, CPU, Models()))[0]


def check_of(cell):
    return judge(answers_of(cell), KERNEL, ONE_DEVICE)


GRID = [("cp1", "contiguous"), ("tp2", "contiguous"), *(("cp2", name) for name in STRATEGIES["allgather"].partitions), ("cp4", "interleave")]
GRID += [("cp2tp2", "zigzag"), ("dp2cp2", "interleave"), ("pp2cp2", "zigzag")]


GRID = [(*case, "float32") for case in GRID] + [("cp2", "zigzag", "bfloat16"), ("cp4", "interleave", "bfloat16")]


@pytest.mark.parametrize(("layout", "partition", "dtype"), GRID)
def test_every_layout_answers_as_one_device(layout, partition, dtype):
    """With experts, and with prefixes in pages and chunks. Bytes are those of the formula: rows of a latent and a key of the indexer."""
    for options in ({}, {"chunk": 48, "prefixes": PREFIXES}):
        check = check_of(make(layout, partition, dtype, config=TINY, **options))
        assert check.passed, check.reason
    assert traffic(make(), 0).counts["cp", "all_gather"] == (2, 2 * 149 * (64 + 16 + 32) * 4)


def selections(cell):
    keys = answers_of(cell)[0].keys
    assert keys.disagreed == 0
    return keys.chosen_LNK


@pytest.mark.parametrize("layout", ["cp2", "cp3", "cp4"])
def test_every_partition_selects_the_keys_of_one_device(layout):
    expected = selections(make("cp1", "contiguous", target="attention", prefixes=PREFIXES))
    assert (expected[0] >= 0).sum(1).amax() == DENSE.indexer.top_k < max(LENGTHS)
    for partition in STRATEGIES["allgather"].partitions:
        assert torch.equal(selections(make(layout, partition, target="attention", prefixes=PREFIXES)), expected)


def test_sequences_that_are_not_longer_than_the_selection_attend_densely():
    """DeepSeek V3 with the same weights is the oracle."""
    lengths = (64, 50, 33)
    sparse = [run_locally(make(layout, "zigzag" if layout == "cp2" else "contiguous", lengths=lengths, config=TINY), KERNEL, CPU) for layout in ("cp1", "cp2")]
    dense = run_locally(make("cp1", "contiguous", lengths=lengths, config=replace(TINY, indexer=None), mla="absorbed"), KERNEL, CPU)[0][1].first
    for answers in sparse:
        assert torch.allclose(answers[0][1].first.logits_BV, dense.logits_BV, atol=1e-4)
    longer = run_locally(make("cp1", "contiguous", lengths=(96, 90, 80), config=TINY), KERNEL, CPU)[0][1].first.logits_BV
    dense = run_locally(make("cp1", "contiguous", lengths=(96, 90, 80), config=replace(TINY, indexer=None)), KERNEL, CPU)[0][1].first.logits_BV
    assert float((longer - dense).norm() / dense.norm()) > 1e-3


def fault(monkeypatch, cell, target, name, planted):
    """The verdict on ranks that run with a fault, which one device does not have."""
    with monkeypatch.context() as patched:
        patched.setattr(target, name, planted)
        answers = answers_of(cell)
    return judge(answers, KERNEL, OneDevice(CPU))


def test_keys_that_do_not_score_highest_are_named(monkeypatch):
    honest = selective_attention.select
    check = fault(monkeypatch, make(), selective_attention, "select", lambda q, gates, *rest: honest(q, -gates, *rest))
    assert not check.passed and "attention alone: token " in check.reason and " keys in layer 0, one of which leads by " in check.reason


def test_fewer_keys_than_may_be_selected_are_found(monkeypatch):
    honest = selective_attention.select

    def fewer(q, gates, keys, visible, top_k, buffers):
        ids = honest(q, gates, keys, visible, top_k, buffers)
        ids[:, 5] = ids[:, 6]
        return ids

    check = fault(monkeypatch, make(target="attention"), selective_attention, "select", fewer)
    assert not check.passed and "tokens attend to more or fewer keys than they select" in check.reason


def test_ranks_of_a_token_that_select_differently_are_found(monkeypatch):
    honest, ranks = selective_attention.select, []

    def other(*given):
        ids = honest(*given)
        ranks.append(None)
        return ids if len(ranks) % 2 else ids.clamp_min(1)

    check = fault(monkeypatch, make("tp2", "contiguous", target="attention"), selective_attention, "select", other)
    assert not check.passed and ("ranks select different keys for " in check.reason or "times that of one device" in check.reason)


def test_rows_in_the_order_of_ranks_are_an_error_that_is_found(monkeypatch):
    check = fault(monkeypatch, make(), InOrder, "is_identity", True)
    assert not check.passed and "times that of one device" in check.reason


@pytest.mark.parametrize("strategy", ["ring", "ulysses", "ulysses-gather", "usp", "pass-q"])
def test_strategies_that_merge_parts_are_refused(strategy):
    cell = replace(make(), strategy=strategy, partition=STRATEGIES[strategy].partitions[0])
    assert "selects among all keys at once; use allgather" in unsupported(cell)


def test_no_other_kernel_attends_and_the_record_says_which_does():
    assert dispatched(make(), KERNEL) == "sparse_latent"
    assert unsupported(replace(make(), kernel="cpu_flash")).endswith("the nearest valid value is kernel=auto")


def test_short_checks_of_wide_models_have_keys_to_leave_out():
    cell = small_cell(make(config=PRESETS["deepseek-v3.2"].with_experts(16), lengths=(4096,)))
    assert cell.shape.top_k <= max(cell.lengths) // 2
    assert (cell.config.heads, cell.config.indexer.heads) == (128, 64)


batches = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 30)), min_size=1, max_size=3).filter(lambda batch: any(new for new, _ in batch))


@given(st.sampled_from(["zigzag", "interleave", "contiguous"]), batches, st.integers(1, 5))
def test_rows_in_order_and_what_is_seen_of_them(partition, batch, cp):
    """However ranks hold the rows, place p of a sequence is its token p, and each query sees those up to itself."""
    lengths, prefixes = [new for new, _ in batch], [cached for _, cached in batch]
    assume(switched_off(partition, lengths, cp) is None)
    whole, tokens = split(partition, lengths, cp, prefixes), {}
    first = 0
    collected = []
    for sequence, prefix in enumerate(prefixes):
        if prefix:
            collected.append((Block(sequence, 0, prefix), first))
            tokens |= {first + position: (sequence, position) for position in range(prefix)}
            first += prefix
    for blocks in whole.ranks:
        for block, row in place(blocks, first):
            collected.append((block, row))
            tokens |= {row + index: (block.sequence, position) for index, position in enumerate(range(block.start, block.stop, block.step))}
        first += whole.max_rows
    for rank in range(cp):
        order = in_order(place(whole.ranks[rank]), collected)
        assert [tokens[row] for row in order.rows] == [(s, p) for s, (new, prefix) in enumerate(batch) for p in range(new + prefix)]
        for (block, row), visible in zip([(b, r) for b, r in place(whole.ranks[rank]) if b.rows], order.visible, strict=True):
            assert visible.queries.start == row
            for index, position in enumerate(range(block.start, block.stop, block.step)):
                assert tokens[order.rows[visible.keys.start + visible.seen(index) - 1]] == (block.sequence, position)


def test_blocks_with_a_gap_are_refused():
    block = split("contiguous", [9], 1).ranks[0][0]
    with pytest.raises(ValueError, match="do not hold each of its tokens once"):
        in_order([(block, 0)], [(replace(block, start=1), 0)])


@pytest.mark.parametrize("options", [{}, {"prefixes": PREFIXES}, {"prefixes": PREFIXES, "chunk": 50}])
def test_pairs_and_operations_are_those_that_are_counted(options):
    top_k, heads, indexer = DENSE.indexer.top_k, DENSE.heads, DENSE.indexer
    seen = np.concatenate([np.arange(prefix + 1, prefix + new + 1) for new, prefix in zip(LENGTHS, options.get("prefixes", (0, 0, 0)), strict=True)])
    for layout, partition in (("cp1", "contiguous"), ("cp2", "zigzag"), ("cp4", "interleave")):
        cell = make(layout, partition, target="attention", **options)
        ranks = range(cell.world_size)
        assert sum(score_pairs(cell, rank) for rank in ranks) == int(np.minimum(seen, top_k).sum()) * heads
        expected = 2 * (80 + 64) * int(np.minimum(seen, top_k).sum()) * heads + 2 * indexer.heads * indexer.dim * int(seen[seen > top_k].sum())
        assert sum(flops_of_rank(cell, rank) for rank in ranks) == flops(cell) == expected
    prefill = make("cp2tp2", config=DENSE, **options)
    assert flops(prefill) == pytest.approx(sum(flops_of_rank(prefill, rank) for rank in range(4)), rel=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("target", "prefixes"), [("prefill", ()), ("prefill", (300,)), ("attention", (300,))])
def test_the_peak_of_live_tensors_is_that_of_the_closed_form(target, prefixes, dtype):
    config = replace(DENSE, indexer=Indexer(16, 64, 256))
    cell = make("cp1", "contiguous", dtype, (701,), target, config, prefixes=prefixes)
    with torch.inference_mode():
        program = Program(cell, alone(), KERNEL, CPU)
        program.prepare()
        peaks = measure_peaks(program.run, open_device("cpu", 0), program.tensors)
    assert peaks["peak_live_bytes"] == pytest.approx(live_bytes(cell, 0), rel=0.07)
