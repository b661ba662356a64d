"""`cpbench maxseq` on the command line: its table, exit codes, JSON, lines per trial, and what is refused before anything runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import cpbench.maxseq
from cpbench.cell_failure import failed
from cpbench.group import GroupFailed
from cpbench.measure.history import Owner
from cpbench.records import merge_record, not_measured
from cpbench.report.longest import Lines
from cpbench.results import CellResult, ResultFile

from . import samples
from .conftest import CUDA, Cpbench, Golden, Pretend

OWNERS = (Owner("layer/mlp aten::linear [11776, 1024]", 46 << 20), Owner("weights", 19_005_440), Owner("embed aten::embedding [11776, 256]", 12_058_624))
CAUSE = "rank 1 ran out of memory: tried to allocate 46.0 MiB with 54.2 MiB of the limit of 100 MiB in use"
REFUSED = {
    "no layouts": ["maxseq", "--memory-limit", "64M"],
    "no limit on a CPU": ["maxseq", "--layouts", "cp2"],
    "more than the machine has": ["maxseq", "--layouts", "cp2", "--memory-limit", "100G"],
    "less than the weights": ["maxseq", "--layouts", "cp2,tp2", "--memory-limit", "1M"],
    "no size": ["maxseq", "--layouts", "cp2", "--memory-limit", "64Q"],
    "no layout": ["maxseq", "--layouts", "cpx", "--memory-limit", "64M"],
    "a layout that does not divide": ["maxseq", "--layouts", "tp3", "--memory-limit", "64M"],
    "no precision": ["maxseq", "--layouts", "cp2", "--memory-limit", "64M", "--precision", "200%"],
    "two lengths": ["maxseq", "--layouts", "cp2", "--memory-limit", "64M", "--seq", "1k,2k"],
    "what is timed": ["maxseq", "--layouts", "cp2", "--memory-limit", "64M", "--set", "timing.max_samples=3"],
    "a file that cannot be": ["maxseq", "--layouts", "cp2", "--memory-limit", "64M", "-o", "r.txt"],
}


def fitting(layout: str, strategy: str, tokens: int, peak: int) -> CellResult:
    cell = samples.make_cell(layout, strategy, tokens)
    memory = {"rank": 0, "peak_live_bytes": peak}
    return merge_record(cell, None, {"status": "ok", "timed": False, "memory": memory, "tokens_per_rank": cell.max_rows, "kernel": "cpu_flash"})


def too_long(layout: str, strategy: str, tokens: int) -> CellResult:
    reason = f"{CAUSE}; largest: {', '.join(map(str, OWNERS))}"
    result = failed(samples.make_cell(layout, strategy, tokens), GroupFailed("oom", reason, tokens, 1, ("Traceback",), OWNERS))
    return result.model_copy(update={"artifacts": [f"r.memory/{layout}-{strategy}-rank1.json", f"r.memory/{layout}-{strategy}-memory.svg"]})


def trials() -> ResultFile:
    """One layout with an answer, one that crashed on the way, one for which every length is too long, and one that cannot be."""
    result = samples.result(
        [
            fitting("cp2", "ring", 4096, 34 << 20),
            too_long("cp2", "ring", 32_768),
            too_long("cp2", "ring", 23_552),
            fitting("cp2", "ring", 23_424, 104_600_000),
            fitting("tp2", "none", 4096, 28 << 20),
            not_measured(samples.make_cell("tp2", "none", 8192), "crash", "RuntimeError: injected"),
            too_long("cp2", "ulysses", 128),
            not_measured(samples.make_cell("cp1", "none", 4096), "unsupported", "the weights alone need 36.6 MiB on a rank, more than the limit of 20.0 MiB"),
        ]
    )
    limits = {"limits": {"memory": 100 << 20}}
    return result.model_copy(update={"run": result.run.model_copy(update={"kind": "maxseq", "name": "maxseq", "scenario": limits})})


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A search whose trials are those above."""

    def run(*_: Any, progress: Any, **__: Any) -> ResultFile:
        for cell in trials().cells:
            progress.tried(cell)
        return trials()

    monkeypatch.setattr(cpbench.maxseq, "run_maxseq", run)


