"""The parent process of a sweep: rounds, world sizes, one group of ranks at a time, and a record of every cell whatever happens.

The driver holds no device and measures nothing. It starts a group per world size with all its cells, follows what rank 0 reports, and
when a cell fails it records why and starts a fresh group for the remaining ones. Every (cell, round) is in the journal before the next
starts. How a group is watched is in group.py, how rounds are merged in records.py, how files are written in journal.py.
"""

from __future__ import annotations

import contextlib
import random
import signal
import tempfile
import threading
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import cpbench
from cpbench.cell import Cell
from cpbench.environment import Machine, capture, difference, fingerprint, git_state
from cpbench.errors import ALL_FAILED, INTERRUPTED, SOME_FAILED, CpbenchError
from cpbench.group import GroupFailed, Job, JobCell, run_group
from cpbench.journal import Journal
from cpbench.launch import Launcher, Torchrun
from cpbench.pace import Pace
from cpbench.plan import Plan, PlannedCell
from cpbench.prompt import read_prompt, token_text
from cpbench.records import compare_tokens, merge_record, not_measured, rounds_done, token_reference
from cpbench.results import CellResult, Failure, ResultFile, Run
from cpbench.scenario import Scenario
from cpbench.units import format_seconds

START_ATTEMPTS = 2


class Progress(Protocol):
    """What the driver tells whoever watches. Rounds count from 0; seconds are of the whole sweep."""

    def begin(self, plan: Plan, output: Path) -> None: ...
    def launching(self, world_size: int, round: int) -> None: ...  # noqa: A002
    def cell_started(self, cell: Cell, round: int) -> None: ...  # noqa: A002
    def sample(self, cell: Cell, n: int, samples: list[float], seconds_left: float) -> None: ...
    def cell_finished(self, result: CellResult) -> None: ...
    def warn(self, text: str) -> None: ...
    def end(self, result: ResultFile) -> None: ...


def run_sweep(
    scenario: Scenario,
    plan: Plan,
    machine: Machine,
    output: Path,
    *,
    argv: list[str],
    notes: list[str],
    progress: Progress,
    launcher: Launcher | None = None,
    resume: ResultFile | None = None,
    retry: Iterable[str] = ("interrupted",),
) -> ResultFile:
    """Run what is to be run of a plan and write the result file.

    With `resume`, cells that this file has are kept, except those whose status is in `retry`. After SIGINT or SIGTERM the result comes
    back with `run.complete` False. Raises CpbenchError where the file cannot be written.
    """
    environment = capture(machine) | ({"running": resume.environment.get("running", {})} if resume else {"running": {}})
    if resume and (changed := difference(fingerprint(resume.environment), fingerprint(environment))):
        environment["resumed_with_changes"] = [list(entry) for entry in changed]
    run = resume.run.model_copy(update={"ended": None, "complete": False}) if resume else _new_run(scenario, argv, notes)
    results, settled = _opening(plan, resume, set(retry))
    journal = Journal(output, run, environment, results.values(), resume=resume is not None)
    with _Stop() as stop, tempfile.TemporaryDirectory(prefix="cpbench-") as folder, contextlib.closing(journal):
        sweep = _Sweep(scenario, plan, results, settled, environment, journal, progress, launcher or Torchrun(), Path(folder), stop)
        progress.begin(plan, output)
        try:
            complete = sweep.run()
            run = run.model_copy(update={"ended": _now(), "complete": complete})
            journal.finish(sweep.result(run))
        finally:
            result = sweep.result(run)
            progress.end(result)
    return result


def exit_code(result: ResultFile) -> int:
    """0 fine, 5 some cells failed, 6 all failed, 130 interrupted. Unsupported and skipped cells are not failures."""
    if not result.run.complete:
        return INTERRUPTED
    tried = [cell.status for cell in result.cells if cell.status not in ("unsupported", "skipped")]
    failed = [status for status in tried if status != "ok"]
    return 0 if not failed else ALL_FAILED if len(failed) == len(tried) else SOME_FAILED


def _opening(plan: Plan, resume: ResultFile | None, retry: set[str]) -> tuple[dict[str, CellResult], set[str]]:
    """What is known of the cells before the start, and the ids of those that are settled."""
    old = {cell.id: cell for cell in resume.cells} if resume else {}
    results: dict[str, CellResult] = {}
    settled: set[str] = set()
    for planned in plan.cells:
        cell, known = planned.cell, old.get(planned.cell.id)
        if planned.status:
            results[cell.id] = known if known and known.status == "ok" else not_measured(cell, planned.status, planned.reason or "")
            settled.add(cell.id)
        elif known and known.status != "skipped":  # skipped, though it can run: the budget had ended
            results[cell.id] = known
            if known.status != "ok" and known.status not in retry:
                settled.add(cell.id)
    return results, settled


