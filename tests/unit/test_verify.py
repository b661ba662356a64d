"""Planted faults must be found, each for its own reason; and the grid holds what the registries hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from cpbench import one_device, verify
from cpbench.cell import Cell
from cpbench.communicator import Communicator
from cpbench.environment import Machine
from cpbench.errors import CpbenchError
from cpbench.kernels.accumulate import Accumulator
from cpbench.layout import Layout
from cpbench.numerics import MAX_RATIO
from cpbench.partition import PARTITIONS
from cpbench.strategies import STRATEGIES
from cpbench.strategies.ring import Ring, Step
from cpbench.strategies.ulysses_gather import UlyssesGather
from cpbench.verify import Row, Verifier, asked_fields, grid

MACHINE = Machine("cpu", 0, 2, 8 << 30)
UNEVEN = {"lengths": (101, 67), "prefixes": (0, 40)}


def make(strategy: str = "ring", layout: str = "cp4", partition: str | None = None, dtype: str = "float32", target: str = "attention", **fields) -> Cell:
    fields = {**UNEVEN, **fields}
    partition = partition or STRATEGIES[strategy].partitions[0]
    return Cell(target, verify.CONFIGS["8:2"], 1, Layout.parse(layout), strategy, partition, "auto", dtype, "cpu", **fields)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Row]]:
    """Verify one cell, with another strategy under the name of the cell's."""

    def run(cell: Cell, strategy: object = None) -> Row:
        if strategy is not None:
            monkeypatch.setitem(STRATEGIES, cell.strategy, strategy)
        return Verifier("cpu").row(cell)

    return run


class ForgetsRemoteTokens(Ring):
    def plan(self, cell, rank):
        own, *others = super().plan(cell, rank)
        return (own, *(replace(step, segments=()) for step in others))


class SkipsTheLastBlock(Ring):
    """The last rank has no call for the block that arrives last."""

    def plan(self, cell, rank):
        *steps, last = super().plan(cell, rank)
        return (*steps, Step((), None) if rank == cell.layout.cp - 1 else last)


class Zeros(Ring):
    def attend(self, *arguments):
        return super().attend(*arguments).zero_()


class NaNOnRank2(Ring):
    def attend(self, q, rows, open_rows, plan, context, layer):
        out = super().attend(q, rows, open_rows, plan, context, layer)
        out[3, 1, 5] = float("nan") if context.group.rank == 2 else out[3, 1, 5]
        return out


class GathersForNothing(Ring):
    def attend(self, q, rows, open_rows, plan, context, layer):
        mine = rows[:1].contiguous()
        context.group.all_gather(mine.new_empty(context.group.size, mine.shape[1]), mine).wait()
        return super().attend(q, rows, open_rows, plan, context, layer)


class Raises(Ring):
    def attend(self, q, rows, open_rows, plan, context, layer):
        if context.group.rank == 1:
            raise ValueError("a planted\nfault")
        return super().attend(q, rows, open_rows, plan, context, layer)


class DoesNotSend(Ring):
    """Rank 1 keeps its block to itself, so the others wait for it."""

    def attend(self, q, rows, open_rows, plan, context, layer):
        own = replace(plan[0], next_rows=None)
        return super().attend(q, rows, open_rows, (own,) if context.group.rank == 1 else plan, context, layer)


class WrongCopy(UlyssesGather):
    """Every rank has all tokens, and rank 2 has them wrong."""

    def attend(self, q, rows, open_rows, plan, context, layer):
        out = super().attend(q, rows, open_rows, plan, context, layer)
        return out * 1.01 if context.group.rank == 2 else out


def test_an_answer_that_ignores_remote_tokens(run):
    row = run(make(), ForgetsRemoteTokens())
    assert (row.verdict, row.reason) == ("wrong", "the answer is the one that ignores the tokens of other ranks")
    assert row.check.remote_tokens_used is False
    assert row.check.collectives.difference is None


def test_an_answer_that_skips_a_block_names_the_rank(run):
    row = run(make(partition="contiguous"), SkipsTheLastBlock())
    assert row.verdict == "wrong"
    assert "above 1e-05" in row.reason and "on context-parallel rank 3" in row.reason
    assert row.check.remote_tokens_used is True
    assert row.check.relative_rmse > 1e-3


def test_zeros(run):
    row = run(make(), Zeros())
    assert (row.verdict, row.reason, row.check.finite, row.check.ratio) == ("wrong", "the answer is all zeros", True, None)


def test_nan(run):
    row = run(make(), NaNOnRank2())
    assert (row.verdict, row.reason) == ("wrong", "1 of 168 rows have values that are not finite on context-parallel rank 2")
    assert row.check.finite is False


