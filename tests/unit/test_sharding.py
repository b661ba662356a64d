"""What is gathered before a block and summed after it follows from the axes that cut its weights and its tokens."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpbench import feed_forward, formulas, sharding, transitions
from cpbench.answer import solve
from cpbench.cell import Cell
from cpbench.communicator import Communicator, Partial
from cpbench.distributed.local import LocalWorld
from cpbench.distributed.mesh import local_groups
from cpbench.kernels import load_kernel
from cpbench.layout import AXES, Layout
from cpbench.models.held import Models
from cpbench.models.linear import Projection
from cpbench.models.mlp import DenseMLP
from cpbench.models.presets import PRESETS
from cpbench.numerics import judge
from cpbench.one_device import OneDevice
from cpbench.sharding import ATTENTION, DENSE_MLP, Gather, Shard, TokenRows, exchange, shard_of

CPU = torch.device("cpu")
EXPERTS = ("dp", "cp", "tp")  # how experts are cut by default: over all ranks of a stage


def plan(name, rank, rows, weights, replicated=None):
    layout = Layout.parse(name)
    return exchange(layout, layout.coordinates(rank), TokenRows(rows, replicated or (False,) * len(rows)), weights)


def test_attention_heads_need_no_tokens_of_other_ranks():
    assert plan("dp2cp2tp2", 5, ((3, 4), (5, 6)), ATTENTION) == sharding.Exchange((), (("tp", 2),))


def test_context_parallel_ranks_have_a_feed_forward_block_each_and_data_parallel_ones_share_it():
    found = plan("dp2cp2tp2", 6, ((3, 4), (5, 6)), DENSE_MLP)  # dp 1, cp 1, tp 0
    assert found == sharding.Exchange((Gather("dp", (4, 6)),), (("tp", 2),))
    assert plan("cp4tp2", 3, ((3, 4, 5, 6),), DENSE_MLP) == sharding.Exchange((), (("tp", 2),))


def test_the_tokens_of_a_group_come_together_before_the_groups_do():
    """What SGLang's gather of attention-DP tokens does not do: two context-parallel ranks of a group would write to the same rows."""
    found = plan("dp2cp2tp2", 6, ((3, 4), (5, 6)), EXPERTS)
    assert found == sharding.Exchange((Gather("cp", (5, 6)), Gather("dp", (7, 11))), (("tp", 2),))


def test_axes_decide_and_not_group_sizes():
    """dp and cp are equally large, and so are the groups (dp, tp) and (cp, tp); only the axis tells what must be gathered."""
    assert plan("dp2cp2tp2", 0, ((3, 4), (5, 6)), ("dp", "tp")).gathers == (Gather("dp", (3, 5)),)
    assert plan("dp2cp2tp2", 0, ((3, 4), (5, 6)), ("cp", "tp")).gathers == (Gather("cp", (3, 4)),)


def test_where_context_parallel_ranks_hold_the_same_tokens_their_sums_are_not_scattered():
    rows, replicated = ((9, 9), (5, 6)), (True, False)
    assert plan("dp2cp2", 1, rows, EXPERTS, replicated) == sharding.Exchange((Gather("dp", (9, 11)),), (("cp", 2),))
    assert plan("dp2cp2", 3, rows, EXPERTS, replicated) == sharding.Exchange((Gather("cp", (5, 6)), Gather("dp", (9, 11))), ())


@given(st.tuples(*[st.integers(1, 3)] * 4), st.sampled_from([ATTENTION, DENSE_MLP, EXPERTS]))
def test_the_parts_of_the_weights_are_a_partition_over_every_group_that_shares_them(sizes, weights):
    layout = Layout(*sizes)
    for ranks in layout.groups(*weights):
        parts = [shard_of(layout, layout.coordinates(rank), weights) for rank in ranks]
        assert parts == [Shard(index, len(ranks)) for index in range(len(ranks))]