@dataclass
class _Sweep:
    """The state of a running sweep."""

    scenario: Scenario
    plan: Plan
    results: dict[str, CellResult]
    settled: set[str]
    environment: dict[str, Any]
    journal: Journal
    progress: Progress
    launcher: Launcher
    folder: Path
    stop: _Stop

    def __post_init__(self) -> None:
        self.index = {planned.cell.id: index for index, planned in enumerate(self.plan.cells)}
        self.pace = Pace(self.plan, self.scenario.timing, self.scenario.limits.budget)
        self.running: PlannedCell | None = None
        self.round = self.groups = 0

    def run(self) -> bool:
        """Run everything that is open. Returns False where the user ended it early."""
        try:
            for number in range(self.plan.rounds):
                self.round = number
                for world_size in self.plan.world_sizes:
                    self._world(world_size, self._order(world_size))
        except KeyboardInterrupt:
            self._mark_interrupted()
            return False
        return True

    def result(self, run: Run) -> ResultFile:
        """All that is known, in the order of the plan."""
        cells = [self.results[planned.cell.id] for planned in self.plan.cells if planned.cell.id in self.results]
        return ResultFile(schema_name="cpbench.result", run=run, environment=self.environment, cells=cells)

    def _order(self, world_size: int) -> list[PlannedCell]:
        """Open cells of a world size. The first round keeps the plan's order (the baseline comes first), later ones are shuffled."""
        cells = [p for p in self.plan.runnable if p.cell.world_size == world_size and self._is_open(p)]
        if self.round:
            random.Random(f"{self.scenario.seed}/{self.round}/{world_size}").shuffle(cells)
        return cells

    def _is_open(self, planned: PlannedCell) -> bool:
        return planned.cell.id not in self.settled and rounds_done(self.results.get(planned.cell.id)) <= self.round

    def _world(self, world_size: int, cells: list[PlannedCell]) -> None:
        """One round of one world size: as many groups as it takes."""
        attempts = 0
        while cells := self._affordable(cells):
            before = len(cells)
            failure = self._group(world_size, cells)
            if failure is None:
                continue
            attempts = attempts + 1 if len(cells) == before else 0
            if attempts == START_ATTEMPTS:
                for planned in cells:
                    self._fail(planned, failure)
                return
            if attempts:
                self.progress.warn(f"{world_size} ranks: {failure.reason}; trying once more")

    def _group(self, world_size: int, cells: list[PlannedCell]) -> GroupFailed | None:
        """Run one group. Cells that are done with, well or not, are removed from `cells`. Returns why it ended early, if it did."""
        self.groups += 1
        self.progress.launching(world_size, self.round)
        by_index = {self.index[planned.cell.id]: planned for planned in cells}
        group = run_group(self.launcher, self._job(world_size, cells), self.folder / str(self.groups), self.scenario.limits.start_timeout, self.stop.check)
        try:
            with contextlib.closing(group):
                for event in group:
                    finished = self._event(event, world_size, by_index)
                    if finished:
                        cells.remove(finished)
                        if cells and not self.pace.fits(cells[0], starting=False):
                            return None
        except GroupFailed as failure:
            failed = by_index.get(failure.index) if failure.index is not None else self.running
            if failed in cells:
                self._fail(failed, failure)
                cells.remove(failed)
            return failure
        return GroupFailed("crash", f"the ranks ended without {cells[0].cell.label}") if cells else None

    def _job(self, world_size: int, cells: list[PlannedCell]) -> Job:
        return Job(
            world_size=world_size,
            round=self.round,
            device=self.plan.device,
            threads=self.plan.threads_per_rank(world_size),
            oversubscribed=self.plan.oversubscribed(world_size),
            cores=self.plan.cores,
            timing=self.scenario.timing.model_dump(),
            cell_timeout=self.scenario.limits.cell_timeout,
            weights=str(Path(self.scenario.weights).resolve()) if self.scenario.weights else None,
            prompt=tuple(read_prompt(self.scenario.weights, self.scenario.prompt)) if self.scenario.weights and self.scenario.prompt else None,
            cells=tuple(JobCell(self.index[p.cell.id], p.cell, rounds_done(self.results.get(p.cell.id)) == 0) for p in cells),
        )

    def _event(self, event: dict[str, Any], world_size: int, cells: dict[int, PlannedCell]) -> PlannedCell | None:
        """Take note of one event; returns the cell that it finished, if it did."""
        kind, planned = event.get("event"), cells.get(event.get("index", -1))
        if kind == "ready":
            self._saw_environment(world_size, event.get("environment") or {})
        elif planned and kind == "start":
            self.running = planned
            self.pace.started()
            self.progress.cell_started(planned.cell, self.round)
        elif planned and kind == "sample":
            samples = self.pace.sampled(float(event["seconds"]))
            self.progress.sample(planned.cell, len(samples), samples, self.pace.seconds_left(planned, self._to_come()))
        elif planned and kind == "done":
            self.pace.finished(planned)
            self.running = None
            self._record(planned.cell, event["record"])
            return planned
        return None

    def _record(self, cell: Cell, record: dict[str, Any]) -> None:
        previous = self.results.get(cell.id)
        for first in record.get("first_tokens") or [] if cell.prompt else []:
            first["text"] = token_text(self.scenario.weights or "", first["token"])
        try:
            result = merge_record(cell, previous, record)
        except CpbenchError as error:
            result = not_measured(cell, "crash", error.message, previous)
        known = ((planned.cell, self.results[planned.cell.id]) for planned in self.plan.runnable if planned.cell.id in self.results)
        self._keep(compare_tokens(cell, result, token_reference(cell, known)))

    def _fail(self, planned: PlannedCell, failure: GroupFailed) -> None:
        details = Failure(rank=failure.rank, log_tail=list(failure.log_tail))
        self.running = None
        self._keep(not_measured(planned.cell, failure.status, failure.reason, self.results.get(planned.cell.id), details))

    def _keep(self, result: CellResult) -> None:
        self.results[result.id] = result
        if result.status != "ok":
            self.settled.add(result.id)
        self.journal.add_cell(result)
        self.progress.cell_finished(result)

    def _affordable(self, cells: list[PlannedCell]) -> list[PlannedCell]:
        """The cells that fit into what is left of the budget; the others are recorded as skipped, or keep the rounds that they have."""
        fitting = []
        for planned in cells:
            if self.pace.fits(planned, starting=True):
                fitting.append(planned)
                continue
            known, budget = self.results.get(planned.cell.id), format_seconds(self.scenario.limits.budget)
            if known and rounds_done(known):
                text = f"round {self.round + 1} of {self.plan.rounds} did not fit into the budget of {budget}"
                self._keep(known.model_copy(update={"warnings": [*known.warnings, text]}))
            else:
                self._keep(not_measured(planned.cell, "skipped", f"does not fit into the budget of {budget}", known))
            self.settled.add(planned.cell.id)
        return fitting

    def _saw_environment(self, world_size: int, environment: dict[str, Any]) -> None:
        if self.environment["running"].get(str(world_size)) != environment:
            self.environment["running"][str(world_size)] = environment
            self.journal.add_environment(self.environment)

    def _to_come(self) -> list[tuple[PlannedCell, int]]:
        """Cells that are still to be run, and how many rounds of each (the running one counts)."""
        open_cells = [planned for planned in self.plan.runnable if planned.cell.id not in self.settled]
        return [(planned, self.plan.rounds - rounds_done(self.results.get(planned.cell.id))) for planned in open_cells]

    def _mark_interrupted(self) -> None:
        """The running cell and those that never ran: a resumed sweep runs them."""
        if self.running:
            cell = self.running.cell
            self._keep(not_measured(cell, "interrupted", f"interrupted in round {self.round + 1} of {self.plan.rounds}", self.results.get(cell.id)))
        for planned in self.plan.runnable:
            if planned.cell.id not in self.results:
                self.results[planned.cell.id] = not_measured(planned.cell, "interrupted", "the sweep was interrupted before this cell")


class _Stop:
    """SIGINT and SIGTERM as a flag: the sweep ends at the next poll, never in the middle of a write."""

    def __init__(self) -> None:
        self._asked = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _ask(self, *_: object) -> None:
        self._asked = True

    def check(self) -> None:
        """Raises KeyboardInterrupt if the sweep is to end."""
        if self._asked:
            raise KeyboardInterrupt


def _new_run(scenario: Scenario, argv: list[str], notes: list[str]) -> Run:
    return Run(
        id=uuid.uuid4().hex[:12],
        name=scenario.name,
        argv=argv,
        scenario=scenario.model_dump(mode="json"),
        defaults=notes,
        started=_now(),
        cpbench_version=cpbench.__version__,
        git=git_state(),
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
