"""Results as one tidy table: a row for each cell and metric, with everything that a plot, a filter or a spreadsheet may ask for in columns.

Reads several files at once and names each by as much of its path as tells them apart. Numbers are those of the files: nothing is
computed, compared or judged here. Pandas is imported when a frame is asked for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from cpbench.errors import NOTHING_COMPARABLE, CpbenchError
from cpbench.layout import Layout
from cpbench.reading import ForeignFileError, read
from cpbench.report.rows import batch_of, layout_of, strategy_of
from cpbench.results import CellResult, ComparedCell, Metric, ResultFile
from cpbench.where import Where, parse_where

if TYPE_CHECKING:
    import pandas as pd

ValueKind = Literal["measured", "derived", "projected"]
AXES = ("dp", "pp", "cp", "tp", "ep", "sp", "ulysses")
_IDENTITY = ("file", "run", "cell", "target", "model", "layers", "dtype", "device", "seq", "batch", "lengths", "prefix", "layout", *AXES)
CELL_COLUMNS = (*_IDENTITY, "world_size", "strategy", "partition", "kernel", "options", "status", "reason", "oversubscribed")
METRIC_COLUMNS = ("metric", "unit", "better", "value_kind", "median", "ci_low", "ci_high", "n", "rounds")
WHOLE = ("layers", "seq", "batch", "prefix", "dp", "pp", "cp", "tp", "ep", "ulysses", "world_size", "n", "rounds")  # integers, or not known
MEMORY = ("peak_live_bytes", "peak_allocator_bytes", "peak_reserved_bytes", "peak_rss_bytes")
MAX_WHOLE = 2**53


@dataclass(frozen=True, repr=False)
class Results(Sequence[ResultFile]):
    """Several result files, as `cpbench.load` returns them: `results[0]` is the first, and `len(results)` says how many.

    `names` says how each is called in tables and figures: the end of its path, as short as it can be.
    """

    files: tuple[ResultFile, ...]
    names: tuple[str, ...]

    @overload
    def __getitem__(self, index: int) -> ResultFile: ...
    @overload
    def __getitem__(self, index: slice) -> Results: ...
    def __getitem__(self, index: int | slice) -> ResultFile | Results:
        return Results(self.files[index], self.names[index]) if isinstance(index, slice) else self.files[index]

    def __len__(self) -> int:
        return len(self.files)

    def where(self, text: str) -> Results:
        """Only the cells that a filter keeps: `results.where("strategy==ring and seq>=128k")`.

        Fields are the columns of a cell (CELL_COLUMNS) and its metrics by name. Raises CpbenchError for a filter that does not parse or
        names an unknown field (exit code 2), and where no cell is left (3).
        """
        return self.only(kept_cells(self, parse_where(text)))

    def only(self, kept: Collection[tuple[str, str]]) -> Results:
        """The same files with only these cells, each given by the name of its file and its id."""
        files = (
            file.model_copy(update={"cells": [cell for cell in file.cells if (name, cell.id) in kept]})
            for name, file in zip(self.names, self.files, strict=True)
        )
        return Results(tuple(files), self.names)

    def to_frame(self) -> pd.DataFrame:
        """One row per cell and metric; a cell without metrics has one row whose metric is None.

        Columns are CELL_COLUMNS and METRIC_COLUMNS. `seq` and `prefix` are the longest new and cached lengths of the batch, `lengths`
        lists all; `layout` and `strategy` are ordered by appearance; integers are nullable. Memory, traffic and numerics are metrics with
        n=1 and no interval. Units are in `unit`: seconds, bytes, or 1.
        """
        import pandas as pd

        rows = [[*cell.values(), *metric] for cell, metrics in self._described() for metric in metrics or [_NO_METRIC]]
        frame = pd.DataFrame(rows, columns=[*CELL_COLUMNS, *METRIC_COLUMNS])
        frame = frame.astype(dict.fromkeys(WHOLE, "Int64") | dict.fromkeys(("median", "ci_low", "ci_high"), "float64"))
        for name in ("layout", "strategy"):
            frame[name] = pd.Categorical(frame[name], categories=frame[name].unique(), ordered=True)
        return frame

    def _described(self) -> Iterator[tuple[dict[str, object], list[tuple[object, ...]]]]:
        for name, file in zip(self.names, self.files, strict=True):
            for cell in file.cells:
                metrics = [_metric_values(label, metric) for label, metric in metrics_of(cell).items()]
                yield cell_values(name, file, cell), metrics

    def __repr__(self) -> str:
        return f"Results({', '.join(f'{name}: {len(file.cells)} cells' for name, file in zip(self.names, self.files, strict=True))})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the tables of `cpbench show`."""
        from cpbench.report.whole import to_html

        return to_html(self)


