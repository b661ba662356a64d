"""How results look on a terminal: the table that `sweep` ends with and `show` prints, and the lines below it.

Pure: a result and a width become renderables. What the numbers are is decided in rows.py. Files are untrusted, so every text from
one is printed as it is, without markup and without control characters.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleRenderable
from rich.table import Table
from rich.text import Text

from cpbench.report.advice import advice_lines
from cpbench.report.columns import Column, fitting
from cpbench.report.console import plain
from cpbench.report.rows import Group, Row, group_rows
from cpbench.report.variants import variant_lines
from cpbench.results import FAILED, ResultFile
from cpbench.summary import Comparable
from cpbench.units import format_bytes, format_count, format_seconds

TIME_NAMES = {"prefill": "TTFT", "layer": "layer time", "attention": "attention time"}
OVERSUBSCRIBED = "*"
CP_OFF = "CP off"
MAX_LOG_LINES = 12
MUCH_MORE_WORK = 1.25  # own work of a rank over the median


def result_view(result: ResultFile, folder: Path, console: Console, kept: Collection[str] | None = None) -> list[ConsoleRenderable]:
    """Everything that is said about a result that lies in `folder`: tables that fit the console's width, marks explained, failures with their logs.

    With `kept`, only the cells with these ids are shown. They are still compared with baselines that are not.
    """
    groups = group_rows(result.cells, cores_of(result.environment))
    if kept is not None:
        groups = [group for group in (group.only(kept) for group in groups) if group.rows]
    notes = Notes()
    view: list[ConsoleRenderable] = []
    for group in groups:
        view += [plain(title(group), "bold"), table(group, notes, console)]
    if not result.cells:
        view.append(plain("No cell has been recorded."))
    view += [plain(line) for line in footnotes(groups, notes, cores_of(result.environment))]
    view += [line for group in groups for row in group.rows if row.cell.status in FAILED for line in _log(row, folder)]
    view += [plain(line) for line in variant_lines(groups)]
    for group in groups:
        of = f"{title(group)}: " if len(groups) > 1 else ""
        view += [plain(of + "of what is shown, " * bool(group.hidden) + line) for line in advice_lines(group, OVERSUBSCRIBED)]
    return [*view, plain(provenance(result), "dim")]


def table(group: Group, notes: Notes, console: Console) -> Table:
    """The rows of a group. Columns that do not fit are left out, the least important first."""
    return fitting(group.rows, columns_of(group, notes), console, _style, lambda above, below: above.batch != below.batch)


class Notes:
    """Warnings of all cells, numbered once each."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def marks(self, row: Row) -> str:
        """The marks of a row: `*` for oversubscribed, `CP off` where it was off, numbers for why it was and for warnings."""
        cell = row.cell
        off = [] if cell.cp_active else [cell.cp_off_reason or "context parallelism was off; no reason recorded"]
        texts = list(dict.fromkeys([*off, *cell.warnings]))
        self.texts += [text for text in texts if text not in self.texts]
        numbers = [str(self.texts.index(text) + 1) for text in texts]
        return " ".join([*([OVERSUBSCRIBED] if cell.oversubscribed else []), *([CP_OFF] if off else []), *numbers])


def _style(row: Row) -> str:
    return "" if row.cell.status == "ok" else "dim" if row.cell.status not in FAILED else "red"


