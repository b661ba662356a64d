"""The longest sequence that fits into memory, by layout and strategy: lengths are really run, and every trial is a cell of the result.

A trial is the pass that measures memory, as a sweep runs it; nothing is timed, and only the first trial of a layout is verified. A group of ranks
gets the lengths that come next as long as all fit; the first one that does not ends it. Which lengths are tried is decided in longest.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from math import lcm
from pathlib import Path
from typing import Any, Protocol

from cpbench.cell import Cell
from cpbench.cell_failure import failed, with_history
from cpbench.environment import Machine, capture
from cpbench.errors import ALL_FAILED, INTERRUPTED, SOME_FAILED, CpbenchError
from cpbench.formulas import weights_bytes
from cpbench.group import GroupFailed, Job, JobCell, group_folders, run_group
from cpbench.journal import Journal
from cpbench.launch import Launcher, LostRank, Torchrun, inside_launch
from cpbench.longest import Search
from cpbench.plan import Plan, PlannedCell, unsupported
from cpbench.records import merge_record, not_measured
from cpbench.results import CellResult, ResultFile
from cpbench.runs import new_run, now
from cpbench.scenario import Scenario
from cpbench.stop import Stop
from cpbench.units import format_bytes

MULTIPLE = 128  # tokens: kernels and tiles like them, and nobody serves 103,331
NO_ANSWER = ("oom", "timeout")  # how a trial ends that was too long
USELESS = ("timing", "rounds", "pair", "gpus", "batches", "ab")  # fields of a scenario that would change nothing here, or ask for lengths


class Progress(Protocol):
    """What whoever watches is told."""

    def starting(self, cell: Cell) -> None: ...
    def trying(self, cell: Cell) -> None: ...
    def tried(self, result: CellResult) -> None: ...


@dataclass(frozen=True)
class Longest:
    """The answer for one layout and strategy: the longest trial that fits, the shortest that does not (or could not run), and how many there were."""

    layout: str
    strategy: str
    fits: CellResult | None
    fails: CellResult | None
    trials: int

    @property
    def tokens(self) -> int | None:
        return length_of(self.fits) if self.fits else None


def length_of(result: CellResult) -> int:
    """The new tokens of a trial's sequences."""
    return int(result.key["lengths"][0])


def answers(result: ResultFile) -> list[Longest]:
    """What the trials of a result say, in their order."""
    groups: dict[tuple[str, str], list[CellResult]] = {}
    for cell in result.cells:
        groups.setdefault((str(cell.key.get("layout")), str(cell.key.get("strategy"))), []).append(cell)
    found = []
    for (layout, strategy), cells in groups.items():
        fits = max((cell for cell in cells if cell.status == "ok"), key=length_of, default=None)
        fails = min((cell for cell in cells if cell.status != "ok"), key=length_of, default=None)
        found.append(Longest(layout, strategy, fits, fails, sum(cell.status not in ("unsupported", "skipped") for cell in cells)))
    return found


def exit_code(result: ResultFile) -> int:
    """0 where every layout has an answer, 5 where some do not, 6 where none has, 130 interrupted."""
    if not result.run.complete:
        return INTERRUPTED
    known = [answer.fits is not None for answer in answers(result)]
    return 0 if all(known) else SOME_FAILED if any(known) else ALL_FAILED


def require_limit(scenario: Scenario, plan: Plan, machine: Machine) -> None:
    """Raise CpbenchError where no limit would end the search, or where all weights are above it."""
    if scenario.device == "cpu":
        ranks = max(plan.world_sizes, default=1)
        share = machine.memory_bytes // ranks
        size = f"{share >> 30}G" if share >> 30 else f"{share >> 20}M"
        rank = "rank" if ranks == 1 else "ranks"
        hint = f"--memory-limit {size} (this machine's {format_bytes(machine.memory_bytes)} over {ranks} {rank})."
        if scenario.limits.memory is None:
            raise CpbenchError("A search on a CPU needs a memory limit: it has none of its own before the machine runs out.", f"Add {hint}")
        if scenario.limits.memory > share:
            asked = format_bytes(scenario.limits.memory)
            raise CpbenchError(f"{ranks} {rank} with {asked} each need more memory than this machine has.", f"The nearest valid value is {hint}")
    needs = [(weights_of(planned.cell), planned.cell) for planned in plan.runnable]
    least = min(needs, key=lambda need: need[0], default=None)
    if least and scenario.limits.memory is not None and least[0] > scenario.limits.memory:
        text = f"The weights of {least[1].layout} alone need {format_bytes(least[0])} on a rank, and --memory-limit is {format_bytes(scenario.limits.memory)}."
        raise CpbenchError(text, f"Give more than {format_bytes(least[0])}, or fewer --layers.")


def weights_of(cell: Cell) -> int:
    """Bytes of weights on the rank that has most."""
    return max(weights_bytes(cell, cell.layout.rank_of(stage, 0, 0)) for stage in range(cell.layout.pp))