def load(pattern: str | Path | Iterable[str | Path]) -> Results:
    """Read all files that match a glob pattern, or the given paths, in name order: `cpbench.load("results/*.json")`, `cpbench.load(["a.json", "b.json"])`.

    Files that a pattern matches and that are no results (schemas, log-probabilities) are left out. Raises CpbenchError (exit code 4) for a
    damaged file, and where there is no result at all.
    """
    patterns = [pattern] if isinstance(pattern, str | Path) else list(pattern)
    found: dict[str, ResultFile] = {}
    foreign: ForeignFileError | None = None
    for item in map(str, patterns):
        matches = glob(item) if not Path(item).exists() else []  # noqa: PTH207 - patterns may be absolute
        for path in sorted(matches or [item]):
            try:
                found[path] = found.get(path) or read(path)
            except ForeignFileError as error:
                if not matches:
                    raise
                foreign = error
    if not found and foreign:
        raise foreign
    paths = sorted(found)
    return Results(tuple(found[path] for path in paths), short_names(paths))


def short_names(paths: Sequence[str]) -> tuple[str, ...]:
    """The last part of each path; with folders before it where several end alike."""
    names = []
    for path in paths:
        parts = Path(path).parts
        others = [Path(other).parts for other in paths if other != path]
        take = next((n for n in range(1, len(parts)) if all(other[-n:] != parts[-n:] for other in others)), len(parts))
        names.append(str(Path(*parts[-take:])))
    return tuple(names)


def kept_cells(results: Results, where: Where) -> set[tuple[str, str]]:
    """File name and id of every cell that a filter keeps. Raises CpbenchError for unknown fields (exit code 2) and where none is left (3)."""
    metrics = {name for file in results for cell in file.cells for name in metrics_of(cell)}
    where.require([*CELL_COLUMNS, *metrics])
    kept = set()
    for name, file in zip(results.names, results.files, strict=True):
        for cell in file.cells:
            values = dict.fromkeys(metrics) | {label: metric.median for label, metric in metrics_of(cell).items()} | cell_values(name, file, cell)
            if where.keep(values):
                kept.add((name, cell.id))
    if not kept:
        raise CpbenchError(f"The filter {where.text!r} keeps no cell of {', '.join(results.names)}.", _values_hint(results, where), NOTHING_COMPARABLE)
    return kept


def cell_values(name: str, file: ResultFile, cell: CellResult) -> dict[str, object]:
    """What the columns CELL_COLUMNS say of a cell, in their order; None where the file does not say it."""
    key, batch = cell.key, batch_of(cell)
    options = key.get("options") or {}
    values = (
        *(name, file.run.id, cell.id),
        *(_text(key.get("target")), _text(key.get("model")), _whole(key.get("layers")), _text(key.get("dtype")), _text(key.get("device"))),
        *(max(batch.lengths, default=None), len(batch.lengths), ",".join(map(str, batch.lengths)), max(batch.prefixes, default=None)),
        *(layout_of(cell), *_sizes(cell)),
        *(_whole(cell.world_size), strategy_of(cell), _text(key.get("partition")), cell.kernel or _text(key.get("kernel"))),
        *(" ".join(f"{option}={value}" for option, value in sorted(options.items())), cell.status, cell.reason, cell.oversubscribed),
    )
    return dict(zip(CELL_COLUMNS, values, strict=True))


def metrics_of(cell: ComparedCell) -> dict[str, Metric]:
    """All numbers of a cell by name: what was timed, and first call, memory, traffic and numerics, which are known once."""
    known: dict[str, tuple[str, float | None]] = {"first_call_s": ("s", cell.first_call_s)}
    known |= {name: ("B", getattr(cell.memory, name)) for name in MEMORY if cell.memory}
    known["comm_bytes"] = ("B", _whole(cell.traffic.get("bytes")))
    known["numerics_ratio"] = ("1", cell.numerics.ratio if cell.numerics else None)
    once = {name: Metric(unit=unit, rounds=[[value]], median=value, n=1) for name, (unit, value) in known.items() if value is not None}
    return {**cell.metrics, **once}


def value_kind(metric: str) -> ValueKind:
    """Whether a metric of this name was measured, derived from measured ones, or projected."""
    return "derived" if metric.startswith("derived_") else "projected" if metric.startswith("projected_") else "measured"


_NO_METRIC: tuple[object, ...] = (None,) * len(METRIC_COLUMNS)


def _metric_values(name: str, metric: Metric) -> tuple[object, ...]:
    low, high = metric.ci95 or (None, None)
    return name, metric.unit, metric.better, value_kind(name), metric.median, low, high, _whole(metric.n), len(metric.rounds)


def _sizes(cell: CellResult) -> tuple[object, ...]:
    """Of AXES; None for a layout that this cpbench cannot read."""
    try:
        layout = Layout.parse(str(cell.key.get("layout")))
    except CpbenchError:
        return (None,) * len(AXES)
    return tuple(getattr(layout, axis) for axis in AXES)


def _values_hint(results: Results, where: Where) -> str:
    """Which values the first field of the filter has."""
    name = where.names[0]
    rows = [cell_values(label, file, cell) for label, file in zip(results.names, results.files, strict=True) for cell in file.cells]
    found = list(dict.fromkeys(str(row[name]) for row in rows if name in row))
    return f"{name} is {', '.join(found[:8])}{', ...' if len(found) > 8 else ''}." if found else f"No cell has a {name} like that."


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _whole(value: Any) -> int | None:
    return int(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_WHOLE else None
