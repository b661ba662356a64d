"""What the numbers of a row are: baseline, speed-up, efficiency, balance, memory."""

from __future__ import annotations

import pytest

from cpbench.records import not_measured
from cpbench.report.rows import group_rows
from cpbench.report.table import Notes, columns_of
from cpbench.results import CellResult, Metric

from .samples import CORES, make_cell, measured


def only_group(cells: list[CellResult], cores: int | None = CORES) -> list:  # type: ignore[type-arg]
    groups = group_rows(cells, cores)
    assert len(groups) == 1
    return list(groups[0].rows)


def test_efficiency_counts_cores_not_ranks_on_a_cpu() -> None:
    baseline, two, eight = only_group(
        [measured(make_cell("cp1", "none"), [4.0]), measured(make_cell("cp2", "ring"), [4.0]), measured(make_cell("cp8", "ring"), [5.0])]
    )
    assert baseline.is_baseline and baseline.speed_up == baseline.efficiency == 1.0
    assert (two.speed_up, two.efficiency) == (1.0, 1.0)  # one process with two threads, two with one: the same two cores
    assert (eight.speed_up, eight.efficiency) == (0.8, 0.8)


def test_efficiency_counts_threads_that_leave_cores_idle() -> None:
    one, two = measured(make_cell("cp1", "none"), [4.0]), measured(make_cell("cp2", "ring"), [2.0])
    rows = only_group([one.model_copy(update={"threads_per_rank": 1}), two], cores=8)
    assert (rows[1].speed_up, rows[1].efficiency) == (2.0, 1.0)


def test_efficiency_counts_gpus() -> None:
    cells = [measured(make_cell("cp1", "none", device="cuda"), [4.0]), measured(make_cell("cp4", "ring", device="cuda"), [2.0])]
    assert only_group(cells, cores=None)[1].efficiency == 0.5


def test_efficiency_needs_the_cores() -> None:
    assert only_group([measured(make_cell("cp1", "none"), [4.0])], cores=None)[0].efficiency is None


def test_without_cp1_the_smallest_layout_is_the_baseline() -> None:
    failed = not_measured(make_cell("cp1", "none"), "oom", "too large")
    rows = only_group([failed, measured(make_cell("cp4", "ring"), [2.0]), measured(make_cell("cp2", "ring"), [4.0])])
    assert [row.is_baseline for row in rows] == [False, False, True]
    assert rows[1].speed_up == 2.0
    assert rows[0].speed_up is None


def test_tensor_parallel_alone_goes_before_context_parallel() -> None:
    rows = only_group([measured(make_cell("cp2", "ring"), [2.0]), measured(make_cell("tp2", "none"), [4.0])])
    assert [row.is_baseline for row in rows] == [False, True]


def test_a_cell_that_failed_is_no_baseline_though_it_has_earlier_rounds() -> None:
    failed = not_measured(make_cell("cp1", "none"), "timeout", "too slow", measured(make_cell("cp1", "none"), [9.0]))
    rows = only_group([failed, measured(make_cell("cp2", "ring"), [4.0])])
    assert [row.is_baseline for row in rows] == [False, True]
    assert rows[0].time.median == 9.0


def test_lengths_have_their_own_baselines_and_stand_together() -> None:
    cells = [measured(make_cell(layout, strategy, seq), [seq / 1024]) for layout, strategy in (("cp1", "none"), ("cp2", "ring")) for seq in (1024, 2048)]
    rows = only_group(cells)
    assert [row.batch.lengths for row in rows] == [(1024,), (1024,), (2048,), (2048,)]
    assert [row.is_baseline for row in rows] == [True, False, True, False]
    assert [row.speed_up for row in rows] == [1.0] * 4


def test_what_cannot_be_compared_stands_in_groups_of_its_own() -> None:
    cells = [measured(make_cell("cp1", "none", dtype=dtype), [1.0]) for dtype in ("float32", "bfloat16")]
    assert [group.common["dtype"] for group in group_rows(cells, CORES)] == ["float32", "bfloat16"]


@pytest.mark.parametrize(("partition", "balance"), [("zigzag", 1.0), ("contiguous", 1.75)])
def test_balance_is_the_largest_work_over_the_mean(partition: str, balance: float) -> None:
    row = only_group([measured(make_cell("cp4", "ring", partition=partition), [1.0])])[0]
    assert row.balance == pytest.approx(balance, abs=1e-3)


