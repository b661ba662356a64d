"""The timeline of a layer as a table: what each rank computes and exchanges, when, and how much of it nothing hides; the same as JSON.

Pure: stretches become renderables or data. How they came about is the projection's affair. Names are printed as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console, ConsoleRenderable

from cpbench.projection.lanes import Laid, exposed_seconds, laid_out
from cpbench.projection.stretch import COMPUTE, Stretch
from cpbench.report.columns import Column, fitting
from cpbench.report.console import plain
from cpbench.units import format_seconds

COLUMNS: tuple[Column[Laid], ...] = (
    Column("rank", lambda one: str(one.stretch.rank)),
    Column("lane", lambda one: one.stretch.lane, justify="left"),
    Column("what", lambda one: one.stretch.name, justify="left"),
    Column("starts", lambda one: format_seconds(one.stretch.start) if one.stretch.start else "0 s", keep=1),
    Column("takes", lambda one: format_seconds(one.seconds)),
    Column("exposed", lambda one: "" if one.stretch.lane == COMPUTE else format_seconds(one.exposed_s) if one.exposed_s else "-"),
)


def timeline_view(stretches: Sequence[Stretch], console: Console) -> list[ConsoleRenderable]:
    """A row for each stretch, by rank, lane and time, and below a line for each rank."""
    laid = laid_out(stretches)
    if not laid:
        return [plain("Nothing happens in this layer.")]
    made = fitting(laid, COLUMNS, console, parted=lambda above, below: (above.stretch.rank, above.stretch.lane) != (below.stretch.rank, below.stretch.lane))
    return [made, *(plain(_line(laid, rank)) for rank in _ranks(laid))]


def timeline_json(stretches: Sequence[Stretch]) -> dict[str, Any]:
    """The same as data, in seconds."""
    laid = laid_out(stretches)
    return {
        "stretches": [{**vars(one.stretch), "exposed_s": one.exposed_s} for one in laid],
        "ranks": [{"rank": rank, "ends_s": _end(laid, rank), "exposed_s": exposed_seconds(laid, rank)} for rank in _ranks(laid)],
    }


def _line(laid: Sequence[Laid], rank: int) -> str:
    """`rank 0: 4.20 ms, of which 1.10 ms (26%) are exposed communication`."""
    end, exposed = _end(laid, rank), exposed_seconds(laid, rank)
    part = f"{format_seconds(exposed)} ({exposed / end:.0%}) are exposed communication" if exposed and end else "no communication is exposed"
    return f"rank {rank}: {format_seconds(end)}, of which {part}" if exposed and end else f"rank {rank}: {format_seconds(end)}, and {part}"


def _ranks(laid: Sequence[Laid]) -> list[int]:
    return list(dict.fromkeys(one.stretch.rank for one in laid))


def _end(laid: Sequence[Laid], rank: int) -> float:
    return max(one.stretch.end for one in laid if one.stretch.rank == rank)
