"""What figures are drawn from: one entry per cell, with the columns of the tidy frame that describe it and its metrics by name.

Adds what a result does not store and tables compute: `speed_up` and `efficiency` against the baseline, and `peak_bytes`, the peak that
tables print. Baselines are chosen before anything is filtered, so that a filter changes no number. What is drawn is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpbench.frame import cell_values, kept_cells, metrics_of, value_kind
from cpbench.report.rows import Row, group_rows
from cpbench.results import FAILED, Metric, Peak, ResultFile

if TYPE_CHECKING:
    from cpbench.frame import Results
    from cpbench.where import Where

FAR = 1e18


@dataclass(frozen=True)
class Value:
    """A metric of a cell: its median, the interval of it where there is one, and whether it was measured, derived or projected."""

    median: float
    low: float | None = None
    high: float | None = None
    kind: str = "measured"
    unit: str = ""


@dataclass(frozen=True)
class Entry:
    """One cell. `fields`: columns of the tidy frame, and `lengths_label` (`36k`, `36k b3`); `metrics`: without those of a cell that failed."""

    fields: Mapping[str, Any]
    metrics: Mapping[str, Value]
    is_baseline: bool = False
    cp_active: bool = True
    capacity: int | None = None  # bytes that a rank may have
    peak: Peak | None = None  # what a rank's device reaches at best

    @property
    def failed(self) -> bool:
        return self.fields["status"] in FAILED

    @property
    def label(self) -> str:
        """`cp4 ring`; the layout alone where there is nothing to choose."""
        layout, strategy = str(self.fields["layout"]), str(self.fields["strategy"])
        return layout if strategy == "none" else f"{layout} {strategy}"

    def get(self, name: str) -> Any:
        """A field, or the median of a metric; None where the cell has no such thing."""
        if name in self.fields:
            return self.fields[name]
        return self.metrics[name].median if name in self.metrics else None


def read_entries(results: Results, where: Where | None = None) -> list[Entry]:
    """The cells of all files, in order. Raises CpbenchError for a filter with unknown fields (exit code 2), or that leaves no cell (3)."""
    kept = kept_cells(results, where) if where else None
    entries = []
    for name, result in zip(results.names, results, strict=True):
        entries += [_entry(name, row, result) for row in _rows(result) if kept is None or (name, row.cell.id) in kept]
    return entries


def varying(entries: Sequence[Entry], names: Sequence[str]) -> list[str]:
    """Those of the fields in which the entries are not all alike."""
    return [name for name in names if len({str(entry.fields.get(name)) for entry in entries}) > 1]


def _rows(result: ResultFile) -> Iterator[Row]:
    """Of all groups, in the order of the file."""
    cores, nodes = result.environment.get("cores"), result.environment.get("nodes", 1)
    everywhere = cores * nodes if isinstance(cores, int) and isinstance(nodes, int) and nodes > 0 else None
    rows = {id(row.cell): row for group in group_rows(result.cells, everywhere) for row in group.rows}
    return (rows[id(cell)] for cell in result.cells)


def _entry(file: str, row: Row, result: ResultFile) -> Entry:
    """A cell that failed has no values: those of earlier rounds would look like an answer."""
    fields = cell_values(file, result, row.cell) | {"lengths_label": row.batch.name}
    if row.cell.status in FAILED:
        return Entry(fields, {}, row.is_baseline, row.cell.cp_active, _capacity(row, result), row.cell.peak)
    metrics = {name: _value(name, metric) for name, metric in metrics_of(row.cell).items() if _is_drawable(metric)}
    for name, value, unit in (("speed_up", row.speed_up, "1"), ("efficiency", row.efficiency, "1"), ("peak_bytes", row.memory_bytes, "B")):
        if value is not None and abs(value) < FAR:
            metrics[name] = Value(float(value), unit=unit)
    return Entry(fields, metrics, row.is_baseline, row.cell.cp_active, _capacity(row, result), row.cell.peak)


def _value(name: str, metric: Metric) -> Value:
    low, high = metric.ci95 or (None, None)
    return Value(metric.median, low, high, value_kind(name), metric.unit)


def _is_drawable(metric: Metric) -> bool:
    """No second, byte or rate is beyond FAR; in a file that was edited it may be, and then axes overflow."""
    values = [abs(value) for value in (metric.median, *(metric.ci95 or ()))]
    return max(values) < FAR and (metric.median == 0 or abs(metric.median) > 1 / FAR)


def _capacity(row: Row, result: ResultFile) -> int | None:
    """Bytes that a rank may have: what the run was limited to, or what a GPU has. The memory of a CPU's host is not one rank's.

    A projection is about the memory of the devices that it is to.
    """
    if row.cell.projection is not None:
        return row.cell.projection.memory_bytes if row.cell.key.get("device") == "cuda" else None
    limits = result.run.scenario.get("limits")
    limit = limits.get("memory") if isinstance(limits, dict) else None
    memory = result.environment.get("gpu_memory_bytes") if row.cell.key.get("device") == "cuda" else None
    return next((size for size in (limit, memory) if isinstance(size, int) and not isinstance(size, bool) and size > 0), None)
