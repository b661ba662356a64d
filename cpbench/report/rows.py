"""What a row of a result table says: numbers of one cell and how it compares with the baseline of its group. Nothing is formatted here.

Cells that differ in nothing but batch, layout, strategy and partition stand in one group. Speed-up and efficiency compare cells of the
same batch; the baseline is the smallest layout that has a time, which is cp=1 unless that was not measured, and never one on which
context parallelism was off. Efficiency is the speed-up times the baseline's compute over the cell's own, and compute is what the ranks
can really use: GPUs, or cores on a CPU.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from cpbench.batch import Batch
from cpbench.cell import VARIANTS, algorithm
from cpbench.errors import CpbenchError
from cpbench.layout import Layout
from cpbench.records import time_of
from cpbench.results import CellResult, ComparedCell, Metric

OWN = (*VARIANTS, "sp_chunks", "sp_gather", "sp_fused")  # options that only one strategy or some layouts have, so that they do not part a table


@dataclass(frozen=True)
class Row:
    """One cell. Numbers are None where they are not known; a cell that failed keeps the times of earlier rounds."""

    cell: CellResult
    batch: Batch
    layout: str
    strategy: str
    time: Metric | None
    is_baseline: bool
    speed_up: float | None
    efficiency: float | None
    balance: float | None
    memory_bytes: int | None
    received_bytes: int | None
    exposed: float | None = None  # part of the marked pass in which the rank with the most work did none
    light: float | None = None  # the least time that its devices could take, over the time

    @property
    def label(self) -> str:
        """`cp4 ring`."""
        return f"{self.layout} {self.strategy}"

    @property
    def half_width(self) -> float | None:
        """Half the 95% interval of the median over the median."""
        if self.time is None or self.time.ci95 is None or self.time.median <= 0:
            return None
        return (self.time.ci95[1] - self.time.ci95[0]) / (2 * self.time.median)


@dataclass(frozen=True)
class Group:
    """Cells of one table. `common` is the part of their keys that they share."""

    common: dict[str, Any]
    rows: tuple[Row, ...]
    hidden: tuple[Row, ...] = ()  # that a filter leaves out, and others are compared with

    @cached_property
    def by_batch(self) -> dict[Batch, list[Row]]:
        """The rows of every batch, in the order of their first rows."""
        found: dict[Batch, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.batch, []).append(row)
        return found

    @property
    def batches(self) -> list[Batch]:
        return list(self.by_batch)

    @property
    def partitions(self) -> set[str]:
        return {str(row.cell.key.get("partition")) for row in self.rows}

    @cached_property
    def baselines(self) -> dict[Batch, Row]:
        """What each batch is compared with, shown or hidden; nothing where none has a time."""
        return {row.batch: row for row in (*self.hidden, *self.rows) if row.is_baseline}

    def only(self, kept: Collection[str]) -> Group:
        """With the rows of these cells; the others are hidden."""
        shown = tuple(row for row in self.rows if row.cell.id in kept)
        return replace(self, rows=shown, hidden=tuple(row for row in self.rows if row.cell.id not in kept))


def group_rows(cells: Iterable[CellResult], cores: int | None) -> list[Group]:
    """Rows in groups, by batch and then in the order of the cells. `cores` are those that the run could use; None: not known, then no CPU efficiency."""
    groups: dict[str, list[CellResult]] = {}
    for cell in cells:
        groups.setdefault(json.dumps(_common(cell), sort_keys=True), []).append(cell)
    return [Group(_common(members[0]), tuple(_rows(members, cores))) for members in groups.values()]


def _common(cell: CellResult) -> dict[str, Any]:
    varying = ("layout", "strategy", "partition", "lengths", "prefixes")
    common = {name: value for name, value in cell.key.items() if name not in varying}
    options = common.get("options")
    return {**common, "options": {name: value for name, value in options.items() if name not in OWN}} if isinstance(options, dict) else common


def batch_of(cell: ComparedCell) -> Batch:
    """The batch of a key; prefixes that do not pair up with the lengths, in a file that was edited, are left out."""
    lengths, prefixes = (tuple(int(n) for n in cell.key.get(name) or ()) for name in ("lengths", "prefixes"))
    return Batch(lengths, prefixes if len(prefixes) == len(lengths) else ())


def strategy_of(cell: ComparedCell) -> str:
    """`ring`; `allgather/2` where K and V travel in two groups of heads, `local-map/inductor` where it is compiled."""
    options = cell.key.get("options")
    return algorithm(str(cell.key.get("strategy", "?")), options if isinstance(options, dict) else {})


def layout_of(cell: ComparedCell) -> str:
    """`tp4sp`; `tp4sp latent` where rows are gathered behind low-rank projections, `tp4sp x4` where they travel in four pieces."""
    options = cell.key.get("options")
    found = options if isinstance(options, dict) else {}
    pieces, latent, fused = found.get("sp_chunks"), found.get("sp_gather") == "latent", found.get("sp_fused")
    return f"{cell.key.get('layout', '?')}" + (f" x{pieces}" if pieces else "") + (" latent" if latent else "") + (" fused" if fused else "")


def _rows(cells: Sequence[CellResult], cores: int | None) -> list[Row]:
    """By batch, then as they come."""
    batches: dict[Batch, list[CellResult]] = {}
    for cell in cells:
        batches.setdefault(batch_of(cell), []).append(cell)
    baselines = {batch: _baseline(same) for batch, same in batches.items()}
    return [_row(cell, batch, baselines[batch], cores) for batch, same in batches.items() for cell in same]


def _baseline(cells: Sequence[CellResult]) -> CellResult | None:
    """The smallest layout that ended well: fewest ranks, then the smallest cp, then the first. Ranks that each did all the work are none."""
    timed = [cell for cell in cells if cell.status == "ok" and cell.cp_active and time_of(cell)]
    return min(timed, key=lambda cell: (cell.world_size, _context_parallel(cell)), default=None)


def _row(cell: CellResult, batch: Batch, baseline: CellResult | None, cores: int | None) -> Row:
    time, reference = time_of(cell), time_of(baseline) if baseline else None
    speed_up = reference.median / time.median if time and reference and time.median > 0 else None
    own, base = _compute(cell, cores), _compute(baseline, cores) if baseline else None
    return Row(
        cell=cell,
        batch=batch,
        layout=layout_of(cell),
        strategy=strategy_of(cell),
        time=time,
        is_baseline=cell is baseline,
        speed_up=speed_up,
        efficiency=speed_up * base / own if speed_up is not None and own and base else None,
        balance=_balance(cell),
        memory_bytes=_memory(cell),
        received_bytes=_whole(cell.traffic.get("bytes")),
        exposed=_exposed(cell),
        light=cell.metrics["light_fraction"].median if "light_fraction" in cell.metrics else None,
    )


def _compute(cell: CellResult, cores: int | None) -> int | None:
    """Devices that can work at the same time: GPUs, or cores that the ranks' threads can fill."""
    if cell.key.get("device") != "cpu":
        return cell.world_size
    return min(cores, cell.world_size * cell.threads_per_rank) if cores and cell.threads_per_rank else None


def _exposed(cell: CellResult) -> float | None:
    split = cell.split
    return split.exposed_comm_s / split.step_s if split and split.exposed_comm_s is not None and split.step_s else None


def _balance(cell: CellResult) -> float | None:
    """The largest attention work of a rank over the mean of all: 1 is ideal."""
    pairs = [rank.score_pairs for rank in cell.ranks]
    return max(pairs) * len(pairs) / sum(pairs) if pairs and sum(pairs) > 0 else None


def _memory(cell: CellResult) -> int | None:
    """Peak of the rank that needs most: live tensors on a CPU, the allocator's peak on a GPU."""
    if cell.memory is None:
        return None
    live, allocator = cell.memory.peak_live_bytes, cell.memory.peak_allocator_bytes
    first, second = (live, allocator) if cell.key.get("device") == "cpu" else (allocator, live)
    return first if first is not None else second


def _context_parallel(cell: CellResult) -> int:
    try:
        return Layout.parse(str(cell.key.get("layout"))).cp
    except CpbenchError:  # a layout of a newer cpbench
        return cell.world_size


def _whole(value: Any) -> int | None:
    return int(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
