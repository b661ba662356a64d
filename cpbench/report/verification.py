"""How `cpbench verify` looks: a table for every batch and dtype, what is wrong below it, the same as JSON, and a line while it runs.

Pure but for the line. What the numbers are is decided in numerics.py, and which cells there are in verify.py.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console, ConsoleRenderable
from rich.live import Live

from cpbench.batch import Batch
from cpbench.cell import Cell
from cpbench.kernels import kernel_of
from cpbench.numerics import Check
from cpbench.report.columns import Column, fitting
from cpbench.report.console import plain
from cpbench.units import format_count
from cpbench.verify import Row

HEARTBEAT_SECONDS = 15.0
MARK = "*"
STYLES = {"ok": "", "off": "", "wrong": "red", "skipped": "dim"}


def header(entries: Sequence[Cell | Row], device: str) -> str:
    """What is about to run, and how."""
    cells = [entry for entry in entries if isinstance(entry, Cell)]
    kernels = sorted({kernel_of(cell).name for cell in cells})
    rows = f"{len(cells):,} row{'' if len(cells) == 1 else 's'}"
    return f"{rows} on {device}, kernel {', '.join(kernels)}: ranks as threads of one process; sweeps check every cell again in real processes"


def verification_view(rows: Sequence[Row], console: Console, interrupted: bool = False) -> list[ConsoleRenderable]:
    """Tables that fit the console's width, and the reason of every row that is not simply right."""
    view: list[ConsoleRenderable] = []
    for title, group in groupby(rows, key=lambda row: title_of(row.cell)):
        view += [plain(title, "bold"), fitting(list(group), COLUMNS, console, lambda row: STYLES[row.verdict]), plain("")]
    view += [plain(line) for line in _notes(rows)]
    return [*view, *(plain(line, "red") for line in wrong_lines(rows)), plain(summary(rows, interrupted), "bold")]


def title_of(cell: Cell) -> str:
    """What the rows of a table have in common: `attention, 101+67@40+130@17, float32`."""
    layers = f" of {cell.layers} layers" if cell.target == "prefill" else ""
    parts = [f"{cell.target}{layers} of {cell.config.name}", Batch(cell.lengths, cell.prefixes).name]
    parts += [f"{name} {format_count(value)}" for name, value in (("chunk", cell.chunk), ("page size", cell.page_size)) if value]
    parts += ["K/V dropped"] if cell.kv_cache == "drop" else []
    return ", ".join([*parts, cell.dtype])


def wrong_lines(rows: Iterable[Row]) -> Iterator[str]:
    """One line for every wrong row: which, and why."""
    for row in rows:
        if row.verdict == "wrong":
            yield f"wrong: {row.cell.layout} {row.cell.algorithm} {row.cell.partition}, {title_of(row.cell)}: {row.reason}"


def summary(rows: Sequence[Row], interrupted: bool = False) -> str:
    """`412 rows: all right`, or how many are wrong."""
    counts = Counter(row.verdict for row in rows)
    ran = len(rows) - counts["skipped"]
    verdict = f"{counts['wrong']} wrong" if counts["wrong"] else "all right"
    rest = [f"{counts['skipped']} not run"] * bool(counts["skipped"]) + ["interrupted"] * interrupted
    return "; ".join([f"{ran:,} row{'' if ran == 1 else 's'}: {verdict}", *rest])


def collectives(row: Row) -> str:
    """Calls counted and predicted: `3 = 3`, or `4, not 3`; `3 = 3*` where calls agree and bytes or kinds do not."""
    counted = row.check.collectives if row.check else None
    if counted is None:
        return "-"
    calls, predicted = counted.received.calls, counted.predicted.calls
    if calls != predicted:
        return f"{calls}, not {predicted}"
    return f"{calls} = {predicted}" + (MARK if counted.difference else "")