def columns_of(group: Group, notes: Notes) -> list[Column[Row]]:
    batches = group.batches
    seqs, counts = {batch.exact for batch in batches}, {len(batch.lengths) for batch in batches}
    time = TIME_NAMES.get(str(group.common.get("target")), "time")
    columns: list[Column[Row]] = [
        Column("layout", lambda row: row.layout, justify="left"),
        Column("strategy", lambda row: row.strategy, justify="left"),
        Column("partition", lambda row: str(row.cell.key.get("partition")), keep=0, justify="left"),
        Column("tokens\n/rank", lambda row: _count(row.cell.tokens_per_rank), keep=1),
        Column(f"{time}\nmedian", lambda row: format_seconds(row.time.median if row.time else None)),
        Column("95%\nCI", lambda row: _percent(row.half_width, sign="±"), keep=7),
        Column("n", lambda row: str(row.time.n) if row.time else "-", keep=3),
        Column("speed-up", lambda row: "baseline" if row.is_baseline else _ratio(row.speed_up, "x")),
        Column("effi-\nciency", lambda row: _percent(row.efficiency, digits=0), keep=8),
        Column("work\nbalance", lambda row: _ratio(row.balance), keep=2),
        Column("peak mem\n/rank", lambda row: format_bytes(row.memory_bytes), keep=9),
        Column("received\n/rank", lambda row: format_bytes(row.received_bytes), keep=6),
        Column("error\nratio", lambda row: _ratio(row.cell.numerics.ratio if row.cell.numerics else None), keep=4),
    ]
    if any(row.exposed is not None for row in group.rows):
        columns.insert(-2, Column("exposed\ncomm", lambda row: _percent(row.exposed, digits=0), keep=10))
    if any(row.light is not None for row in group.rows):
        columns.insert(-2, Column("speed\nof light", lambda row: _percent(row.light, digits=0), keep=5))
    if len(counts) > 1:
        columns.insert(0, Column("batch", lambda row: str(len(row.batch.lengths))))
    if len(seqs) > 1:
        columns.insert(0, Column("seq", lambda row: row.batch.label))
    if any(row.cell.status != "ok" for row in group.rows):
        columns.append(Column("status", lambda row: row.cell.status, justify="left"))
    marks = {row.cell.id: notes.marks(row) for row in group.rows}
    if any(marks.values()):
        columns.append(Column("notes", lambda row: marks[row.cell.id], justify="left"))
    return columns


def title(group: Group) -> str:
    """What all rows have in common: `TTFT of qwen3-tiny, 1 layer, float32 on cpu, 36k = 36,864 tokens`."""
    common = group.common
    layers = common.get("layers")
    parts = [f"{TIME_NAMES.get(str(common.get('target')), 'time')} of {common.get('model')}"]
    if common.get("target") == "prefill":
        parts.append(f"{layers} layer" if layers == 1 else f"{layers} layers")
    parts.append(f"{common.get('dtype')} on {common.get('device')}")
    parts += [f"kernel {name}" for name in sorted({row.cell.kernel for row in group.rows if row.cell.kernel})]
    batches = group.batches
    if len({batch.exact for batch in batches}) == 1 and batches[0].lengths:
        parts.append(batches[0].exact)
    if len({len(batch.lengths) for batch in batches}) == 1 and len(batches[0].lengths) > 1:
        parts.append(f"batch {len(batches[0].lengths)}")
    options = common.get("options")
    parts += [_option(name, value) for name, value in options.items()] if isinstance(options, dict) else []
    return ", ".join(parts)


def _option(name: str, value: object) -> str:
    """`chunk 4,096`, `deterministic`."""
    if value is True:
        return name
    return f"{name} {format_count(value) if type(value) is int else value}"


def footnotes(groups: Iterable[Group], notes: Notes, cores: int | None) -> Iterator[str]:
    """The lines below the tables: baselines that are not cp1, marks, and the reason of every cell that is not ok."""
    groups = list(groups)
    for group in groups:
        for batch, rows in group.by_batch.items():
            baseline = group.baselines.get(batch)
            others = [row for row in rows if not row.is_baseline]
            why = ["cp1 has no result;"] * (baseline is not None and baseline.layout != "cp1")
            hidden = ", which the filter leaves out" if baseline in group.hidden else ""
            if baseline and (why or hidden) and others:
                yield f"{batch.label}: {' '.join([*why, 'speed-up and efficiency compare with'])} {baseline.label}{hidden}."
    if any(row.cell.oversubscribed for group in groups for row in group.rows):
        on = f"the {cores} cores" if cores else "the cores"
        yield f"{OVERSUBSCRIBED}: oversubscribed, more threads than cores. Efficiency compares with what {on} could do, not the ranks."
    yield from (f"{number}: {text}" for number, text in enumerate(notes.texts, 1))
    yield from _continuations(groups)
    for group in groups:
        yield from (f"{row_label(row, group)}: {text}" for row in group.rows if (text := _slow_rank(row)))
    for group in groups:
        for row in group.rows:
            if row.cell.status != "ok":
                yield f"{row_label(row, group)}: {row.cell.status}: {row.cell.reason or 'no reason recorded'}"


