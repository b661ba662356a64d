"""A rank that raises, is killed, runs out of memory, hangs, or computes something else costs its cell only. Real processes."""

import json

import psutil
import pytest

from tests.dist.sweeps import sweep

FIELDS = {"seq": "64", "cp": "2", "strategies": "allgather,ring,ulysses"}


def children() -> set[psutil.Process]:
    return {process for process in psutil.Process().children(recursive=True) if process.status() != psutil.STATUS_ZOMBIE}


def faulty(tmp_path, fault, **fields):
    before = children()
    result = sweep(tmp_path / "r.json", "tests.dist.faulty_worker", {"FAULT": fault}, **(FIELDS | fields))
    cells = {cell.key["strategy"]: cell for cell in result.cells}
    assert {name: cell.status for name, cell in cells.items() if name != "ring"} == {"none": "ok", "allgather": "ok", "ulysses": "ok"}
    stored = json.loads((tmp_path / "r.json").read_text())
    assert [cell["status"] for cell in stored["cells"]] == [cell.status for cell in result.cells]
    assert children() <= before, "no process is left behind"
    return cells["ring"]


@pytest.mark.parametrize(
    ("fault", "status", "reason"),
    [("raise", "crash", "RuntimeError: planted fault"), ("kill", "crash", "SIGKILL"), ("oom", "oom", "6.00 GiB")],
)
def test_a_rank_that_fails_costs_its_cell_only(tmp_path, fault, status, reason):
    cell = faulty(tmp_path, fault)
    assert cell.status == status
    assert reason in cell.reason
    assert cell.failure.rank == 1
    assert not cell.metrics


def test_the_log_of_the_rank_that_raised_is_in_the_record(tmp_path):
    cell = faulty(tmp_path, "raise")
    assert any("planted fault" in line for line in cell.failure.log_tail)
    assert any("faulty_worker" in line for line in cell.failure.log_tail)


def test_a_rank_that_hangs_is_ended_at_the_deadline_and_its_stack_is_kept(tmp_path):
    cell = faulty(tmp_path, "hang", limits={"cell_timeout": "15s"})
    assert cell.status == "timeout"
    assert any("faulty" in line or "prepare_cell" in line for line in cell.failure.log_tail), cell.failure


@pytest.mark.parametrize(("fault", "reason"), [("wrong", "ignores the tokens of other ranks"), ("traffic", "traffic differs from its formula")])
def test_a_wrong_answer_gets_no_time(tmp_path, fault, reason):
    cell = faulty(tmp_path, fault)
    assert cell.status == "wrong"
    assert reason in cell.reason
    assert not cell.metrics