def test_help(cpbench_command: Cpbench, golden: Golden) -> None:
    ran = cpbench_command("maxseq", "--help")
    assert (ran.code, ran.err) == (0, "")
    golden("help_maxseq", ran.out)


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_show(columns: int, cpbench_command: Cpbench, golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    (tmp_path / "r.json").write_text(trials().model_dump_json(by_alias=True))
    ran = cpbench_command("show", "r.json")
    assert (ran.code, ran.err) == (0, "")
    assert max(len(line) for line in ran.out.splitlines()) <= columns
    golden(f"maxseq_{columns}", ran.out)


def test_trials_are_lines_and_the_table_is_the_result(planted: None, cpbench_command: Cpbench, golden: Golden) -> None:
    ran = cpbench_command("maxseq", "--layouts", "cp2,tp2", "--memory-limit", "100M", "-o", "r.json")
    assert ran.code == 5
    golden("maxseq_run", ran.err + ran.out)


def test_json_is_all_that_stdout_has(planted: None, cpbench_command: Cpbench) -> None:
    ran = cpbench_command("maxseq", "--layouts", "cp2,tp2", "--memory-limit", "100M", "-o", "r.json", "--json", "-q")
    assert (ran.code, ran.err) == (5, "")
    data = json.loads(ran.out)
    assert (data["schema"], data["memory_limit"], data["complete"]) == ("cpbench.maxseq", 100 << 20, True)
    first = data["rows"][0]
    assert (first["tokens"], first["tokens_per_rank"], first["peak_bytes"], first["fails_at"]) == (23_424, 11_712, 104_600_000, 23_552)
    assert first["owners"][0] == {"name": OWNERS[0].name, "bytes": OWNERS[0].bytes}
    assert [row["tokens"] for row in data["rows"]] == [23_424, 4096, None, None]


def test_what_is_refused_before_anything_runs(cpbench_command: Cpbench, golden: Golden) -> None:
    lines = []
    for name, arguments in REFUSED.items():
        ran = cpbench_command(*arguments, "-q")
        assert (ran.code, ran.out) == (2, ""), name
        lines += [f"{name}:", ran.err]
    golden("maxseq_refused", "\n".join(lines))


def test_a_file_is_never_overwritten_and_a_search_is_not_resumed(cpbench_command: Cpbench, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(trials().model_dump_json(by_alias=True))
    ran = cpbench_command("maxseq", "--layouts", "cp2", "--memory-limit", "64M", "-o", "r.json")
    assert (ran.code, ran.err.splitlines()[0]) == (2, "error: r.json exists.")
    ran = cpbench_command("sweep", "--resume", "-o", "r.json")
    assert (ran.code, ran.err.splitlines()[0]) == (2, "error: r.json is of maxseq, which is not continued.")


def test_a_gpu_needs_no_limit(machine: Pretend, planted: None, cpbench_command: Cpbench) -> None:
    machine(CUDA)
    assert cpbench_command("maxseq", "--layouts", "cp2", "-q").code == 5


@pytest.mark.parametrize(("terminal", "quiet"), [(True, False), (False, False), (False, True)])
def test_a_terminal_has_a_moving_line_and_quiet_has_none(terminal: bool, quiet: bool) -> None:
    stream = StringIO()
    cell, said = samples.make_cell("cp2", "ring", 4096), list[Callable[[], None]]()
    with Lines(Console(file=stream, force_terminal=terminal, width=100), quiet=quiet) as lines:
        said = [lambda: lines.starting(cell), lambda: lines.trying(cell), lambda: lines.tried(fitting("cp2", "ring", 4096, 34 << 20))]
        for say in said:
            say()
    assert ("cp2 ring: 4,096 tokens fit, 34.0 MiB" in stream.getvalue()) is not quiet
