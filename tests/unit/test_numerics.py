"""What is concluded from the distances between answers, and the small cell that stands for a large one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cpbench import numerics
from cpbench.answer import Answer, solve
from cpbench.cell import Cell
from cpbench.distributed.local import LocalWorld
from cpbench.distributed.mesh import local_groups
from cpbench.distributed.traffic import Traffic
from cpbench.kernels import load_kernel
from cpbench.layout import Layout
from cpbench.models.config import ModelConfig
from cpbench.models.held import Models
from cpbench.models.presets import PRESETS, load_config
from cpbench.numerics import Check, Counted, check, judge, relative_rmse, small_cell
from cpbench.one_device import OneDevice, Solution
from cpbench.results import Numerics
from cpbench.strategies import STRATEGIES

CPU = torch.device("cpu")
KERNEL = load_kernel("cpu_flash")
CONFIG = ModelConfig("small", 64, 2, 8, 2, 32, 128, 256)


def make(strategy="ring", layout="cp4", dtype="float32", target="attention", lengths=(75, 33), config=CONFIG, **fields) -> Cell:
    fields = {"layers": 2 if target == "prefill" else 1, **fields}
    partition = fields.pop("partition", STRATEGIES[strategy].partitions[0])
    layers = fields.pop("layers")
    return Cell(target, config, layers, Layout.parse(layout), strategy, partition, "auto", dtype, "cpu", tuple(lengths), **fields)


def answers(cell: Cell) -> list[Answer]:
    world = LocalWorld(cell.world_size)
    return world.run(lambda rank: solve(cell, local_groups(cell.layout, world, rank), KERNEL, CPU, Models()))[0]


def verdict(cell: Cell) -> Check:
    return judge(answers(cell), KERNEL, OneDevice(CPU))


def test_every_rank_learns_the_verdict_and_the_first_one_the_details():
    cell, world = make("allgather", target="prefill"), LocalWorld(4)
    checks = world.run(lambda rank: check(cell, local_groups(cell.layout, world, rank), KERNEL, CPU, Models()))
    assert [one.passed for one in checks] == [True] * 4
    assert checks[0].relative_rmse < 1e-5 and checks[0].remote_tokens_used is True
    assert checks[1:] == [Check(True, None)] * 3
    assert Numerics.model_validate(checks[0].to_dict()).tokens == small_cell(cell).tokens


def test_every_rank_learns_that_the_first_one_found_a_fault(monkeypatch):
    monkeypatch.setattr(numerics, "MAX_FP32_RMSE", 1e-12)
    cell, world = make(), LocalWorld(4)
    checks = world.run(lambda rank: check(cell, local_groups(cell.layout, world, rank), KERNEL, CPU, Models()))
    assert [one.passed for one in checks] == [False] * 4
    assert "above 1e-12" in checks[0].reason


def test_the_first_rank_knows_what_others_counted():
    """Rank 2 receives a byte more than its formula."""
    parts = answers(make())
    received = list(parts[0].received)
    received[2] = received[2] + Traffic({("cp", "send_recv"): (0, 1)})
    found = judge([replace(parts[0], received=tuple(received))], KERNEL, OneDevice(CPU))
    calls, size = received[2].counts["cp", "send_recv"]
    assert found.reason == (
        f"traffic differs from its formula: rank 2 counted {calls} calls ({size:,} bytes) of send_recv over cp, not {calls} calls ({size - 1:,} bytes)"
    )


def test_a_difference_names_every_kind_of_collective():
    counted = Traffic({("cp", "all_gather"): (2, 2048), ("tp", "all_reduce"): (1, 8)})
    predicted = Traffic({("cp", "all_gather"): (1, 1024), ("cp", "all_to_all"): (1, 5), ("tp", "all_reduce"): (1, 8)})
    assert Counted(3, counted, predicted).difference == (
        "rank 3 counted 2 calls (2,048 bytes) of all_gather over cp, not 1 call (1,024 bytes); none of all_to_all over cp, not 1 call (5 bytes)"
    )
    assert Counted(3, predicted, Traffic(dict(predicted.counts) | {("cp", "send_recv"): (0, 0)})).difference is None


@pytest.mark.parametrize(
    ("fields", "used"),
    [
        ({}, True),
        ({"strategy": "ulysses-gather"}, None),
        ({"lengths": (64, 7)}, None),
        ({"layout": "cp2", "partition": "contiguous", "lengths": (50, 50)}, None),
        ({"layout": "tp2", "strategy": "none"}, None),
    ],
    ids=["spread", "replicated", "off", "whole sequences", "no context parallelism"],
)
def test_remote_tokens_are_asked_for_where_there_are_some(fields, used):
    found = verdict(make(**fields))
    assert found.passed, found.reason
    assert found.remote_tokens_used is used


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_an_answer_between_both_is_wrong_and_called_by_the_nearer_one(share):
    """A mixture of the truth and of the answer without remote tokens."""
    (part,), one = answers(make()), OneDevice(CPU)
    truth, local = one.truth(part.cell).rows, one.own_tokens_only(part.cell)
    mixed = replace(part, copies={0: (truth + share * (local - truth)).float()})
    found = judge([mixed], KERNEL, one)
    assert found.passed == (share == 0.0)
    assert found.remote_tokens_used is (share < 0.5)
    assert ("ignores the tokens of other ranks" in (found.reason or "")) == (share > 0.5)


def test_an_answer_that_is_neither_is_not_said_to_ignore_anything():
    (part,) = answers(make())
    found = judge([replace(part, copies={0: torch.randn_like(part.copies[0])})], KERNEL, OneDevice(CPU))
    assert found.remote_tokens_used is None
    assert "above 1e-05" in found.reason


def test_tensor_parallel_sums_are_in_the_yardstick():
    """Eight partial sums in bf16 round where the yardstick's do, bit for bit; one device without them rounds less, and elsewhere."""
    cell = make("none", "tp8", "bfloat16", "prefill", config=load_config("qwen3-tiny"), lengths=(96,))
    one = OneDevice(CPU)
    found, single = verdict(cell), one.yardstick(replace(cell, layout=Layout()), KERNEL).rows
    assert found.passed and found.bitwise_equal and found.ratio == 1.0
    assert found.relative_rmse > relative_rmse(single, one.truth(cell).rows)


