"""A run of `cpbench project`: every cell of a plan projected, each on disk before the next, and the result file.

Cells whose compute is looked up are shared out over the cores of this machine; where it is measured, a group of processes is started for them.
How one cell is projected is decided in projecting.py.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path

from cpbench.atomic import refuse_existing
from cpbench.cell import Cell
from cpbench.cell_failure import failed
from cpbench.environment import Machine, capture
from cpbench.errors import ALL_FAILED, INTERRUPTED, SOME_FAILED, CpbenchError
from cpbench.group import GroupFailed, Job, JobCell, run_group
from cpbench.journal import Journal
from cpbench.launch import Launcher, Torchrun
from cpbench.plan import Plan, PlannedCell
from cpbench.projection.profile import load_profile
from cpbench.projection.projecting import Target, attempt, kind_of_device
from cpbench.records import not_measured
from cpbench.results import CellResult, ResultFile
from cpbench.runs import new_run, now
from cpbench.scenario import Scenario
from cpbench.stop import Stop
from cpbench.strategies import STRATEGIES

INLINE = 3  # cells that are looked up in this process: others would first have to import everything
MANY = 1 << 16  # devices, where none is needed
RANK_MODULE = "cpbench.projection.rank"

Tell = Callable[[CellResult, int], None]  # a result, and how many of the cells there are now


def imagined(machine: Machine, target: Target) -> Machine:
    """The machine that is projected to, for a plan: as many devices as are asked for. Raises CpbenchError for a device that is not known."""
    profile = load_profile(target.hardware)
    return replace(machine, device=kind_of_device(profile), devices=MANY, gpus=(profile.title,), gpu_memory_bytes=profile.memory_bytes)


def require_device(scenario: Scenario, machine: Machine, target: Target) -> None:
    """Raise CpbenchError where compute cannot be measured for the hardware on this machine."""
    profile = load_profile(target.hardware)
    if target.compute == "measured" and kind_of_device(profile) != machine.device:
        here = "no CUDA device" if machine.device == "cpu" else f"{machine.device} devices"
        raise CpbenchError(f"Compute of {profile.name} cannot be measured here: this machine has {here}.", "Leave --compute out: it is looked up then.")


def run_projection(
    scenario: Scenario,
    plan: Plan,
    machine: Machine,
    output: Path,
    target: Target,
    *,
    argv: list[str],
    notes: Sequence[str],
    tell: Tell,
    launcher: Launcher | None = None,
) -> ResultFile:
    """Project every cell of a plan and write the result file. Raises CpbenchError where that cannot be written."""
    for file in (output, output.with_suffix(".jsonl")):
        refuse_existing(file)
    run = new_run(scenario, argv, list(notes), "projection")
    profile = load_profile(target.hardware)
    environment = capture(machine) | {"running": {}, "projected_to": asdict(target) | {"title": profile.title}}
    results: dict[str, CellResult] = {}
    with Stop() as stop, contextlib.closing(Journal(output, run, environment)) as journal:

        def keep(result: CellResult) -> None:
            results[result.id] = result
            journal.add_cell(result)
            tell(result, len(results))

        able: list[Cell] = []
        for planned in plan.cells:
            reason = _refusal(planned, target)
            if reason:
                keep(not_measured(planned.cell, "unsupported", reason))
            else:
                able.append(planned.cell)
        complete = True
        try:
            for result in (
                _measured(able, scenario, plan, machine, target, launcher, stop) if target.compute == "measured" else _looked_up(able, target, machine)
            ):
                keep(result)
                stop.check()
        except KeyboardInterrupt:
            complete = False
        ordered = [results[planned.cell.id] for planned in plan.cells if planned.cell.id in results]
        run = run.model_copy(update={"ended": now(), "complete": complete})
        written = ResultFile(schema_name="cpbench.result", run=run, environment=environment, cells=ordered)
        journal.finish(written)
    return written


def exit_code(result: ResultFile) -> int:
    """0 fine, 5 some cells failed, 6 all failed, 130 interrupted."""
    if not result.run.complete:
        return INTERRUPTED
    tried = [cell.status == "ok" for cell in result.cells if cell.status != "unsupported"]
    return 0 if all(tried) else SOME_FAILED if any(tried) else ALL_FAILED


def _refusal(planned: PlannedCell, target: Target) -> str | None:
    """Why a cell cannot be projected."""
    if planned.status == "unsupported":
        return planned.reason or "not supported"
    idle = sum(not part.sequences for part in planned.cell.parts)
    if idle:
        return f"{idle} of {planned.cell.layout.dp} attention-DP groups have no sequence; the same without them is another layout"
    own = [step.strategy for part in planned.cell.parts for step in part.cell.steps if STRATEGIES[step.strategy].brings_kernels]
    if own and target.compute == "lookup":
        return f"{own[0]} brings kernels of its own, which no profile knows; measure them with --compute measured, or the nearest valid strategy is ring"
    return None


def _looked_up(cells: Sequence[Cell], target: Target, machine: Machine) -> Iterator[CellResult]:
    """The projections of cells, in the order in which they are done."""
    if len(cells) <= INLINE or machine.cores == 1:
        yield from (attempt(cell.to_dict(), target) for cell in cells)
        return
    largest = sorted(cells, key=lambda cell: -cell.layout.cp * cell.step_count)  # first, so that none of them is alone at the end
    with ProcessPoolExecutor(machine.cores, multiprocessing.get_context("spawn"), _prepare) as pool:
        try:
            for future in as_completed([pool.submit(attempt, cell.to_dict(), target) for cell in largest]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _prepare() -> None:
    """A process that looks cells up leaves the other cores to the other processes, and interrupts to its parent."""
    import signal

    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _measured(
    cells: Sequence[Cell], scenario: Scenario, plan: Plan, machine: Machine, target: Target, launcher: Launcher | None, stop: Stop
) -> Iterator[CellResult]:
    """The projections of cells whose compute is measured here, by as many processes as ranks could work at the same time."""
    by_size: dict[int, list[Cell]] = {}
    for cell in cells:
        by_size.setdefault(_processes(cell, plan, machine), []).append(cell)
    with tempfile.TemporaryDirectory(prefix="cpbench-") as folder:
        for size, members in by_size.items():
            left = dict(enumerate(members))
            for attempt in range(len(members)):
                path = Path(folder) / f"{size}-{attempt}"
                try:
                    yield from _group(left, size, path, scenario, plan, target, launcher, stop)
                except GroupFailed as failure:
                    index = failure.index if failure.index is not None else next(iter(left))
                    yield failed(left.pop(index), failure)
                if not left:
                    break


def _processes(cell: Cell, plan: Plan, machine: Machine) -> int:
    here = machine.cores // plan.threads_per_rank(cell.world_size) if cell.device == "cpu" else machine.devices
    return max(1, min(here, cell.world_size))


def _group(
    left: dict[int, Cell], size: int, folder: Path, scenario: Scenario, plan: Plan, target: Target, launcher: Launcher | None, stop: Stop
) -> Iterator[CellResult]:
    """One group of processes; cells that are done leave `left`. Raises GroupFailed."""
    cells = tuple(JobCell(index, cell, verify=False) for index, cell in left.items())
    threads = plan.threads_per_rank(max(cell.world_size for cell in left.values()))
    job = Job(size, 0, plan.device, threads, False, plan.cores, {}, scenario.limits.cell_timeout, cells, target=asdict(target))
    with contextlib.closing(run_group(launcher or Torchrun(RANK_MODULE), job, folder, scenario.limits.start_timeout, stop.check)) as events:
        for event in events:
            if event.get("event") == "done":
                yield CellResult.model_validate(event["record"])
                del left[event["index"]]