def test_partial_results_that_are_kept_in_bf16(run, monkeypatch):
    """Eight partial results rounded after every merge; the sound accumulator passes the same cell."""
    cell = make(layout="cp8", dtype="bfloat16", lengths=(512,), prefixes=())
    assert run(cell).verdict == "ok"
    add = Accumulator.add

    def add_and_round(self, rows, out, lse):
        add(self, rows, out, lse)
        if self._out is not None and self._dtype == torch.bfloat16:
            self._out.copy_(self._out.bfloat16())

    monkeypatch.setattr(Accumulator, "add", add_and_round)
    row = run(cell)
    assert row.verdict == "wrong"
    assert f"times that of one device, more than {MAX_RATIO}" in row.reason
    assert MAX_RATIO < row.check.ratio < 3
    assert row.check.remote_tokens_used is True


def test_a_collective_too_many(run):
    row = run(make(), GathersForNothing())
    assert row.verdict == "wrong"
    bytes_received = 3 * 2 * 2 * 64 * 4  # one row of k and v from three ranks
    assert row.reason == f"traffic differs from its formula: rank 0 counted 1 call ({bytes_received:,} bytes) of all_gather over cp, not none"
    assert row.check.relative_rmse < 1e-6
    assert (row.check.collectives.received.calls, row.check.collectives.predicted.calls) == (4, 3)


def test_a_rank_that_raises(run):
    row = run(make(), Raises())
    assert row.verdict == "wrong" and row.check is None
    assert row.reason.startswith("ValueError: a planted fault (")


def test_a_rank_that_does_not_take_part(run, monkeypatch):
    monkeypatch.setattr(verify, "COLLECTIVE_TIMEOUT", 2.0)
    row = run(make(), DoesNotSend())
    assert row.verdict == "wrong"
    assert "the ranks do not call the same collectives" in row.reason


def test_one_wrong_copy_of_tokens_that_every_rank_has(run):
    row = run(make("ulysses-gather"), WrongCopy())
    assert row.verdict == "wrong"
    assert "on rank 2" in row.reason
    assert run(make("ulysses-gather"), UlyssesGather()).verdict == "ok"


def test_a_token_that_no_rank_has(run, monkeypatch):
    def forgetful(lengths, cp):
        first, *others = PARTITIONS["zigzag"](lengths, cp)
        return [[replace(first[0], start=1), *first[1:]], *others]

    monkeypatch.setitem(PARTITIONS, "forgetful", forgetful)
    row = run(make("allgather", partition="forgetful"))
    assert (row.verdict, row.reason) == ("wrong", "1 of 168 tokens are on no rank")


def test_logits_of_another_token(run, monkeypatch):
    """The hidden states are right, and the last one of a sequence does not reach the head."""
    share_last = Communicator.share_last
    mixed = lambda self, *arguments: share_last(self, *arguments).roll(int(self._cp.size > 1), 0)  # noqa: E731 - one device is right
    monkeypatch.setattr(Communicator, "share_last", mixed)
    row = run(make(target="prefill"))
    assert row.verdict == "wrong"
    assert row.reason.startswith("prefill: the first token of sequence ")
    assert row.check.relative_rmse < 1e-5


def test_a_fault_outside_attention_is_named_by_its_target(run, monkeypatch):
    complete = Communicator.complete
    monkeypatch.setattr(Communicator, "complete", lambda self, partial: complete(self, partial) if self._cp.rank != 1 else partial.values())
    row = run(make(layout="cp2tp2", target="layer"))
    assert row.verdict == "wrong"
    assert row.reason.startswith("layer: ") and "traffic differs" in row.reason


def test_a_batch_that_is_too_short_is_off_and_right(run):
    row = run(make(lengths=(64, 3), prefixes=(), layout="cp2"))
    assert row.verdict == "off"
    assert "3 new tokens is shorter than 2*cp = 4" in row.reason
    assert row.check.passed and row.check.remote_tokens_used is None and row.check.collectives.received.calls == 0


def test_what_equals_one_device_is_bitwise_equal_and_says_so(run):
    same = run(make("ulysses", dtype="bfloat16", prefixes=()))
    merged = run(make("ring", dtype="bfloat16", prefixes=()))
    assert (same.check.bitwise_equal, merged.check.bitwise_equal) == (True, False)
    assert same.check.ratio == 1.0
    assert 0 < merged.check.max_error < 0.1


def test_cells_that_share_a_batch_share_the_answers_of_one_device(run, monkeypatch):
    verifier, solved, solve = Verifier("cpu"), [], one_device._solve
    monkeypatch.setattr(one_device, "_solve", lambda cell, *rest: solved.append(cell) or solve(cell, *rest))
    for name in ("ring", "allgather", "ulysses"):
        assert verifier.row(make(name)).verdict == "ok"
    assert [cell.dtype for cell in solved] == ["float64", "float32"]


def cells(deep: bool = False, **fields) -> list[Cell]:
    asked, device = asked_fields(fields, [], MACHINE)
    return [entry for entry in grid(asked, device, deep=deep) if isinstance(entry, Cell)]