def run_maxseq(
    scenario: Scenario,
    plan: Plan,
    machine: Machine,
    output: Path,
    *,
    precision: float,
    argv: list[str],
    notes: Sequence[str],
    progress: Progress,
    launcher: Launcher | None = None,
) -> ResultFile:
    """Search for every cell of a plan, from its length on, and write the result file. Raises CpbenchError where that cannot be written."""
    run = new_run(scenario, argv, list(notes), "maxseq")
    environment = capture(machine) | {"running": {}}
    with Stop() as stop, group_folders() as folder:
        journal = Journal(output, run, environment)
        with contextlib.closing(journal):
            trials = _Trials(scenario, plan, environment, journal, progress, launcher or inside_launch() or Torchrun(), folder, stop)
            complete, lost = True, None
            try:
                for planned in plan.cells:
                    trials.search(planned, precision)
            except KeyboardInterrupt:
                complete = False
            except LostRank as error:
                complete, lost = False, error
            run = run.model_copy(update={"ended": now(), "complete": complete})
            result = ResultFile(schema_name="cpbench.result", run=run, environment=environment, cells=list(trials.results.values()))
            journal.finish(result)
    if lost:
        raise lost
    return result


@dataclass
class _Trials:
    """The state of a running search."""

    scenario: Scenario
    plan: Plan
    environment: dict[str, Any]
    journal: Journal
    progress: Progress
    launcher: Launcher
    folder: Path
    stop: Stop
    results: dict[str, CellResult] = field(default_factory=dict)
    failures: dict[str, GroupFailed] = field(default_factory=dict)
    groups: int = 0

    def search(self, planned: PlannedCell, precision: float) -> None:
        """All trials of one layout and strategy."""
        cell, limit, weights = planned.cell, self.scenario.limits.memory, weights_of(planned.cell)
        if planned.status:
            self._keep(not_measured(cell, planned.status, planned.reason or ""))
            return
        if limit is not None and weights > limit:
            reason = f"the weights alone need {format_bytes(weights)} on a rank, more than the limit of {format_bytes(limit)}"
            self._keep(not_measured(cell, "unsupported", reason))
            return
        step = lcm(MULTIPLE, 2 * cell.layout.cp * cell.layout.tp)
        search: Search | None = Search(cell.lengths[0], step, precision)
        while search is not None and search.next is not None:
            shortest, search = search, self._group(cell, search)
        shortest = search or shortest
        if shortest.fails is not None:
            self._keep_history(of_length(cell, shortest.fails))

    def _group(self, template: Cell, search: Search) -> Search | None:
        """Run one group; what is known then, or None where this layout cannot go on."""
        cells = {length: of_length(template, length) for length in search.chain}
        able = list(takewhile(lambda length: unsupported(cells[length]) is None, cells))
        if not able:
            first = search.chain[0]
            self._keep(not_measured(cells[first], "unsupported", unsupported(cells[first]) or ""))
            return search.after(first, fitted=False)
        self.groups += 1
        self.progress.starting(cells[able[0]])
        job = self._job(template, [JobCell(length, cells[length], not search.fits and not index) for index, length in enumerate(able)])
        events = run_group(self.launcher, job, self.folder / str(self.groups), self.scenario.limits.start_timeout, self.stop.check)
        try:
            with contextlib.closing(events):
                for event in events:
                    result = self._event(event, cells)
                    if result is None:
                        continue
                    if result.status != "ok":
                        return None
                    search = search.after(length_of(result), fitted=True)
        except GroupFailed as failure:
            length = failure.index if failure.index is not None else next(length for length in able if length > search.fits)
            result = failed(cells[length], failure)
            self.failures[result.id] = failure
            self._keep(result)
            return search.after(length, fitted=False) if failure.status in NO_ANSWER else None
        return search

    def _job(self, template: Cell, cells: Sequence[JobCell]) -> Job:
        scenario, size = self.scenario, template.world_size
        return Job(
            world_size=size,
            round=0,
            device=self.plan.device,
            threads=self.plan.threads_per_rank(size),
            oversubscribed=self.plan.oversubscribed(size),
            cores=self.plan.cores,
            timing=scenario.timing.model_dump(),
            cell_timeout=scenario.limits.cell_timeout,
            weights=str(Path(scenario.weights).resolve()) if scenario.weights else None,
            memory_limit=scenario.limits.memory,
            timed=False,
            cells=tuple(cells),
        )

    def _event(self, event: dict[str, Any], cells: dict[int, Cell]) -> CellResult | None:
        """Take note of one event; the result of the trial that it ended, if it did."""
        kind, cell = event.get("event"), cells.get(event.get("index", -1))
        if kind == "ready" and str(next(iter(cells.values())).world_size) not in self.environment["running"]:
            self.environment["running"][str(next(iter(cells.values())).world_size)] = event.get("environment") or {}
            self.journal.add_environment(self.environment)
        elif cell and kind == "start":
            self.progress.trying(cell)
        elif cell and kind == "done":
            try:
                result = merge_record(cell, None, event["record"])
            except CpbenchError as error:
                result = not_measured(cell, "crash", error.message)
            self._keep(result)
            return result
        return None

    def _keep(self, result: CellResult) -> None:
        self.results[result.id] = result
        self.journal.add_cell(result)
        self.progress.tried(result)

    def _keep_history(self, cell: Cell) -> None:
        """Store how memory ran out in the shortest trial that did not fit; a disk that is full costs the picture only."""
        failure, name = self.failures.get(cell.id), f"{cell.layout}-{cell.strategy}-".replace("/", "-")
        if failure is not None:
            with contextlib.suppress(OSError):
                self.results[cell.id] = with_history(self.results[cell.id], failure, self.journal.output, name, self.scenario.limits.memory)
                self.journal.add_cell(self.results[cell.id])


def of_length(cell: Cell, length: int) -> Cell:
    """The same cell with sequences of another length."""
    return replace(cell, lengths=(length,) * len(cell.lengths))