def _slow_rank(row: Row) -> str | None:
    """Which rank the others wait for, where it has much more to do."""
    split = row.cell.split
    if split is None or split.compute_skew is None or split.compute_skew < MUCH_MORE_WORK:
        return None
    return f"rank {split.rank} computes {split.compute_skew:.2f} times as long as the median rank, and the others wait for it."


def _continuations(groups: Iterable[Group]) -> Iterator[str]:
    """The first tokens of prompts, each with the rows that found it."""
    found: dict[str, list[str]] = {}
    for group in groups:
        for row in group.rows:
            for first in row.cell.first_tokens:
                if first.text is not None:
                    found.setdefault(f"{json.dumps(first.text, ensure_ascii=False)} (token {first.token})", []).append(row_label(row, group))
    for text, rows in found.items():
        yield f"The prompt goes on with {text}" + (f": {', '.join(rows)}." if len(found) > 1 else ".")


def row_label(row: Row, group: Group) -> str:
    """`cp4 ring`, with the batch where rows of the group differ in it."""
    return row.label + (f" {row.batch.name}" if len(group.batches) > 1 else "")


def closing_lines(result: ResultFile, file: Path) -> list[str]:
    """Where the result is, and the next command to type."""
    name = shlex.quote(str(file))
    failed = [status for status in FAILED if status != "interrupted" and any(cell.status == status for cell in result.cells)]
    lines = [f"Result: {file}"]
    if result.run.kind == "profile" and (failed or not result.run.complete):
        lines.append("Profile it again with another file, which -o names.")
    elif not result.run.complete:
        lines.append(f"Continue with: cpbench sweep --resume -o {name}")
    elif failed:
        lines.append(f"Try the failed cells again with: cpbench sweep --resume --retry {','.join(failed)} -o {name}")
    else:
        lines.append(f"See it again with: cpbench show {name}")
    return lines


def rough_seconds(seconds: float) -> str:
    """An estimate: whole seconds, minutes from 2 min on."""
    return format_seconds(seconds) if seconds >= 120 else f"{seconds:.0f} s"


def _log(row: Row, folder: Path) -> Iterator[Text]:
    failure = row.cell.failure
    if failure and failure.owners:  # the reason says all that a traceback could
        yield from (plain(f"{row.label}: memory until then: {folder / file}") for file in row.cell.artifacts if file.endswith(".svg"))
    elif failure and failure.log_tail:
        rank = f" of rank {failure.rank}" if failure.rank is not None else ""
        yield plain(f"{row.label}: the end of the log{rank}:")
        yield from (plain(f"  {line}", "dim") for line in failure.log_tail[-MAX_LOG_LINES:])


def provenance(result: Comparable) -> str:
    """Which software on which machine, when; the device as the file describes it."""
    environment = result.environment
    packages = environment.get("packages")
    torch = packages.get("torch") if isinstance(packages, dict) else None
    gpus = environment.get("gpus")
    on_gpu = environment.get("device") == "cuda" and isinstance(gpus, list) and gpus
    machine = (
        f"{environment.get('devices')} x {gpus[0]}" if on_gpu and gpus else f"{environment.get('cores', '?')} cores, {environment.get('cpu') or 'unknown CPU'}"
    )
    state = "" if result.run.complete else "; not complete"
    return f"{result.run.name}, {result.run.started}: cpbench {result.run.cpbench_version}, torch {torch or '?'}, {machine}{state}"


def cores_of(environment: dict[str, Any]) -> int | None:
    """Cores that the run could use, on all nodes; None where the file does not say."""
    cores, nodes = environment.get("cores"), environment.get("nodes", 1)
    return cores * nodes if isinstance(cores, int) and cores > 0 and isinstance(nodes, int) and nodes > 0 else None


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _ratio(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.2f}{unit}"


def _percent(value: float | None, *, sign: str = "", digits: int = 1) -> str:
    return "-" if value is None else f"{sign}{value:.{digits}%}"