@pytest.mark.parametrize("name", ["dp2", "dp3cp2", "dp2cp2tp2", "cp2tp2", "pp2dp2tp2", "tp4sp", "dp2cp2tp3sp", "pp2cp2tp2sp"])
@pytest.mark.parametrize("weights", [ATTENTION, DENSE_MLP, EXPERTS])
def test_a_rank_sees_its_tokens_summed_once_over_every_part(name, weights):
    """Rows that name their token go through a block whose part p adds p + 1; each rank gets back its own tokens with the sum of all parts."""
    layout = Layout.parse(name)
    counts = tuple(tuple(2 + 3 * dp + cp for cp in range(layout.cp)) for dp in range(layout.dp))
    rows, world = TokenRows(counts, (False,) * layout.dp, layout.tp if layout.sp else 1), LocalWorld(layout.world_size, 20)

    def program(rank):
        place = layout.coordinates(rank)
        first, held = 100 * place.dp + 10 * place.cp, rows.held(place)
        mine = torch.arange(first + held.start, first + held.stop, dtype=torch.float64)[:, None]
        communicator = Communicator(local_groups(layout, world, rank), rows)
        part = shard_of(layout, place, weights)
        (seen,) = communicator.incoming(mine.clone(), weights).cut(Projection(torch.eye(1, dtype=torch.float64)))
        return mine, communicator.complete(Partial(seen * (part.rank + 1), weights)), part.size, seen

    for mine, out, size, seen in world.run(program):
        assert torch.equal(out, mine * sum(range(1, size + 1)))
        assert len(seen.unique()) == len(seen), "tokens of two ranks in the same row"


@pytest.mark.parametrize("lengths", [(101, 67, 130), (90, 3), (67,)])
@pytest.mark.parametrize("chunk", [None, 48])
def test_a_feed_forward_block_over_all_ranks_of_a_stage_gives_the_answer_of_one_device(monkeypatch, lengths, chunk):
    """The same rule with weights cut over dp, cp and tp, as experts are: gathered tokens, traffic and answer are right."""
    monkeypatch.setattr(DenseMLP, "axes", EXPERTS)
    for module in (feed_forward, transitions):
        monkeypatch.setattr(module, "DENSE_MLP", EXPERTS)
    cell = Cell("prefill", PRESETS["qwen3-tiny"], 2, Layout(dp=2, cp=2, tp=2), "allgather", "zigzag", "auto", "float32", "cpu", lengths, chunk=chunk)
    kernel, world, one_device = load_kernel("cpu_flash"), LocalWorld(8, 60), OneDevice(CPU)
    answers = world.run(lambda rank: solve(cell, local_groups(cell.layout, world, rank), kernel, CPU, Models()))[0]
    assert {axis for axis, operation in answers[-1].received[0].counts if operation == "reduce_scatter"} >= {"dp"}
    for rank, received in enumerate(answers[-1].received):
        assert received == formulas.traffic(cell, rank)
    monkeypatch.undo()  # one device has no other ranks
    truth = one_device.truth(cell)
    for rows in answers[-1].copies.values():
        assert float((rows.double() - truth.rows).norm() / truth.rows.norm()) < 1e-5
    assert answers[-1].first_tokens == truth.tokens


@pytest.mark.parametrize("name", ["dp2", "dp4", "dp2cp2", "dp2tp2", "pp2", "pp4", "pp2cp2", "pp2tp2", "pp2dp2"])
@pytest.mark.parametrize("batch", [((67,), (0,)), ((5, 90, 31), (12, 0, 50))])
def test_stages_and_groups_give_the_answer_of_one_device_and_the_traffic_of_the_formula(name, batch):
    layout = Layout.parse(name)
    strategy, partition = ("ring", "zigzag") if layout.cp > 1 else ("none", "contiguous")
    config = replace(PRESETS["qwen3-tiny"], layers=5, vocab=512)
    cell = Cell("prefill", config, 5, layout, strategy, partition, "auto", "bfloat16", "cpu", batch[0], prefixes=batch[1], chunk=24)
    world = LocalWorld(layout.world_size, 60)
    answers = world.run(lambda rank: solve(cell, local_groups(layout, world, rank), load_kernel("cpu_flash"), CPU, Models()))[0]
    check = judge(answers, load_kernel("cpu_flash"), OneDevice(CPU))
    assert check.passed, check.reason
    assert check.collectives.difference is None


def test_ranks_of_an_axis_that_does_not_cut_tokens_hold_the_same_rows():
    cell = Cell("prefill", PRESETS["qwen3-tiny"], 4, Layout(2, 2, 2, 2), "ring", "zigzag", "auto", "float32", "cpu", (300, 20, 64, 64))
    layout = cell.layout
    tokens = {rank: cell.tokens_of(place.dp, place.cp) for rank in range(layout.world_size) for place in [layout.coordinates(rank)]}
    for axis in AXES:
        for ranks in layout.groups(axis):
            assert (len({str(tokens[rank]) for rank in ranks}) == 1) == (axis in ("pp", "tp"))
    held = sorted(token for dp in range(2) for cp in range(2) for part in cell.tokens_of(dp, cp) for token in part)
    assert held == list(range(cell.tokens))
