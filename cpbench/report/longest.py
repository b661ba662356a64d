"""How `cpbench maxseq` looks: a row per layout and strategy, what stood in the way below it, the same as JSON, and a line per trial.

Pure but for the lines. What was tried, and which trial is the answer, is decided in longest.py and maxseq.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, ConsoleRenderable
from rich.status import Status
from rich.table import Table

from cpbench.cell import Cell
from cpbench.maxseq import Longest, answers, length_of
from cpbench.report.console import plain
from cpbench.report.rows import group_rows
from cpbench.report.table import provenance
from cpbench.results import CellResult, ResultFile
from cpbench.units import format_bytes, format_tokens

COLUMNS = ("layout", "strategy", "longest", "tokens", "tokens\n/rank", "peak mem\n/rank", "does not\nfit", "trials")
NARROW = 100  # columns of a terminal; with fewer, how many trials there were makes room for what the limit is
REFRESHED_PER_SECOND = 1.0  # drawing takes cores from what is measured


class Lines:
    """A line per trial, and on a terminal one that moves; nothing where `quiet`."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self._console, self._quiet = console, quiet
        moves = console.is_terminal and not console.is_dumb_terminal and not quiet
        self._status = Status("", console=console, refresh_per_second=REFRESHED_PER_SECOND) if moves else None

    def __enter__(self) -> Lines:
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()

    def starting(self, cell: Cell) -> None:
        """The ranks of a group are being started."""
        self._now(f"{cell.layout} {cell.strategy}: starting {cell.world_size} {'rank' if cell.world_size == 1 else 'ranks'}")

    def trying(self, cell: Cell) -> None:
        """The ranks have started on a length."""
        self._now(f"{cell.layout} {cell.strategy}: trying {cell.lengths[0]:,} tokens")

    def tried(self, result: CellResult) -> None:
        """A trial is over, well or not."""
        if not self._quiet:
            self._console.print(plain(trial_line(result)), soft_wrap=True)

    def _now(self, text: str) -> None:
        if self._status:
            self._status.update(plain(text))


def trial_line(result: CellResult) -> str:
    """`cp2 ring: 8,192 tokens fit, 93.1 MiB`, or why they do not; who had the memory is told in the end."""
    name = f"{result.key.get('layout')} {result.key.get('strategy')}: {length_of(result):,} tokens"
    if result.status == "ok":
        return f"{name} fit, {format_bytes(peak_bytes(result))}"
    reason = (result.reason or "no reason recorded").partition("; largest:" if result.status == "oom" else "\0")[0]
    return f"{name} do not fit: {reason}" if result.status == "oom" else f"{name}: {result.status}: {reason}"


def longest_view(result: ResultFile, folder: Path, width: int) -> list[ConsoleRenderable]:
    """The table of a result that lies in `folder`, on a console of this width, what stood in the way of every row, and where the numbers are from."""
    if not result.cells:
        return [plain("No length has been tried."), plain(provenance(result), "dim")]
    found, columns = answers(result), COLUMNS[: -1 if width < NARROW else None]
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in COLUMNS[:2] else "right", no_wrap=True, vertical="bottom")
    table.add_column("limit", vertical="bottom", overflow="fold")
    for row in found:
        table.add_row(*map(plain, (*_cells(row)[: len(columns)], limit_of(row))), style="" if row.fits else "red")
    return [plain(_title(result), "bold"), table, *(plain(line) for line in _lines(found, folder)), plain(provenance(result), "dim")]


def longest_json(result: ResultFile) -> dict[str, Any]:
    """The same as data: tokens are null where nothing fits."""
    rows = []
    for row in answers(result):
        fits, fails = row.fits, row.fails
        owners = [owner.model_dump() for owner in fails.failure.owners] if fails and fails.failure else []
        rows.append(
            {
                "layout": row.layout,
                "strategy": row.strategy,
                "tokens": row.tokens,
                "tokens_per_rank": fits.tokens_per_rank if fits else None,
                "peak_bytes": peak_bytes(fits) if fits else None,
                "fails_at": length_of(fails) if fails else None,
                "status": fails.status if fails else None,
                "reason": fails.reason if fails else None,
                "owners": owners,
                "trials": row.trials,
            }
        )
    return {"schema": "cpbench.maxseq", "complete": result.run.complete, "memory_limit": memory_limit(result), "rows": rows}


def peak_bytes(result: CellResult) -> int | None:
    """Peak of the rank that needs most, as tables of a sweep have it."""
    return group_rows([result], None)[0].rows[0].memory_bytes


def limit_of(row: Longest) -> str:
    """What the most memory was for where it ran out, without the shape, or what else ended the search."""
    if row.fails is None:
        return "-"
    owners = row.fails.failure.owners if row.fails.failure else []
    return owners[0].name.partition(" [")[0] if row.fails.status == "oom" and owners else row.fails.status


def memory_limit(result: ResultFile) -> int | None:
    """What a rank was allowed, in bytes."""
    limits = result.run.scenario.get("limits")
    limit = limits.get("memory") if isinstance(limits, dict) else None
    return limit if isinstance(limit, int) else None


def _cells(row: Longest) -> list[str]:
    fits, fails = row.fits, row.fails
    return [
        row.layout,
        row.strategy,
        format_tokens(length_of(fits)) if fits else "-",
        f"{length_of(fits):,}" if fits else "-",
        f"{fits.tokens_per_rank:,}" if fits and fits.tokens_per_rank is not None else "-",
        format_bytes(peak_bytes(fits)) if fits else "-",
        f"{length_of(fails):,}" if fails else "-",
        str(row.trials),
    ]


def _title(result: ResultFile) -> str:
    """`Longest sequence of a prefill of qwen3-tiny, 1 layer, float32 on cpu, 512 MiB per rank`."""
    key = result.cells[0].key
    layers, sequences, limit = key.get("layers"), len(key.get("lengths") or [0]), memory_limit(result)
    parts = [f"Longest sequence of a {key.get('target')} of {key.get('model')}", f"{layers} layer" + ("" if layers == 1 else "s")]
    parts += [f"{key.get('dtype')} on {key.get('device')}", *([f"batch {sequences}"] if sequences > 1 else [])]
    return ", ".join([*parts, *([f"{format_bytes(limit)} per rank"] if limit is not None else [])])


def _lines(found: list[Longest], folder: Path) -> Iterator[str]:
    for row in found:
        if row.fails is not None:
            yield f"{row.layout} {row.strategy}, {length_of(row.fails):,} tokens: {row.fails.status}: {row.fails.reason or 'no reason recorded'}"
            yield from (f"  memory until then: {folder / file}" for file in row.fails.artifacts if file.endswith(".svg"))
