"""Plans: which cells, in which order, why some cannot run, and that planning stays cheap."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpbench.cell import TARGETS, Cell
from cpbench.environment import Machine
from cpbench.errors import CpbenchError
from cpbench.fitting import layout_reason
from cpbench.formulas import flops, flops_of_rank, live_bytes
from cpbench.layout import Layout, all_layouts
from cpbench.models.presets import PRESETS
from cpbench.plan import Plan, make_plan, pass_seconds, timed_passes, unsupported
from cpbench.scenario import Timing, parse_scenario, resolve

CPU = Machine("cpu", 0, 2, 8 << 30, "a CPU")
CUDA = Machine("cuda", 4, 32, 64 << 30, "a CPU", ("a GPU",) * 4, 80 << 30, "1.0")


def plan(machine: Machine = CPU, **fields: Any) -> Plan:
    return make_plan(resolve(parse_scenario({"seq": "2k", **fields}), machine)[0], machine)


def labels(made: Plan) -> list[str]:
    return [planned.cell.label for planned in made.cells]


def test_world_sizes_ascend_and_the_baseline_is_first() -> None:
    made = plan(seq="2k,4k", cp="4,2", strategies="ring,ulysses")
    assert labels(made)[:2] == ["cp1 none 2k", "cp1 none 4k"]
    sizes = [planned.cell.world_size for planned in made.cells]
    assert sizes == sorted(sizes) and made.world_sizes == (1, 2, 4)
    assert labels(made)[2:6] == ["cp2 ring 2k", "cp2 ulysses 2k", "cp2 ring 4k", "cp2 ulysses 4k"]


def test_a_cell_comes_once_and_cp1_has_no_strategy() -> None:
    made = plan(cp="1,2,2", strategies="ring,ring", seq="2k,2048")
    assert labels(made) == ["cp1 none 2k", "cp2 ring 2k"]
    assert made.cells[0].cell.partition == "contiguous"


def test_batch_and_tensor_parallel_axes() -> None:
    made = plan(cp="2", tp="1,2", batch="1,3", strategies="ring")
    assert {str(p.cell.layout) for p in made.cells} == {"cp1", "tp2", "cp2", "cp2tp2"}
    assert {p.cell.lengths for p in made.cells} == {(2048,), (2048,) * 3}


def test_without_a_baseline() -> None:
    assert labels(plan(cp="2", strategies="ring", baseline=False)) == ["cp2 ring 2k"]


def test_partitions_are_those_of_the_strategy_unless_one_is_named() -> None:
    parts = {p.cell.strategy: p.cell.partition for p in plan(cp="2").cells}
    assert parts == {"none": "contiguous", "allgather": "zigzag", "ring": "zigzag", "ulysses": "contiguous"}
    assert {p.cell.partition for p in plan(cp="2", partition="contiguous").cells} == {"contiguous"}


def test_some_invalid_cells_stay_as_rows_with_a_reason() -> None:
    made = plan(cp="2,3", strategies="ring,ulysses")
    invalid = [planned for planned in made.cells if planned.status]
    assert [(p.cell.label, p.status) for p in invalid] == [("cp3 ulysses 2k", "unsupported")]
    assert "nearest degree is cp=2" in (invalid[0].reason or "")
    mixed = plan(cp="2,8", strategies="ring,ulysses-gather", partition="replicated")
    assert {(p.cell.strategy, p.status) for p in mixed.cells if p.cell.layout.cp > 1} == {("ring", "unsupported"), ("ulysses-gather", None)}
    assert "ring cannot use the replicated partition; use zigzag" in {p.reason for p in mixed.cells}
    stopped = {p.cell.strategy for p in plan(cp="3", strategies="all").cells if p.status}  # nobody named them
    assert {"ulysses", "ulysses-gather"} <= stopped and not {"none", "allgather", "ring", "usp", "pass-q"} & stopped


def test_a_batch_that_is_too_short_is_planned_and_says_so() -> None:
    made = plan(seq="8,2k", cp="2,8", strategies="ring")
    assert all(p.status is None for p in made.cells)
    assert {p.cell.label: p.cell.cp_off for p in made.cells if p.cell.cp_off} == {
        "cp8 ring 8": "context parallelism is off: a sequence of 8 new tokens is shorter than 2*cp = 16"
    }


def test_a_small_cache_stops_those_that_need_more_of_it() -> None:
    made = plan(seq="2k", prefix="8k", cp="2", cache_tokens="8k")
    assert [(p.cell.strategy, p.status) for p in made.cells] == [
        ("none", "unsupported"),
        ("allgather", "unsupported"),
        ("ring", None),
        ("ulysses", "unsupported"),
    ]
    assert made.cells[0].reason == (
        "the batch needs 10,240 tokens of cache on a rank, in pages of 64, more than cache_tokens = 8,192; the nearest valid value is cache_tokens=10240"
    )
    assert all(p.status is None for p in plan(seq="2k", prefix="8k", cp="2", cache_tokens="10k").cells)
    assert [p.cell.paged for p in plan(cp="2", cache_tokens="10k").cells] == [True] * 4  # a capacity makes pages


def test_a_default_strategy_that_cannot_run_is_not_the_users_mistake() -> None:
    assert [p.cell.strategy for p in plan(cp="3").cells if p.status] == ["ulysses"]


@pytest.mark.parametrize(
    ("fields", "message", "hint"),
    [
        ({"cp": "3", "strategies": "ulysses"}, "strategy=ulysses cannot run: 8 query heads", "The nearest degree is cp=2."),
        ({"cp": "3", "strategies": "ring,ulysses"}, "strategy=ulysses cannot run: 8 query heads", "The nearest degree is cp=2."),
        ({"cp": "8", "chunk": "15"}, "A chunk of 15 tokens is shorter than 2*cp = 16.", "The nearest valid value is chunk=16."),
        ({"cp": "2,8", "chunk": "15"}, "cp=8 cannot run: a chunk of 15 tokens is shorter than 2*cp = 16.", "chunk=16"),
        ({"prefix": "32k", "cache_tokens": "16k"}, "A prefix of 32,768 tokens is longer than the cache of 16,384: a rank needs 34,816", "cache_tokens=34816"),
        ({"cp": "2", "seq": "2k,32k", "cache_tokens": "4k", "strategies": "ring"}, "seq=32768 cannot run: the batch needs 16,384 tokens", "cache_tokens="),
        ({"cache_tokens": "1k", "page_size": 7}, "The batch needs 2,051 tokens of cache on a rank, in pages of 7,", "cache_tokens=2051"),
        ({"cp": "2", "head_groups": 3, "strategies": "allgather"}, "strategy=allgather cannot run: 2 kv heads do not divide", "head_groups=2"),
        ({"cp": "2", "head_groups": 2, "strategies": "ring"}, "head_groups is for allgather", "--strategy allgather"),
        ({"cp": "2", "compile": "eager"}, "compile is for local-map", "--strategy local-map"),
        ({"cp": "2", "compile": "eager", "strategies": "ring,local-map"}, "strategy=ring cannot run: ring has no compiled attention", "compile=none"),
        (
            {"cp": "2", "seq": 2001, "strategies": "local-map"},
            "strategy=local-map cannot run: local-map needs a length that 2*cp = 4 divides, not 2001",
            "length is 2000",
        ),
        ({"cp": "6", "strategies": "u3r2"}, "strategy=u3r2 cannot run: 8 query heads", "The nearest degree is u=2."),
        ({"cp": "2", "partition": "replicated"}, "allgather, ring, ulysses cannot use the replicated partition.", "--partition zigzag, or a strategy that can"),
        ({"cp": "2", "strategies": "ulysses-gather", "partition": "zigzag"}, "ulysses-gather cannot use the zigzag partition.", "--partition replicated, or"),
        ({"tp": "3"}, "tp=3 cannot run: 8 query heads of qwen3-tiny do not divide over tp=3.", "The nearest valid layout is tp2."),
        ({"tp": "7", "model": "qwen2.5-7b"}, "tp=7 cannot run: 4 kv heads of qwen2.5-7b", "The nearest valid layout is tp4."),
        ({"cp": "2", "strategies": "none"}, "strategy=none cannot run: none is for cp1", "allgather"),
        ({"cp": "1024", "tp": "2"}, "cp1024tp2 cannot run: more than 1024 ranks.", "The nearest valid layout is cp512tp2."),
        ({"pp": "8"}, "pp=8 is above the 4 layers of qwen3-tiny that run.", "The nearest valid layout is pp4cp2."),
        ({"pp": "2", "target": "layer"}, "pp=2 is above the 1 layer of qwen3-tiny that runs.", "The nearest valid layout is cp2."),
        ({"pp": "4", "layers": 3}, "pp=4 is above the 3 layers of qwen3-tiny that run.", "The nearest valid layout is pp3."),
        ({"pp": "8", "seq": 1}, "pp=8 is above the 4 layers", "The nearest valid layout is pp4."),  # cp=2 would need two tokens
        ({"cp": "8", "seq": 4}, "cp=8 is above the 4 new tokens of the batch.", "The nearest valid layout is cp4."),
        ({"cp": "8", "seq": 4, "batch": 2, "dp": 2}, "cp=8 is above the 4 new tokens of an attention-DP group.", "The nearest valid layout is dp2cp4."),
        ({"cp": "8", "seq": 3, "strategies": "ulysses"}, "strategy=ulysses cannot run: cp=8 is above", "is cp2."),  # 8 heads do not divide by 3
        ({"layouts": "cp8u4", "seq": 6}, "cp8u4 cannot run: cp=8 is above the 6 new tokens", "The nearest valid layout is cp6u2."),
        ({"dp": "3"}, "dp=3 cannot run: 512 FFN columns of qwen3-tiny do not divide over dp=3.", "The nearest valid layout is dp2."),
        ({"tp": "2", "dp": "3"}, "tp=2 cannot run: 512 FFN columns of qwen3-tiny do not divide over dp=3 x tp=2.", "The nearest valid layout is dp2tp2."),
        ({"layouts": "tp3,cp2"}, "tp3 cannot run: 8 query heads", "The nearest valid layout is tp2."),
        ({"layouts": "cp2,tp4/ep4"}, "tp4/ep4 cannot run: qwen3-tiny has no experts to divide.", "The nearest valid layout is tp4."),
        ({"layouts": "cp3", "strategies": "ulysses"}, "strategy=ulysses cannot run: 8 query heads", "The nearest degree is cp=2."),
        ({"ep": "4"}, "cp1/ep4 cannot run: ep=4 does not divide the ranks of a stage, and qwen3-tiny has no experts", "The nearest valid layout is cp1."),
        ({"ep": "2", "cp": "4"}, "cp4/ep2tp2 cannot run: qwen3-tiny has no experts to divide.", "The nearest valid layout is cp4."),
        ({"kernel": "sdpa"}, "Kernel 'sdpa' cannot run here: ", "kernel=auto"),
        ({"seq": "1M", "chunk": 2}, "chunk=2 cuts 1,048,576 tokens into 524,288 steps.", "the nearest valid value is chunk=256."),
        ({"seq": ",".join(map(str, range(1, 9000))), "cp": "1,2"}, "The scenario has more than 16,384 combinations", "Shorten its longest list"),
        ({"seq": ",".join(map(str, range(1, 5000))), "batch": 4096}, "The scenario has more than 16,384 combinations", "several sweeps"),
        ({"seq": "1," * 20_000}, "seq: the list has 20,000 values.", "The nearest valid number is 16,384."),
        ({"model": "a" * 5000}, f"Unknown model '{'a' * 80}'.", "qwen3-tiny"),
    ],
)
def test_a_value_with_which_nothing_can_run_is_refused(fields: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(CpbenchError) as caught:
        plan(**fields)
    assert caught.value.exit_code == 2
    assert caught.value.message.startswith(message)
    assert hint in caught.value.hint


def test_more_ranks_than_gpus_are_skipped_and_more_than_cores_are_not() -> None:
    made = plan(CUDA, cp="4,8", strategies="ring")
    assert [(p.cell.layout.cp, p.status, p.reason) for p in made.cells[1:]] == [(4, None, None), (8, "skipped", "needs 8 GPUs, this machine has 4")]
    many = plan(cp="8", strategies="ring")
    assert all(p.status is None for p in many.cells)
    assert many.threads_per_rank(8) == 1 and many.oversubscribed(8) and not many.oversubscribed(2)
    assert many.threads_per_rank(1) == 2
    assert plan(cp="2", strategies="ring", threads=3).threads_per_rank(2) == 3


def test_estimates_grow_with_work_and_shrink_with_devices() -> None:
    short, long = plan(CUDA, seq="8k,32k", cp="4", strategies="ring").cells[:2]
    assert long.seconds > short.seconds and long.live_bytes > short.live_bytes
    one, *_, four = plan(CUDA, seq="128k", cp="2,4", strategies="ring", target="attention").cells
    made = plan(CUDA)
    assert pass_seconds(one.cell, made) == pytest.approx(4 * pass_seconds(four.cell, made), rel=0.05)
    cells = plan(cp="2,8", strategies="ring", seq="16k", target="attention").cells
    per_pass = [pass_seconds(planned.cell, made_cpu) for planned in cells for made_cpu in [plan()]]
    assert per_pass[1] == pytest.approx(per_pass[2], rel=0.01)  # two cores are two cores, however many ranks share them
    timing = Timing()
    assert [timed_passes(seconds, timing) for seconds in (100.0, 1.0, 0.001, 0.0)] == [3, 11, 30, 30]


def test_the_sum_counts_every_round_and_every_start() -> None:
    once, thrice = plan(cp="2"), plan(cp="2", rounds=3)
    assert thrice.seconds == pytest.approx(3 * once.seconds)
    assert once.seconds > sum(p.seconds for p in once.cells) + len(once.world_sizes)


def test_thousands_of_cells_are_planned_quickly() -> None:
    begin = time.perf_counter()
    made = plan(seq=[1024 * i for i in range(1, 151)], batch=[1, 2], cp=[2, 4, 8], strategies=["ring", "allgather"])
    assert len(made.cells) == 150 * 2 * 7
    assert time.perf_counter() - begin < 10.0  # about 1 s; the bound only catches work that grows with the square


def test_planning_imports_no_torch() -> None:
    code = (
        "import sys; from cpbench.environment import Machine; from cpbench.plan import make_plan; from cpbench.scenario import *;"
        "m = Machine('cpu', 0, 2, 1 << 30); make_plan(resolve(parse_scenario({'cp': [2]}), m)[0], m); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unsupported_cell_is_not_skipped_for_lack_of_gpus() -> None:
    made = plan(replace(CUDA, devices=2), model="qwen3-tiny", layers=1, cp="2,3", strategies="ring,ulysses")
    assert {(p.cell.label, p.status) for p in made.cells if p.status} == {("cp3 ring 2k", "skipped"), ("cp3 ulysses 2k", "unsupported")}


def test_all_operations_are_those_of_the_ranks() -> None:
    made = [
        plan(seq="300,5", batch="1,3", prefix="0,70", cp="2,8", tp="1,2", strategies="all"),
        plan(seq="300", prefix="7", chunk="40", cp="2,4", strategies="all"),
        plan(seq="300", target="attention", cp="4", tp="2", strategies="all"),
        plan(seq="300", target="layer", cp="4", strategies="ring", partition="contiguous"),
    ]
    for cell in (planned.cell for one in made for planned in one.runnable):
        assert flops(cell) == sum(flops_of_rank(cell, rank) for rank in range(cell.world_size)), cell.id


def test_many_chunks_are_planned_quickly_and_their_memory_is_that_of_all_steps() -> None:
    made = plan(seq=None, batches=[{"lengths": "20k,3k,50", "prefixes": "0,1k,7"}], cp="4", chunk="1k", strategies="ring,allgather,ulysses,usp,pass-q")
    for planned in made.runnable:
        ranks = {0, (planned.cell.layout.cp - 1) // 2, planned.cell.layout.cp - 1}
        assert planned.live_bytes == max(live_bytes(planned.cell, rank) for rank in ranks), planned.cell.label
    begin = time.perf_counter()
    assert len(plan(seq="1M", cp="8", chunk="8k", strategies="ring,allgather,pass-q").cells[-1].cell.steps) == 128
    assert time.perf_counter() - begin < 30.0  # about 1 s; the bound only catches plans that are made per step and rank


def test_every_combination_of_degrees_is_a_row_or_left_out() -> None:
    made = plan(cp="1,2,4", tp="1,2", dp="1,2", pp="1,2", ep="1,4", strategies="ring")
    rows, left = {str(p.cell.layout) for p in made.cells}, {entry.name for entry in made.left_out}
    assert len(rows) == len(made.left_out) == 3 * 2 * 2 * 2
    assert {name.partition("/")[0] for name in left} == rows
    assert {(e.name, e.reason, str(e.nearest)) for e in made.left_out if e.name in ("pp2tp2/ep4", "cp4tp2/ep4tp2")} == {
        ("pp2tp2/ep4", "ep=4 does not divide the ranks of a stage, and qwen3-tiny has no experts to divide", "pp2tp2"),
        ("cp4tp2/ep4tp2", "qwen3-tiny has no experts to divide", "cp4tp2"),
    }
    assert all(p.status is None for p in made.cells)


def test_every_layout_of_some_ranks_is_planned_and_what_cannot_run_says_why() -> None:
    made = plan(gpus="8", strategies="ring")
    assert {p.cell.layout for p in made.cells} == set(all_layouts(8)) and len(made.cells) == 20
    stopped = {str(p.cell.layout): p.reason for p in made.cells if p.status}
    assert stopped == {"pp8": "pp=8 is above the 4 layers of qwen3-tiny that run; the nearest valid layout is pp4cp2"}
    many = plan(CUDA, gpus="2,8", seq="1k")
    assert {p.reason for p in many.cells if p.cell.world_size == 8} == {"needs 8 GPUs, this machine has 4"}
    assert made.left_out == ()


def test_groups_without_a_sequence_may_run() -> None:
    assert [p.status for p in plan(dp="4", batch="3").cells] == [None]


def test_a_group_that_is_too_short_for_its_strategy_stops_the_layout() -> None:
    made = plan(seq=None, batches=[{"lengths": "8k,6,6"}], cp="2", dp="2", strategies="all")
    reasons = {p.cell.strategy: p.reason for p in made.cells}
    assert reasons["ring"] is None
    assert reasons["torch-cp"] == "torch-cp needs a length that 2*cp = 4 divides, not 6; the nearest valid length is 8"


@given(
    st.builds(Layout, st.integers(1, 6), st.integers(1, 6), st.integers(1, 8), st.integers(1, 3)),
    st.lists(st.integers(1, 20), min_size=1, max_size=4),
    st.sampled_from(["none", "ring", "ulysses", "usp", "allgather"]),
    st.sampled_from(TARGETS),
)
def test_the_nearest_layout_that_a_reason_names_can_run(layout: Layout, lengths: list[int], strategy: str, target: str) -> None:
    if (strategy == "none") != (layout.cp == 1):
        return
    layers = 4 if target == "prefill" else 1
    cell = Cell(target, PRESETS["qwen2.5-7b"], layers, layout, strategy, "contiguous", "auto", "float32", "cpu", tuple(lengths))
    reason = layout_reason(cell)
    if reason is None:
        return
    nearest = Layout.parse(reason.rpartition(" ")[2])
    assert nearest != layout
    runs = replace(cell, layout=nearest, strategy="none" if nearest.cp == 1 else "ring" if strategy == "none" else strategy)
    assert unsupported(runs) is None


def test_thousands_of_layouts_are_planned_quickly() -> None:
    begin = time.perf_counter()
    made = plan(gpus=list(range(1, 100)), strategies="ring")
    assert len(made.cells) == sum(len(list(all_layouts(ranks))) for ranks in range(1, 100)) > 2000
    named = plan(layouts=[f"cp{cp}" for cp in range(1, 100)], strategies="ring")
    assert len(named.cells) == 99
    assert time.perf_counter() - begin < 10.0  # about 1 s; the bound only catches work that grows with the square