def test_all_copies_are_judged():
    """Of a layer every tensor-parallel rank has the rows."""
    attention, layer = answers(make(layout="cp2tp2", target="layer"))
    assert (list(attention.copies), list(layer.copies)) == ([0], [0, 1])
    broken = replace(layer, copies={0: layer.copies[0], 1: layer.copies[1] * 1.001})
    found = judge([attention, broken], KERNEL, OneDevice(CPU))
    assert found.reason.startswith("layer: relative RMSE") and "on rank 1" in found.reason


def test_a_token_that_differs_counts_where_its_lead_is_larger_than_rounding():
    logits = torch.tensor([[1.0, 0.9], [1.0, 0.2]])
    truth = Solution(torch.ones(1, 1), logits.double(), (0, 0), (0.1, 0.8))
    yardstick = Solution(torch.ones(1, 1), logits + 0.05, (0, 0), (0.1, 0.8))
    answer = Answer(make(), {}, 0, (), logits, (1, 0))
    assert numerics._wrong_token(answer, truth, yardstick) is None
    assert numerics._wrong_token(replace(answer, first_tokens=(0, 1)), truth, yardstick).startswith("the first token of sequence 1 is 1, not 0")


def test_relative_rmse_is_relative_to_the_truth():
    truth = torch.tensor([3.0, 4.0])
    assert relative_rmse(truth + torch.tensor([0.0, 0.5]), truth) == pytest.approx(0.1)


@pytest.mark.parametrize("lengths", [(36864,), (1003, 517, 9), (40_000, 9, 8192, 5)])
def test_the_small_cell_keeps_what_can_go_wrong(lengths):
    cell = make(layout="cp8", target="prefill", lengths=lengths, config=PRESETS["qwen3-8b"], prefixes=(0, 32768, 5, 7)[: len(lengths)], chunk=8192)
    small = small_cell(cell)
    assert small.tokens <= 600
    assert (small.layout, small.strategy, small.partition, small.dtype, small.config.heads) == (cell.layout, "ring", "zigzag", "float32", 32)
    assert small.cp_off == cell.cp_off or (small.cp_off is None) == (cell.cp_off is None)
    assert any(small.prefixes) == any(cell.prefixes)
    assert (len(small.steps) > 1) == (len(cell.steps) > 1)
    assert min(lengths) < 16 or all(length % 16 == full % 16 for length, full in zip(small.lengths, cell.lengths, strict=False))
