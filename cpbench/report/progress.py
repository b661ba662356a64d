"""How a running sweep is shown, on stderr: what was chosen, one line that moves, finished rows.

On a terminal the rows of finished cells grow above the line, and make room for the final table when the sweep ends. Elsewhere every
finished cell is one plain line, with a heartbeat once a minute. Drawing takes cores from what is measured: the screen is drawn once a
second, whatever happens.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import Segment

from cpbench.records import rounds_done
from cpbench.report.console import plain
from cpbench.report.rows import group_rows
from cpbench.report.table import Notes, rough_seconds, table
from cpbench.results import CellResult, ResultFile
from cpbench.stats import median, relative_half_width
from cpbench.units import format_seconds

if TYPE_CHECKING:
    from cpbench.cell import Cell
    from cpbench.plan import Plan

HEARTBEAT_SECONDS = 60.0
DRAWN_PER_SECOND = 1.0
OTHER_LINES = 7  # the table's head, the moving line, and room for warnings


class Silent:
    """Says nothing: `-q`."""

    def begin(self, plan: Plan, output: Path) -> None:
        """The journal is open and the first group is about to start."""

    def launching(self, world_size: int, round: int) -> None:  # noqa: A002 - the name is the driver's
        """The processes of a world size are being started."""

    def cell_started(self, cell: Cell, round: int) -> None:  # noqa: A002
        """The ranks have started on a cell."""

    def sample(self, cell: Cell, n: int, samples: list[float], seconds_left: float) -> None:
        """A timed pass is over; `samples` are all of this round, in seconds."""

    def cell_finished(self, result: CellResult) -> None:
        """A round of a cell is over, well or not."""

    def warn(self, text: str) -> None:
        """Something that the user should know and that ends nothing."""

    def end(self, result: ResultFile) -> None:
        """The sweep is over."""


class Follow(Silent):
    """Keeps the one line that describes where the sweep is. The subclasses show it."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.clock = console, clock
        self._places: dict[str, int] = {}
        self._cells = self._rounds = 0
        self._where, self._since = "starting", clock()
        self._pass: str = ""
        self._left: float | None = None

    def begin(self, plan: Plan, output: Path) -> None:
        self._places = {planned.cell.id: number for number, planned in enumerate(plan.runnable, 1)}
        self._cells, self._rounds = len(plan.runnable), plan.rounds

    def launching(self, world_size: int, round: int) -> None:  # noqa: A002
        self._now(f"starting {world_size} {'rank' if world_size == 1 else 'ranks'}{self._round(round)}")

    def cell_started(self, cell: Cell, round: int) -> None:  # noqa: A002
        self._now(f"cell {self._places.get(cell.id, '?')}/{self._cells}{self._round(round)} · {cell.label}", "checks and memory")

    def sample(self, cell: Cell, n: int, samples: list[float], seconds_left: float) -> None:
        width = relative_half_width(samples)
        self._pass = f"pass {n} · {format_seconds(median(samples))}" + (f" ±{width:.1%}" if width is not None else "")
        self._left = seconds_left

    def line(self) -> str:
        """`cell 4/10 · cp4 ring 36k · pass 3 · 4.61 s · left 1m40`."""
        left = f"left {rough_seconds(self._left)}" if self._left is not None else f"{self.clock() - self._since:.0f} s"
        return " · ".join(part for part in (self._where, self._pass, left) if part)

    def _now(self, where: str, doing: str = "") -> None:
        self._where, self._pass, self._since = where, doing, self.clock()

    def _round(self, number: int) -> str:
        return f" · round {number + 1}/{self._rounds}" if self._rounds > 1 else ""


class Lines(Follow):
    """For a pipe or a log file: a line per finished cell, and the moving line once per heartbeat."""

    def __init__(self, console: Console, heartbeat: float = HEARTBEAT_SECONDS) -> None:
        super().__init__(console)
        self._heartbeat, self._over = heartbeat, threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True)

    def begin(self, plan: Plan, output: Path) -> None:
        super().begin(plan, output)
        self._beats.start()

    def cell_finished(self, result: CellResult) -> None:
        number = self._places.get(result.id)
        self._say(finished_line(result, f"{number}/{self._cells} " if number else ""))

    def warn(self, text: str) -> None:
        self._say(f"warning: {text}")

    def end(self, result: ResultFile) -> None:
        self._over.set()
        if self._beats.is_alive():
            self._beats.join()

    def _beat(self) -> None:
        while not self._over.wait(self._heartbeat):
            self._say(self.line())

    def _say(self, text: str) -> None:
        self.console.print(plain(text), soft_wrap=True)


class Screen(Follow):
    """For a terminal: the table of finished cells and the moving line below it, redrawn in place."""

    def __init__(self, console: Console, cores: int | None) -> None:
        super().__init__(console)
        self._results: dict[str, CellResult] = {}
        self._drawn: list[Segment] = []
        self._cores = cores
        self._live = Live(self, console=console, refresh_per_second=DRAWN_PER_SECOND, transient=True, redirect_stdout=False, redirect_stderr=False)

    def begin(self, plan: Plan, output: Path) -> None:
        super().begin(plan, output)
        self._live.start()

    def cell_finished(self, result: CellResult) -> None:
        self._results[result.id] = result
        results = list(self._results.values())
        lines_per_row = 1 if len({str((cell.key.get("lengths"), cell.key.get("prefixes"))) for cell in results}) == 1 else 2  # batches are set apart
        fitting = max(1, (self.console.height - OTHER_LINES) // lines_per_row)  # what is higher than the screen cannot be redrawn
        groups = group_rows(results[-fitting:], self._cores)
        self._drawn = [segment for group in groups for segment in self.console.render(table(group, Notes(), self.console))]

    def warn(self, text: str) -> None:
        self._live.console.print(plain(f"warning: {text}", "yellow"))

    def end(self, result: ResultFile) -> None:
        self._live.stop()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._drawn  # laid out once per cell: layout takes a core for some milliseconds, and this runs every second
        yield plain(self.line(), "bold")


def progress_on(console: Console, cores: int | None) -> Follow:
    """What suits this stream."""
    return Screen(console, cores) if console.is_terminal and not console.is_dumb_terminal else Lines(console)


def finished_line(result: CellResult, place: str = "") -> str:
    """`4/10 cp4 ring 36k: 4.66 s ±1.1% (n=5)`, or the status and reason of a cell that is not ok."""
    row = group_rows([result], None)[0].rows[0]
    name = f"{place}{row.label} {row.batch.name}"
    if result.status != "ok" or row.time is None:
        return f"{name}: {result.status}: {result.reason or 'no reason recorded'}"
    width = f" ±{row.half_width:.1%}" if row.half_width is not None else ""
    rounds = f" after round {rounds_done(result)}" if rounds_done(result) > 1 else ""
    off = "" if result.cp_active else f"; {result.cp_off_reason}"
    return f"{name}: {format_seconds(row.time.median)}{width} (n={row.time.n}){rounds}{off}"