def verification_json(rows: Sequence[Row]) -> dict[str, Any]:
    """The same as data. Errors that are not finite are null."""
    counts = Counter(row.verdict for row in rows)
    return {"schema": "cpbench.verification", "counts": dict(sorted(counts.items())), "rows": [_row_json(row) for row in rows]}


def _row_json(row: Row) -> dict[str, Any]:
    data: dict[str, Any] = {"key": row.cell.key, "verdict": row.verdict, "reason": row.reason}
    if row.check is None:
        return data
    check, counted = row.check, row.check.collectives
    names = ("relative_rmse", "ratio", "max_error", "finite", "bitwise_equal", "remote_tokens_used", "logits_max_error", "limit")
    data |= {name: getattr(check, name) for name in names}
    if counted is not None:
        data["collectives"] = {"rank": counted.rank, "counted": counted.received.to_dict(), "predicted": counted.predicted.to_dict()}
    return data


def _check(row: Row) -> Check:
    return row.check or Check(False, None)


COLUMNS: tuple[Column[Row], ...] = (
    Column("layout", lambda row: str(row.cell.layout), justify="left"),
    Column("strategy", lambda row: row.cell.algorithm, justify="left"),
    Column("partition", lambda row: row.cell.partition, justify="left"),
    Column("relative\nRMSE", lambda row: _error(_check(row).relative_rmse)),
    Column("ratio", lambda row: _ratio(_check(row).ratio)),
    Column("max\nerror", lambda row: _error(_check(row).max_error), 1),
    Column("finite", lambda row: _yes(_check(row).finite), 0),
    Column("bitwise\nequal", lambda row: _yes(_check(row).bitwise_equal), 2),
    Column("remote\nused", lambda row: _yes(_check(row).remote_tokens_used), 3),
    Column("collec-\ntives", collectives),
    Column("verdict", lambda row: row.verdict, justify="left"),
)


class Progress:
    """A line that says where the grid is: it moves on a terminal; elsewhere it is printed now and then."""

    def __init__(self, console: Console, total: int, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._total, self._quiet, self._clock = console, total, quiet, clock
        moves = console.is_terminal and not console.is_dumb_terminal and not quiet
        self._live = Live(console=console, refresh_per_second=2, transient=True) if moves else None
        self._said, self._wrong = clock(), 0

    def __enter__(self) -> Progress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def starting(self, number: int, cell: Cell) -> None:
        """Row `number`, counted from 1, is about to run."""
        wrong = f" · {self._wrong} wrong" if self._wrong else ""
        line = f"row {number}/{self._total} · {cell.label} {cell.partition} {cell.target} {cell.dtype}{wrong}"
        if self._live:
            self._live.update(plain(line, "bold"))
        elif not self._quiet and self._clock() - self._said >= HEARTBEAT_SECONDS:
            self._said = self._clock()
            self._console.print(plain(line), soft_wrap=True)

    def done(self, row: Row) -> None:
        """A row is over. Wrong ones are said at once."""
        self._wrong += row.verdict == "wrong"
        if row.verdict == "wrong" and not self._quiet:
            (self._live.console if self._live else self._console).print(plain(next(wrong_lines([row])), "red"), soft_wrap=True)


def _notes(rows: Sequence[Row]) -> Iterator[str]:
    """Why rows are off or skipped: each reason once, with the number of rows or the name of the one."""
    reasons: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.verdict in ("off", "skipped"):
            reasons.setdefault((row.verdict, row.reason or "no reason given"), []).append(row)
    for (verdict, reason), of in reasons.items():
        names = dict.fromkeys(row.cell.strategy for row in of)
        yield f"{verdict} ({', '.join(names)}): {reason}"
    if any(collectives(row).endswith(MARK) for row in rows):
        yield f"{MARK}: as many calls as predicted, of other kinds or with other bytes"


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 1000 else f"{value:.0e}"


def _yes(value: bool | None) -> str:
    return "-" if value is None else "yes" if value else "no"
