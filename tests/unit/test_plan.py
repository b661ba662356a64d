"""Plans: which cells, in which order, why some cannot run, and that planning stays cheap."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from typing import Any

import pytest

from cpbench.environment import Machine
from cpbench.errors import CpbenchError
from cpbench.plan import Plan, make_plan, pass_seconds, timed_passes
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
    short = plan(seq="8,2k", cp="2,8", strategies="ring")
    assert [p.cell.label for p in short.cells if p.status == "unsupported"] == ["cp8 ring 8"]


def test_a_default_strategy_that_cannot_run_is_not_the_users_mistake() -> None:
    assert [p.cell.strategy for p in plan(cp="3").cells if p.status] == ["ulysses"]


@pytest.mark.parametrize(
    ("fields", "message", "hint"),
    [
        ({"cp": "3", "strategies": "ulysses"}, "strategy=ulysses cannot run: 8 query heads", "The nearest degree is cp=2."),
        ({"cp": "3", "strategies": "ring,ulysses"}, "strategy=ulysses cannot run: 8 query heads", "The nearest degree is cp=2."),
        ({"cp": "8", "seq": 8}, "cp=8 cannot run: a sequence of 8 tokens is shorter than 2*cp = 16.", "Use cp=4"),
        ({"cp": "2", "seq": "2,2k", "strategies": "ring"}, "seq=2 cannot run: a sequence of 2 tokens is shorter than 2*cp = 4.", "at least 4"),
        ({"tp": "3"}, "tp=3 cannot run: 8 query heads of qwen3-tiny do not divide over tp=3.", "The nearest degree is tp=2."),
        ({"tp": "7", "model": "qwen2.5-7b"}, "tp=7 cannot run: 4 kv heads of qwen2.5-7b", "The nearest degree is tp=4."),
        ({"cp": "2", "strategies": "none"}, "strategy=none cannot run: none is for cp1", "allgather"),
        ({"cp": "1024", "tp": "2"}, "cp1024tp2 has 2048 ranks.", "1024"),
        ({"kernel": "sdpa"}, "Kernel 'sdpa' cannot run here: ", "kernel=auto"),
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
