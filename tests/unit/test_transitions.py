"""What `explain` lists, one by one, sums up to the traffic of a pass, which is held against what is counted on every layout elsewhere."""

from dataclasses import replace

import pytest

from cpbench.cell import Cell
from cpbench.distributed.traffic import Traffic
from cpbench.formulas import traffic
from cpbench.layout import Layout, all_layouts
from cpbench.models.presets import PRESETS
from cpbench.plan import unsupported
from cpbench.transitions import transitions

LENGTHS = (101, 67, 130)


def make(layout, model, **options):
    strategy, partition = ("none", "contiguous") if layout.cp == 1 else ("allgather", "zigzag")
    return Cell("prefill", PRESETS[model], 2, layout, strategy, partition, "auto", "float32", "cpu", LENGTHS, **options)


def summed(cell, rank):
    total = Traffic()
    for index in range(cell.step_count):
        for one in transitions(cell, rank, index=index):
            total.add(one.axis, one.operation, one.received, one.calls)
    return total


@pytest.mark.parametrize("model", ["qwen3-tiny", "qwen3-moe-tiny", "deepseek-v3-tiny", "deepseek-v3.2-tiny"])
def test_the_exchanges_of_a_pass_are_those_of_the_formulas(model):
    seen = 0
    for ranks in (1, 2, 4, 8):
        for plain in all_layouts(ranks, PRESETS[model].experts is not None):
            for layout in (plain, *([replace(plain, sp=True)] if plain.tp > 1 else [])):
                for options in ({}, {"chunk": 48, "prefixes": (0, 40, 17)}, *([{"sp_gather": "latent"}] if layout.sp else [])):
                    cell = make(layout, model, **options)
                    if unsupported(cell) is None:
                        assert [summed(cell, rank) for rank in range(ranks)] == [traffic(cell, rank) for rank in range(ranks)], cell.id
                        seen += 1
    assert seen > 50


def test_shapes_before_and_after():
    cell = replace(make(Layout.parse("tp4sp"), "qwen3-tiny"), lengths=(4096,), prefixes=(0,))
    found = [(one.operation, one.rows_before, one.rows_after, one.values, one.received) for one in transitions(cell, 1, range(1))]
    gather, scatter = ("all_gather", 1024, 4096, 256, 3072 * 1024), ("reduce_scatter", 4096, 1024, 256, 3072 * 1024)
    assert found == [gather, scatter, gather, scatter]


def test_without_sp_a_block_ends_in_an_all_reduce():
    cell = replace(make(Layout.parse("tp4"), "qwen3-tiny"), lengths=(4096,), prefixes=(0,))
    assert [(one.operation, one.rows_before, one.rows_after, one.received) for one in transitions(cell, 0, range(1))] == [
        ("all_reduce", 4096, 4096, 2 * 3072 * 1024)
    ] * 2
