"""What a row of a result table says: numbers of one cell and how it compares with the baseline of its group. Nothing is formatted here.

Cells that differ in nothing but batch, layout, strategy and partition stand in one group. Speed-up and efficiency compare cells of the
same batch; the baseline is the smallest layout that has a time, which is cp=1 unless that was not measured, and never one on which
context parallelism was off. Efficiency is the speed-up times the baseline's compute over the cell's own, and compute is what the ranks
can really use: GPUs, or cores on a CPU.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cpbench.batch import Batch
from cpbench.cell import VARIANTS, algorithm
from cpbench.errors import CpbenchError
from cpbench.layout import Layout
from cpbench.records import TIME_METRIC
from cpbench.results import CellResult, Metric

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

    @property
    def batches(self) -> list[Batch]:
        """Every batch of the group, in the order of its first row."""
        return list(dict.fromkeys(row.batch for row in self.rows))

    @property
    def partitions(self) -> set[str]:
        return {str(row.cell.key.get("partition")) for row in self.rows}

    def baseline(self, batch: Batch) -> Row | None:
        return next((row for row in self.rows if row.batch == batch and row.is_baseline), None)


def group_rows(cells: Iterable[CellResult], cores: int | None) -> list[Group]:
    """Rows in groups, by batch and then in the order of the cells. `cores` are those that the run could use; None: not known, then no CPU efficiency."""
    groups: dict[str, list[CellResult]] = {}
    for cell in cells:
        groups.setdefault(json.dumps(_common(cell), sort_keys=True), []).append(cell)
    return [Group(_common(members[0]), tuple(_rows(members, cores))) for members in groups.values()]


def time_of(cell: CellResult) -> Metric | None:
    """The metric that the target is about: TTFT, or the time of a layer or of the attention."""
    return next((cell.metrics[name] for name in TIME_METRIC.values() if name in cell.metrics), None)


def _common(cell: CellResult) -> dict[str, Any]:
    varying = ("layout", "strategy", "partition", "lengths", "prefixes")
    common = {name: value for name, value in cell.key.items() if name not in varying}
    options = common.get("options")
    return {**common, "options": {name: value for name, value in options.items() if name not in OWN}} if isinstance(options, dict) else common


def _batch(cell: CellResult) -> Batch:
    """The batch of a key; prefixes that do not pair up with the lengths, in a file that was edited, are left out."""
    lengths, prefixes = (tuple(int(n) for n in cell.key.get(name) or ()) for name in ("lengths", "prefixes"))
    return Batch(lengths, prefixes if len(prefixes) == len(lengths) else ())


def _strategy(cell: CellResult) -> str:
    """`ring`; `allgather/2` where K and V travel in two groups of heads, `local-map/inductor` where it is compiled."""
    options = cell.key.get("options")
    return algorithm(str(cell.key.get("strategy", "?")), options if isinstance(options, dict) else {})


def _layout(cell: CellResult) -> str:
    """`tp4sp`; `tp4sp latent` where rows are gathered behind low-rank projections, `tp4sp x4` where they travel in four pieces."""
    options = cell.key.get("options")
    found = options if isinstance(options, dict) else {}
    pieces, latent, fused = found.get("sp_chunks"), found.get("sp_gather") == "latent", found.get("sp_fused")
    return f"{cell.key.get('layout', '?')}" + (f" x{pieces}" if pieces else "") + (" latent" if latent else "") + (" fused" if fused else "")


def _rows(cells: Sequence[CellResult], cores: int | None) -> list[Row]:
    """By batch, then as they come."""
    rows = []
    for batch in dict.fromkeys(map(_batch, cells)):
        same = [cell for cell in cells if _batch(cell) == batch]
        baseline = _baseline(same)
        rows += [_row(cell, baseline, cores) for cell in same]
    return rows


def _baseline(cells: Sequence[CellResult]) -> CellResult | None:
    """The smallest layout that ended well: fewest ranks, then the smallest cp, then the first. Ranks that each did all the work are none."""
    timed = [cell for cell in cells if cell.status == "ok" and cell.cp_active and time_of(cell)]
    return min(timed, key=lambda cell: (cell.world_size, _context_parallel(cell)), default=None)


def _row(cell: CellResult, baseline: CellResult | None, cores: int | None) -> Row:
    time, reference = time_of(cell), time_of(baseline) if baseline else None
    speed_up = reference.median / time.median if time and reference and time.median > 0 else None
    own, base = _compute(cell, cores), _compute(baseline, cores) if baseline else None
    return Row(
        cell=cell,
        batch=_batch(cell),
        layout=_layout(cell),
        strategy=_strategy(cell),
        time=time,
        is_baseline=cell is baseline,
        speed_up=speed_up,
        efficiency=speed_up * base / own if speed_up is not None and own and base else None,
        balance=_balance(cell),
        memory_bytes=_memory(cell),
        received_bytes=_whole(cell.traffic.get("bytes")),
    )


def _compute(cell: CellResult, cores: int | None) -> int | None:
    """Devices that can work at the same time: GPUs, or cores that the ranks' threads can fill."""
    if cell.key.get("device") != "cpu":
        return cell.world_size
    return min(cores, cell.world_size * cell.threads_per_rank) if cores and cell.threads_per_rank else None


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
