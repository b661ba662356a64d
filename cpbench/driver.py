"""The parent process of a sweep: rounds, world sizes, one group of ranks at a time, and a record of every cell whatever happens.

The driver holds no device and measures nothing. It starts a group per world size with all its cells, follows what rank 0 reports, and
when a cell fails it records why and starts a fresh group for the remaining ones. Every (cell, round) is in the journal before the next
starts. How a group is watched is in group.py, how rounds are merged in records.py, how files are written in journal.py.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from cpbench.ab import alternations, with_ratio, with_rounds
from cpbench.cell import Cell
from cpbench.cell_failure import failed, with_history
from cpbench.clock_record import ClockRound
from cpbench.clocks import Clocks, Unwatched
from cpbench.environment import Machine, capture, difference, fingerprint
from cpbench.errors import ALL_FAILED, INTERRUPTED, SOME_FAILED, CpbenchError
from cpbench.group import GroupFailed, Job, JobCell, group_folders, run_group
from cpbench.journal import Journal
from cpbench.launch import Launcher, LostRank, Torchrun, inside_launch
from cpbench.pace import Pace
from cpbench.plan import Plan, PlannedCell
from cpbench.prompt import read_prompt, token_text
from cpbench.records import compare_tokens, merge_record, not_measured, rounds_done, token_reference
from cpbench.results import CellResult, ResultFile, Run
from cpbench.runs import new_run, now
from cpbench.scenario import Scenario
from cpbench.stop import Stop
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


class Tracing(Protocol):
    """What a profile adds to the sweep of its one cell."""

    @property
    def folder(self) -> Path:
        """Where the ranks put their traces."""

    def finished(self, result: CellResult, record: dict[str, Any]) -> CellResult:
        """The result of the cell with what its traces say."""


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
    clocks: Clocks | None = None,
    resume: ResultFile | None = None,
    retry: Iterable[str] = ("interrupted",),
    tracing: Tracing | None = None,
) -> ResultFile:
    """Run what is to be run of a plan and write the result file.

    With `resume`, cells that this file has are kept, except those whose status is in `retry`. After SIGINT or SIGTERM the result comes
    back with `run.complete` False. `clocks` watch the machine while passes are timed. Raises CpbenchError where the file cannot be written.
    """
    environment = capture(machine) | ({"running": resume.environment.get("running", {})} if resume else {"running": {}})
    if resume and (changed := difference(fingerprint(resume.environment), fingerprint(environment))):
        environment["resumed_with_changes"] = [list(entry) for entry in changed]
    run = resume.run.model_copy(update={"ended": None, "complete": False}) if resume else new_run(scenario, argv, notes, "profile" if tracing else "sweep")
    results, settled = _opening(plan, resume, set(retry))
    with (
        Stop() as stop,
        group_folders() as folder,
        contextlib.closing(Journal(output, run, environment, results.values(), resume=resume is not None)) as journal,
    ):
        watched = clocks or Unwatched()
        started = launcher or inside_launch() or Torchrun()
        sweep = _Sweep(scenario, plan, results, settled, environment, journal, progress, started, watched, folder, stop, tracing)
        progress.begin(plan, output)
        try:
            complete = sweep.run()
            if complete and tracing:
                sweep.read_traces(tracing)
            run = run.model_copy(update={"ended": now(), "complete": complete})
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
    clocks: Clocks
    folder: Path
    stop: Stop
    tracing: Tracing | None = None

    def __post_init__(self) -> None:
        self.index = {planned.cell.id: index for index, planned in enumerate(self.plan.cells)}
        self.pace = Pace(self.plan, self.scenario.timing, self.scenario.limits.budget)
        self.alternations = alternations(self.plan.pairs)
        self.results = {name: self._labelled(result) for name, result in self.results.items()}
        self.running: list[PlannedCell] = []  # two cells where they alternate
        self.seen: ClockRound | None = None  # of their timed passes
        self.round = self.groups = 0
        self.records: dict[str, dict[str, Any]] = {}  # the last one of each cell

    def run(self) -> bool:
        """Run everything that is open. Returns False where the user, or the end of the launch that this is inside of, ended it early."""
        try:
            for number in range(self.plan.rounds):
                self.round = number
                for world_size in self.plan.world_sizes:
                    self._world(world_size, self._order(world_size))
        except KeyboardInterrupt:
            self._mark_interrupted()
            return False
        except LostRank as lost:
            self.progress.warn(lost.message)
            self._mark_interrupted(f": {lost.reason}")
            return False
        return True

    def read_traces(self, tracing: Tracing) -> None:
        """Add what the traces say. The ranks have ended: some tools write their files only then."""
        for cell_id, record in self.records.items():
            self.results[cell_id] = tracing.finished(self.results[cell_id], record)
            self.journal.add_cell(self.results[cell_id])

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
                        if cells and not self.running and not self.pace.fits(self.plan.together(cells)[0], starting=False):
                            return None
        except GroupFailed as failure:
            failed = by_index.get(failure.index) if failure.index is not None else next(iter(self.running), None)
            if failed in cells:
                self._fail(failed, failure)
                cells.remove(failed)
            return failure
        finally:
            self.clocks.end()
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
            memory_limit=self.scenario.limits.memory,
            trace=str(self.tracing.folder) if self.tracing else None,
            cells=tuple(self._job_cell(*together) for together in self.plan.together(cells)),
        )

    def _job_cell(self, planned: PlannedCell, *others: PlannedCell) -> JobCell:
        """A cell, and the one that it alternates with."""
        verify = rounds_done(self.results.get(planned.cell.id)) == 0
        return JobCell(self.index[planned.cell.id], planned.cell, verify, self._job_cell(*others) if others else None)

    def _event(self, event: dict[str, Any], world_size: int, cells: dict[int, PlannedCell]) -> PlannedCell | None:
        """Take note of one event; returns the cell that it finished, if it did."""
        kind, planned = event.get("event"), cells.get(event.get("index", -1))
        if kind == "ready":
            self._saw_environment(world_size, event.get("environment") or {})
            self.clocks.group(event.get("gpus") or [])
        elif planned and kind == "start":
            self.running = list(next(together for together in self.plan.together(list(cells.values())) if planned in together))
            self.seen = None
            self.pace.started()
            self.progress.cell_started(planned.cell, self.round)
        elif planned and kind == "timed":
            self.clocks.begin()
        elif kind == "sampled":
            self.seen = self.clocks.end()
        elif planned and kind == "sample":
            samples = self.pace.sampled(planned, float(event["seconds"]))
            self.progress.sample(planned.cell, len(samples), samples, self.pace.seconds_left(self.running, self._to_come()))
        elif planned and kind == "done":
            self.pace.finished(planned)
            self.running = [other for other in self.running if other is not planned]
            self._record(planned.cell, event["record"])
            return planned
        return None

    def _record(self, cell: Cell, record: dict[str, Any]) -> None:
        previous = self.results.get(cell.id)
        for first in record.get("first_tokens") or [] if cell.prompt else []:
            first["text"] = token_text(self.scenario.weights or "", first["token"])
        if self.seen and record.get("samples"):
            record["clocks"] = self.seen.model_dump()
        try:
            result = merge_record(cell, previous, record)
        except CpbenchError as error:
            result = not_measured(cell, "crash", error.message, previous)
        self.records[cell.id] = record
        known = ((planned.cell, self.results[planned.cell.id]) for planned in self.plan.runnable if planned.cell.id in self.results)
        self._keep(compare_tokens(cell, result, token_reference(cell, known)), self.round if record.get("alternated") else None)

    def _fail(self, planned: PlannedCell, failure: GroupFailed) -> None:
        self.running = []
        result = failed(planned.cell, failure, self.results.get(planned.cell.id))
        try:
            name = f"cell{self.index[planned.cell.id] + 1}-"
            result = with_history(result, failure, self.journal.output, name, self.scenario.limits.memory)
        except OSError as error:
            self.progress.warn(f"the memory history of {planned.cell.label} cannot be written: {error.strerror}")
        self._keep(result)

    def _keep(self, result: CellResult, alternated: int | None = None) -> None:
        """A result that is new. `alternated`: the round of its new samples, if they alternated with those of the other variant."""
        result = self._labelled(result, alternated)
        self.results[result.id] = result
        if result.status != "ok":
            self.settled.add(result.id)
        self.journal.add_cell(result)
        self.progress.cell_finished(result)

    def _labelled(self, result: CellResult, alternated: int | None = None) -> CellResult:
        """With the variant that it is, if it is one, and how that compares with the other one."""
        variant, known = self.alternations.get(result.id), self.results.get(result.id)
        if variant is None:
            return result
        result = with_rounds(result, known.ab if known and known.ab else variant, alternated)
        return with_ratio(result, self.results.get(variant.other)) if variant.variant == "B" else result

    def _affordable(self, cells: list[PlannedCell]) -> list[PlannedCell]:
        """The cells that fit into what is left of the budget; the others are recorded as skipped, or keep the rounds that they have."""
        fitting: list[PlannedCell] = []
        for together in self.plan.together(cells):
            if self.pace.fits(together, starting=True):
                fitting += together
                continue
            for planned in together:
                self._leave_out(planned)
        return fitting

    def _leave_out(self, planned: PlannedCell) -> None:
        known, budget = self.results.get(planned.cell.id), format_seconds(self.scenario.limits.budget)
        if known and rounds_done(known):
            text = f"round {self.round + 1} of {self.plan.rounds} did not fit into the budget of {budget}"
            self._keep(known.model_copy(update={"warnings": [*known.warnings, text]}))
        else:
            self._keep(not_measured(planned.cell, "skipped", f"does not fit into the budget of {budget}", known))
        self.settled.add(planned.cell.id)

    def _saw_environment(self, world_size: int, environment: dict[str, Any]) -> None:
        if self.environment["running"].get(str(world_size)) != environment:
            self.environment["running"][str(world_size)] = environment
            self.journal.add_environment(self.environment)

    def _to_come(self) -> list[tuple[PlannedCell, int]]:
        """Cells that are still to be run, and how many rounds of each (the running one counts)."""
        open_cells = [planned for planned in self.plan.runnable if planned.cell.id not in self.settled]
        return [(planned, self.plan.rounds - rounds_done(self.results.get(planned.cell.id))) for planned in open_cells]

    def _mark_interrupted(self, why: str = "") -> None:
        """The running cell and those that never ran: a resumed sweep runs them."""
        for cell in (planned.cell for planned in self.running):
            self._keep(not_measured(cell, "interrupted", f"interrupted in round {self.round + 1} of {self.plan.rounds}{why}", self.results.get(cell.id)))
        for planned in self.plan.runnable:
            if planned.cell.id not in self.results:
                self.results[planned.cell.id] = self._labelled(not_measured(planned.cell, "interrupted", "the sweep was interrupted before this cell"))
