"""Runs of projections: what is looked up and what groups of processes measure, failures that cost one cell, interruption, and exit codes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cpbench.cell import Cell
from cpbench.environment import Machine
from cpbench.errors import ALL_FAILED, INTERRUPTED, SOME_FAILED, CpbenchError
from cpbench.plan import Plan, make_plan
from cpbench.projection import rank
from cpbench.projection.projecting import Target, attempt, passes_of
from cpbench.projection.running import exit_code, imagined, require_device, run_projection
from cpbench.projection.simulated import classes
from cpbench.projection.tape import Script, Section
from cpbench.reading import read
from cpbench.results import CellResult, ResultFile
from cpbench.scenario import Scenario, parse_scenario, resolve
from cpbench.strategies import external
from tests.unit.fakes import CPU, Action, FakeGroup, FakeLauncher, raises

MEASURED = Target("cpu", gpus_per_node=8, compute="measured")
Tell = Callable[[CellResult, int], None]


def described(target: Target = MEASURED, **fields: Any) -> tuple[Scenario, Plan]:
    machine = imagined(CPU, target)
    asked = {"model": "qwen3-tiny", "layers": 1, "seq": "256", "cp": "2", "strategies": "ring", "baseline": False, **fields}
    scenario, _ = resolve(parse_scenario(asked), machine)
    return scenario, make_plan(scenario, machine)


def projected(
    folder: Path, launcher: FakeLauncher | None = None, target: Target = MEASURED, tell: Tell = lambda result, done: None, machine: Machine = CPU, **fields: Any
) -> ResultFile:
    scenario, plan = described(target, **fields)
    return run_projection(scenario, plan, machine, folder / "p.json", target, argv=["project"], notes=[], tell=tell, launcher=launcher)


def measures(*seconds: Sequence[float]) -> Action:
    """Every process measures every rank that differs, and takes so long for it, pass by pass."""

    def act(group: FakeGroup, entry: dict[str, Any]) -> bool:
        cell = Cell.from_dict(entry["cell"])
        ranks, file, size = classes(cell), Path(group.job["events"]).with_name("scripts"), group.job["world_size"]
        for process in range(size):
            passes = [Script((Section((), taken),)) for taken in seconds[process % len(seconds)]]
            rank.write(file, process, dict.fromkeys(ranks, passes))
        found = attempt(entry["cell"], Target(**group.job["target"]), passes_of(cell, rank.read(file, size)), "a CPU")
        group.event(event="done", index=entry["index"], record=found.model_dump(mode="json"))
        return True

    return act


def statuses(result: ResultFile) -> list[str]:
    return [cell.status for cell in result.cells]


def seconds_of(result: ResultFile) -> list[float]:
    return [cell.metrics["projected_ttft_s"].median for cell in result.cells]


def test_of_measured_passes_the_one_in_the_middle_is_expected_and_the_band_reaches_over_all(tmp_path: Path) -> None:
    result = projected(tmp_path, FakeLauncher({"tp2": measures([1.0, 2.0, 7.0], [1.0, 3.0, 1.0])}), cp="1", tp="2", strategies="none")
    (cell,) = result.cells
    transfers = cell.metrics["projected_ttft_s"].median - 3.0
    assert 0 <= transfers < 0.1  # all start together, and the later of the two is who is waited for: 1, 3 and 7 seconds
    assert cell.projection is not None and cell.projection.ranks_simulated == 1 and cell.projection.band_jitter == 0
    assert cell.projection.band == pytest.approx((1.0, 7.0), abs=0.1)


def test_measured_work_is_that_of_the_slowest_process_and_its_device_is_named(tmp_path: Path) -> None:
    launcher = FakeLauncher({"cp2": measures([3.0], [5.0])})
    result = projected(tmp_path, launcher)
    assert seconds_of(result) == [5.0]
    projection = result.cells[0].projection
    assert projection is not None and projection.compute == "measured on a CPU"
    assert launcher.jobs == [(2, 0, ["cp2 ring 256"])]
    assert launcher.groups[0].job["threads"] == 1
    assert exit_code(result) == 0


def test_ranks_beyond_the_cores_are_measured_by_as_many_processes_as_there_are_cores(tmp_path: Path) -> None:
    launcher = FakeLauncher({"cp": measures([1.0])})
    result = projected(tmp_path, launcher, cp="1,2,8")
    assert sorted(world for world, _, _ in launcher.jobs) == [1, 2]
    assert {cell.world_size for cell in result.cells} == {1, 2, 8}
    assert statuses(result) == ["ok"] * 3


def test_a_cell_that_fails_costs_itself_and_the_others_go_on(tmp_path: Path) -> None:
    launcher = FakeLauncher({"ring": raises(), "allgather": measures([1.0]), "ulysses": measures([2.0])})
    result = projected(tmp_path, launcher, strategies="allgather,ring,ulysses")
    found = {cell.key["strategy"]: cell for cell in result.cells}
    assert {name: cell.status for name, cell in found.items()} == {"allgather": "ok", "ring": "crash", "ulysses": "ok"}
    assert found["ring"].reason == "RuntimeError: boom"
    assert len(launcher.groups) == 2
    assert exit_code(result) == SOME_FAILED


def test_where_all_fail_so_does_the_run(tmp_path: Path) -> None:
    result = projected(tmp_path, FakeLauncher({"ring": raises()}))
    assert (statuses(result), exit_code(result)) == (["crash"], ALL_FAILED)


@pytest.mark.parametrize("target", [MEASURED, Target("cpu", gpus_per_node=8)])
def test_an_interruption_keeps_what_is_done(tmp_path: Path, target: Target) -> None:
    def tell(result: CellResult, done: int) -> None:
        if done == 1:
            os.kill(os.getpid(), signal.SIGINT)

    result = projected(tmp_path, FakeLauncher({"cp": measures([1.0])}), target, tell, cp="2,4", machine=replace(CPU, cores=1))
    assert (len(result.cells), result.run.complete, exit_code(result)) == (1, False, INTERRUPTED)
    assert read(tmp_path / "p.json") == result


def test_cells_that_cannot_be_projected_say_why_and_are_no_failure(tmp_path: Path) -> None:
    result = projected(tmp_path, target=Target("cpu", gpus_per_node=8), cp="2,3", strategies="ring,ulysses", dp="1,2")
    reasons = " ".join(cell.reason or "" for cell in result.cells)
    assert "have no sequence" in reasons and "do not divide over" in reasons
    assert set(statuses(result)) == {"ok", "unsupported"}
    assert exit_code(result) == 0


def test_kernels_that_a_library_brings_have_no_price(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(external, "missing", lambda modules, how: None)
    result = projected(tmp_path, target=Target("h200"), strategies="ring,ring-flash-attn", dtype="bfloat16")
    found = {cell.key["strategy"]: (cell.status, cell.reason or "") for cell in result.cells}
    assert found["ring"] == ("ok", "")
    assert found["ring-flash-attn"][0] == "unsupported"
    assert "brings kernels of its own" in found["ring-flash-attn"][1] and "--compute measured" in found["ring-flash-attn"][1]


def test_a_program_that_raises_is_a_crash_of_its_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def project(cell: Cell, *_: object) -> CellResult:
        raise RuntimeError("no such shape\nand more")

    monkeypatch.setattr("cpbench.projection.projecting.project", project)
    result = projected(tmp_path, target=Target("cpu", gpus_per_node=8))
    assert [(cell.status, cell.reason) for cell in result.cells] == [("crash", "RuntimeError: no such shape")]


def test_the_file_says_what_it_is_and_has_projected_values_only(tmp_path: Path) -> None:
    told: list[int] = []
    result = projected(tmp_path, target=Target("cpu", gpus_per_node=8), tell=lambda cell, done: told.append(done), strategies="ring,ulysses")
    assert read(tmp_path / "p.json") == result
    assert told == [1, 2]
    assert result.run.kind == "projection" and result.run.complete
    assert result.environment["projected_to"]["hardware"] == "cpu"
    for cell in result.cells:
        assert cell.projection is not None and cell.memory is None
        assert all(name.startswith("projected_") for name in cell.metrics)
        low, high = cell.projection.band
        assert low <= cell.metrics["projected_ttft_s"].median <= high
        assert 0 < cell.metrics["projected_light_fraction"].median < 1


def test_many_cells_are_shared_out_over_processes_and_come_back_in_the_order_of_the_plan(tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    alone = projected(tmp_path / "alone", target=Target("cpu", gpus_per_node=8), machine=replace(CPU, cores=1), cp="2,4", strategies="ring,allgather")
    shared = projected(tmp_path, target=Target("cpu", gpus_per_node=8), cp="2,4", strategies="ring,allgather")
    assert [cell.id for cell in shared.cells] == [cell.id for cell in alone.cells]
    assert seconds_of(shared) == pytest.approx(seconds_of(alone))


def test_a_machine_is_imagined_with_the_devices_of_a_profile() -> None:
    machine = imagined(CPU, Target("h200"))
    assert (machine.device, machine.gpus) == ("cuda", ("NVIDIA H200 SXM 141 GB",))
    assert machine.gpu_memory_bytes == 141_000_000_000 and machine.cores == CPU.cores
    with pytest.raises(CpbenchError, match="h2000"):
        imagined(CPU, Target("h2000"))


def test_compute_is_measured_on_devices_of_its_kind_only() -> None:
    scenario, _ = described()
    require_device(scenario, CPU, MEASURED)
    require_device(scenario, CPU, Target("h200"))
    with pytest.raises(CpbenchError, match="Compute of h200 cannot be measured here: this machine has no CUDA device"):
        require_device(scenario, CPU, Target("h200", compute="measured"))
    with pytest.raises(CpbenchError, match="this machine has cuda devices"):
        require_device(scenario, replace(CPU, device="cuda", devices=1), MEASURED)