@pytest.mark.parametrize("deep", [False, True])
def test_the_grid_has_every_strategy_and_partition_that_can_run_in_threads(deep):
    found = {(cell.strategy, cell.partition) for cell in cells(deep)}
    assert found == {(name, partition) for name, one in STRATEGIES.items() if not one.brings_collectives for partition in one.partitions}


def test_the_grid_has_the_layouts_and_batches_that_go_wrong():
    everything = cells()
    assert {"cp1", "tp2", "cp2", "cp3", "cp4", "cp8", "cp4tp2", "cp4u2", "cp8u4"} <= {str(cell.layout) for cell in everything}
    assert {cell.dtype for cell in everything} == {"float32", "bfloat16"}
    assert {cell.target for cell in everything} == {"attention", "prefill"}
    for trait in (lambda c: any(c.prefixes), lambda c: c.chunk, lambda c: c.cp_off, lambda c: len(set(c.lengths)) > 1, lambda c: len(set(c.lengths)) == 1):
        assert any(map(trait, everything))
    assert len(everything) == len(set(everything))


def test_the_deep_grid_has_more_of_everything():
    deep = cells(deep=True)
    assert set(cells()) - set(deep) == set()
    assert {"float16", "bfloat16", "float32"} == {cell.dtype for cell in deep}
    assert {"attention", "layer", "prefill"} == {cell.target for cell in deep}
    assert {(8, 8), (8, 2), (8, 1), (24, 4), (12, 4)} == {(cell.config.heads, cell.config.kv_heads) for cell in deep}
    assert {1, 16, 256} <= {cell.page_size for cell in deep}
    assert {2} < {cell.head_groups for cell in deep} and {"drop"} < {cell.kv_cache for cell in deep}
    assert max(cell.layout.cp for cell in deep) == 16


def test_random_batches_follow_the_seed():
    assert verify._random_batches(1) == verify._random_batches(1) != verify._random_batches(2)


def test_libraries_that_communicate_are_one_row_that_says_why():
    asked, device = asked_fields({}, [], MACHINE)
    skipped = [entry for entry in grid(asked, device, deep=True) if isinstance(entry, Row)]
    assert {row.cell.strategy for row in skipped} == {"torch-cp", "torch-cp-ring", "local-map"}
    assert [row.reason for row in skipped] == ["needs processes: checked by sweep"] * 3


def test_what_was_asked_for_replaces_the_grid():
    asked = cells(cp="2", tp="2", strategies="ring", dtype="bfloat16", model="qwen3-8b", batches=[{"lengths": "33,20", "prefixes": "5"}], seed="7")
    assert {str(cell.layout) for cell in asked} == {"cp2tp2"}
    assert {(cell.strategy, cell.dtype, cell.seed, cell.lengths, cell.prefixes) for cell in asked} == {("ring", "bfloat16", 7, (33, 20), (5, 5))}
    assert {(cell.config.name, cell.config.hidden, cell.config.heads) for cell in asked} == {("qwen3-8b", 256, 32)}
    assert {cell.partition for cell in asked} == set(STRATEGIES["ring"].partitions)
    assert {cell.target for cell in asked} == {"attention", "prefill"}
    assert {cell.chunk for cell in asked} == {None}


def test_hybrids_and_settings_that_were_asked_for():
    assert {str(cell.layout) for cell in cells(strategies="u2r3")} == {"cp6u2"}
    asked, device = asked_fields({}, ["kernel=reference", "partition=interleave", "kv_cache=drop"], MACHINE)
    found = [entry for entry in grid(asked, device, deep=False) if isinstance(entry, Cell)]
    assert {cell.kernel for cell in found} == {"reference"}
    assert {cell.partition for cell in found if cell.layout.cp > 1} == {"interleave"}
    assert not any(cell.chunk for cell in found), "a chunk needs what the ones before it left"


def test_what_cannot_run_is_a_row_once_for_each_reason():
    asked, device = asked_fields({"cp": "3,4", "strategies": "ring,ulysses"}, [], MACHINE)
    skipped = [entry for entry in grid(asked, device, deep=False) if isinstance(entry, Row)]
    assert [(row.verdict, str(row.cell.layout), row.cell.strategy) for row in skipped] == [("skipped", "cp3", "ulysses")]
    assert "nearest degree is cp=2" in skipped[0].reason


@pytest.mark.parametrize(
    ("fields", "settings", "message"),
    [
        ({"cp": "3", "strategies": "ulysses"}, [], "cp=3"),
        ({"strategies": "torch-cp"}, [], "torch-cp needs processes"),
        ({"cp": "128"}, [], "128 ranks"),
        ({"batches": [{"lengths": "40k"}]}, [], "40,960"),
        ({}, ["kernel=flash3"], "flash3 cannot run here"),
        ({}, ["rounds=3"], "Unknown field of verify 'rounds'"),
    ],
)
def test_a_grid_of_nothing_is_an_error(fields, settings, message):
    with pytest.raises(CpbenchError, match=message) as error:
        grid(*asked_fields(fields, settings, MACHINE), deep=False)
    assert error.value.hint
