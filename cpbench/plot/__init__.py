"""Figures from results: which there are, the default set, and one of any metric against any field.

A figure is one file of this package and one line in FIGURES: a function of the entries that returns a figure, or None where the entries
cannot fill it. Figures are ordinary matplotlib figures: `figure.axes[0]` is there to be changed. Importing this imports matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cpbench.comparison import Comparison, compare
from cpbench.errors import NOTHING_COMPARABLE, CpbenchError, unknown
from cpbench.frame import Results
from cpbench.plot import custom, efficiency, forest, heatmap, memory, pareto, split, throughput, time
from cpbench.plot.canvas import Chart
from cpbench.plot.entries import Entry, read_entries
from cpbench.where import parse_where

__all__ = ["FIGURES", "FOREST", "Chart", "figure", "figures", "versus"]

FOREST = "forest"  # of two files or a comparison, and not of cells
HINT = "cpbench show says which cells there are, and why they failed."


@dataclass(frozen=True)
class Kind:
    """A figure that there is, and what it needs to be drawn."""

    draw: Callable[[Sequence[Entry]], Chart | None]
    needs: str


FIGURES = {
    "time": Kind(time.draw, "a time"),
    "throughput": Kind(throughput.draw, "TFLOP/s"),
    "memory": Kind(memory.draw, "a memory peak"),
    "efficiency": Kind(efficiency.draw, "times of two numbers of ranks"),
    "split": Kind(split.draw, "exposed communication"),
    "heatmap": Kind(heatmap.draw, "times of two layouts and two lengths"),
    "pareto": Kind(pareto.draw, "times and memory of two layouts"),
}


def figures(results: Results, names: Sequence[str] | None = None, where: str | None = None, comparison: Comparison | None = None) -> dict[str, Chart]:
    """The figures that the results can fill, by name; only those of `names`, where given, which must all be filled.

    `where`: a filter of cells. `comparison`: what FOREST shows; made here where there are two files. Raises CpbenchError for an unknown figure
    or a filter that does not parse (exit code 2), and for nothing to draw (3).
    """
    known = {**{name: kind.needs for name, kind in FIGURES.items()}, FOREST: "two files that have cells in common"}
    for name in names or ():
        if name not in known:
            raise unknown("figure", name, known)
    entries = read_entries(results, parse_where(where) if where else None)
    found = {name: chart for name in FIGURES if not (names and name not in names) and (chart := FIGURES[name].draw(entries))}
    if not names or FOREST in names:
        chart = _forest(results.where(where) if where else results, comparison)
        found |= {FOREST: chart} if chart else {}
    for name in names or ():
        if name not in found:
            raise CpbenchError(f"The figure {name} needs {known[name]}, which {', '.join(results.names)} has not.", HINT, NOTHING_COMPARABLE)
    if not found:
        raise CpbenchError(f"{', '.join(results.names)} has neither a time nor a memory peak to plot.", HINT, NOTHING_COMPARABLE)
    return found


def _forest(results: Results, comparison: Comparison | None) -> Chart | None:
    if comparison is None and len(results) == 2:
        comparison = compare(results[0], results[1], names=(results.names[0], results.names[1]))
    return forest.draw(comparison) if comparison else None


def figure(results: Results, name: str, where: str | None = None) -> Chart:
    """One figure of FIGURES. Raises what `figures` raises."""
    return figures(results, [name], where)[name]


def versus(
    results: Results,
    x: str = "seq",
    y: str | None = None,
    *,
    by: str | Sequence[str] = (),
    facet: str | Sequence[str] | None = None,
    where: str | None = None,
) -> Chart:
    """A metric `y` (the time of the target) against a field or metric `x`, in series `by` fields (layout and strategy), a panel per `facet`.

    `by` and `facet`: names, or one text with commas. Raises CpbenchError for unknown names (exit code 2), and where no cell has both (3).
    """
    entries = read_entries(results, parse_where(where) if where else None)
    return custom.draw(entries, x, y, _names(by), None if facet is None else _names(facet))


def _names(fields: str | Sequence[str]) -> list[str]:
    return [name.strip() for name in fields.split(",") if name.strip()] if isinstance(fields, str) else list(fields)