def test_memory_is_live_on_a_cpu_and_allocated_on_a_gpu() -> None:
    on_cpu, on_gpu = (measured(make_cell("cp1", "none", device=device), [1.0], memory=100) for device in ("cpu", "cuda"))
    assert only_group([on_cpu])[0].memory_bytes == 100
    assert only_group([on_gpu])[0].memory_bytes == 200


def test_interval_needs_five_samples() -> None:
    four, five = (only_group([measured(make_cell("cp1", "none"), samples)])[0] for samples in ([1.0] * 4, [0.9, 1.0, 1.0, 1.0, 1.1]))
    assert four.half_width is None
    assert five.half_width == pytest.approx(0.1)


def test_prefixes_make_another_batch_with_its_own_baseline() -> None:
    prefixed = [{"prefixes": (0,)}, {"prefixes": (512,)}]
    cells = [measured(make_cell(layout, strategy, 1024, **changes), [1.0]) for layout, strategy in (("cp1", "none"), ("cp2", "ring")) for changes in prefixed]
    rows = only_group(cells)
    assert [(row.batch.prefixes, row.is_baseline) for row in rows] == [((0,), True), ((0,), False), ((512,), True), ((512,), False)]


def test_a_layout_on_which_context_parallelism_was_off_is_no_baseline() -> None:
    off = measured(make_cell("cp2", "ring", 3), [1.0]).model_copy(update={"cp_active": False, "cp_off_reason": "too short"})
    rows = only_group([off, measured(make_cell("cp3", "allgather", 3, partition="contiguous"), [2.0])])
    assert [(row.is_baseline, row.speed_up) for row in rows] == [(False, 2.0), (True, 1.0)]
    assert only_group([off])[0].speed_up is None


def test_head_groups_do_not_part_a_table() -> None:
    cells = [measured(make_cell("cp1", "none"), [2.0]), measured(make_cell("cp2", "allgather", head_groups=2), [1.0])]
    rows = only_group(cells)
    assert [(row.strategy, row.speed_up) for row in rows] == [("none", 1.0), ("allgather/2", 2.0)]


def test_compiled_cells_stand_beside_others_and_say_so() -> None:
    cells = [measured(make_cell("cp1", "none"), [2.0]), measured(make_cell("cp2", "local-map", compile="inductor"), [1.0])]
    cells.append(measured(make_cell("cp2", "local-map"), [2.0]))
    assert [(row.strategy, row.speed_up) for row in only_group(cells)] == [("none", 1.0), ("local-map/inductor", 2.0), ("local-map", 1.0)]
    assert cells[1].key["options"] == {"compile": "inductor"} and cells[1].id.endswith("/compile=inductor")


def test_how_rows_that_are_cut_over_tp_travel_stands_with_the_layout() -> None:
    cells = [measured(make_cell("tp2", "none"), [2.0])]
    cells += [measured(make_cell("tp2sp", "none", **options), [1.0]) for options in ({"sp_gather": "latent"}, {"sp_chunks": 4})]
    assert [(row.layout, row.speed_up) for row in only_group(cells)] == [("tp2", 1.0), ("tp2sp latent", 2.0), ("tp2sp x4", 2.0)]


def test_other_options_do() -> None:
    cells = [measured(make_cell("cp1", "none", page_size=size), [1.0]) for size in (None, 64)]
    assert [group.common["options"] for group in group_rows(cells, CORES)] == [{}, {"page_size": 64}]


def test_the_part_of_the_speed_of_light_has_a_column_where_it_is_known() -> None:
    cell = measured(make_cell("cp1", "none"), [4.0])
    fraction = Metric(unit="1", better="higher", rounds=[[0.42]], median=0.42, n=1)
    known = cell.model_copy(update={"metrics": {**cell.metrics, "light_fraction": fraction}})
    group = group_rows([known, measured(make_cell("cp2", "ring"), [4.0])], CORES)[0]
    assert [row.light for row in group.rows] == [0.42, None]
    column = next(column for column in columns_of(group, Notes()) if column.header == "speed\nof light")
    assert [column.text(row) for row in group.rows] == ["42%", "-"]
    assert "speed\nof light" not in [column.header for column in columns_of(group_rows([cell], CORES)[0], Notes())]
