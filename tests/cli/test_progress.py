"""What is shown while a sweep runs: plain lines and a heartbeat, or a table that grows above one line."""

from __future__ import annotations

import io
import re
import time
from pathlib import Path

from rich.console import Console

from cpbench.plan import Plan
from cpbench.records import not_measured
from cpbench.report.progress import Follow, Lines, Screen, finished_line, progress_on
from tests.unit.fakes import made

from .samples import make_cell, measured, result

OUTPUT = Path("r.json")


def stream(*, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=100, height=30, force_terminal=terminal, color_system=None, legacy_windows=False, _environ={"TERM": "xterm"})


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def plan(**fields: object) -> Plan:
    return made(seq="36k", cp="2,4", strategies="ring", **fields)[1]


def test_the_line_says_where_the_sweep_is() -> None:
    now = [0.0]
    follow = Follow(stream(), clock=lambda: now[0])
    follow.begin(plan(), OUTPUT)
    follow.launching(1, 0)
    now[0] = 3.2
    assert follow.line() == "starting 1 rank · 3 s"
    cell = make_cell("cp4", "ring")
    follow.cell_started(cell, 0)
    now[0] = 5.4
    assert follow.line() == "cell 3/3 · cp4 ring 36k · checks and memory · 2 s"
    follow.sample(cell, 4, [4.6, 4.7, 4.6, 4.6], 99.6)
    assert follow.line() == "cell 3/3 · cp4 ring 36k · pass 4 · 4.60 s · left 100 s"
    follow.sample(cell, 5, [4.6, 4.7, 4.6, 4.6, 4.5], 380.0)
    assert follow.line() == "cell 3/3 · cp4 ring 36k · pass 5 · 4.60 s ±2.2% · left 6m20"


def test_the_line_says_the_round_where_there_are_several() -> None:
    follow = Follow(stream())
    follow.begin(plan(rounds=3), OUTPUT)
    follow.launching(2, 1)
    assert follow.line().startswith("starting 2 ranks · round 2/3 · ")
    follow.cell_started(make_cell("cp2", "ring"), 1)
    assert follow.line().startswith("cell 2/3 · round 2/3 · cp2 ring 36k")


def test_finished_lines() -> None:
    assert finished_line(measured(make_cell("cp4", "ring"), [4.6] * 3), "3/3 ") == "3/3 cp4 ring 36k: 4.60 s (n=3)"
    assert finished_line(measured(make_cell("cp4", "ring", 1000, 2), [4.6, 4.7, 4.6, 4.6, 4.5])) == "cp4 ring 1000 b2: 4.60 s ±2.2% (n=5)"
    assert finished_line(not_measured(make_cell("cp4", "ring"), "oom", "no memory")) == "cp4 ring 36k: oom: no memory"


def test_without_a_terminal_every_finished_cell_is_a_line() -> None:
    console = stream()
    lines = progress_on(console, 2)
    assert isinstance(lines, Lines)
    lines.begin(plan(), OUTPUT)
    cell = make_cell("cp2", "ring")
    lines.launching(2, 0)
    lines.cell_started(cell, 0)
    lines.sample(cell, 1, [4.6], 10.0)
    lines.warn("trying once more")
    lines.cell_finished(measured(cell, [4.6] * 3))
    lines.end(result([]))
    assert written(console) == "warning: trying once more\n2/3 cp2 ring 36k: 4.60 s (n=3)\n"


def test_heartbeat() -> None:
    console = stream()
    lines = Lines(console, heartbeat=0.02)
    lines.begin(plan(), OUTPUT)
    lines.cell_started(make_cell("cp2", "ring"), 0)
    deadline = time.monotonic() + 10
    while "cp2 ring 36k · checks" not in written(console):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lines.end(result([]))
    silent_from = len(written(console))
    time.sleep(0.06)
    assert len(written(console)) == silent_from


def test_a_terminal_sees_rows_grow_above_the_line_and_then_nothing() -> None:
    console = stream(terminal=True)
    screen = progress_on(console, 2)
    assert isinstance(screen, Screen)
    screen.begin(plan(), OUTPUT)
    for layout, strategy in (("cp1", "none"), ("cp2", "ring")):
        cell = make_cell(layout, strategy)
        screen.cell_started(cell, 0)
        screen.sample(cell, 1, [4.6], 12.0)
        screen.cell_finished(measured(cell, [4.6] * 3))
    screen.warn("trying once more")
    console.print(screen)  # what the next second would draw
    drawn = written(console).split("trying once more")[1]
    assert re.search(r"cp1 +none .*baseline.*\n.*cp2 +ring .*1\.00x.*\n.*cell 2/3 · cp2 ring 36k · pass 1 · 4\.60 s · left 12 s", drawn)
    screen.end(result([]))
    assert written(console).rstrip().endswith("\x1b[2K")  # everything that was drawn is erased


def test_more_rows_than_the_screen_is_high() -> None:
    console = stream(terminal=True)
    screen = Screen(console, 2)
    for length in range(80, 101):
        screen.cell_finished(measured(make_cell("cp1", "none", 1024 * length), [4.6] * 3))
    console.print(screen)
    assert len(written(console).splitlines()) < console.height
    assert all((f"\n{length:>3}k " in written(console)) == (length > 89) for length in range(80, 101))
