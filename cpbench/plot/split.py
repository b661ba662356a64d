"""Where the time of a pass goes: own work and exposed communication, stacked, of the rank with the most work of its own.

From the pass that was marked, so that the two add up to that pass and not to the median of the timed ones; or from a projection, which is paler.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from cpbench.plot.canvas import Chart, drawing, sheet
from cpbench.plot.entries import Entry, varying
from cpbench.plot.lines import full_title
from cpbench.plot.panels import WORK, Point, arrange
from cpbench.plot.scales import lay_out_value_x, scale_of
from cpbench.plot.style import COLOURS

ROW, HEAD, WIDTH, LETTER = 0.24, 0.75, 3.6, 0.08  # inches
ROOM, FEWEST = 0.2, 3  # part of the width behind the bars; rows that a panel has room for
KINDS = {"": "time of the marked pass", "projected_": "projected time"}
PALE = 0.6
WORK_COLOUR, EXPOSED_COLOUR = COLOURS[0], COLOURS[1]


def draw(entries: Sequence[Entry]) -> Chart | None:
    """A bar per layout and strategy, a panel per batch; None where no communication was told from work."""
    known = [entry for entry in entries if _kind(entry) is not None]
    sheet_of = arrange(known, "seq", tuple(f"{kind}compute_s" for kind in KINDS), facet=[*varying(known, WORK), "lengths_label"])
    if not any(entry.metrics[f"{_kind(entry)}exposed_comm_s"].median > 0 for entry in known):
        return None
    kinds = [kind for kind in KINDS if kind in {_kind(entry) for entry in known}]
    scale = scale_of(f"{kinds[0]}compute_s", known)
    with drawing():
        rows = max(FEWEST, *(len(panel.points) for panel in sheet_of.panels))
        size = (WIDTH + LETTER * max(map(len, sheet_of.series)), HEAD + ROW * rows)
        handles = [Patch(color=WORK_COLOUR, label="own work"), Patch(color=EXPOSED_COLOUR, label="exposed communication,\nand waiting for others")]
        chart, grid = sheet(full_title("Work and exposed communication", sheet_of), [panel.name for panel in sheet_of.panels], size=size, legend=handles)
        for axes, panel in zip(grid, sheet_of.panels, strict=True):
            lay_out_value_x(axes, scale, [sum(_parts(point)) for point in panel.points], ROOM)
            axes.set_xlabel(" and ".join(KINDS[kind] for kind in kinds))
            _bars(axes, panel.points, rows)
    return chart


def _bars(axes: Axes, points: Sequence[Point], rows: int) -> None:
    axes.set_yticks(range(len(points)), [point.series for point in points])
    axes.set_ylim(rows - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    for row, point in enumerate(points):
        work, exposed = _parts(point)
        alpha = PALE if _kind(point.entry) else 1.0
        axes.barh(row, work, 0.68, color=WORK_COLOUR, alpha=alpha)
        axes.barh(row, exposed, 0.68, left=work, color=EXPOSED_COLOUR, hatch="///", edgecolor="white", linewidth=0, alpha=alpha)
        part = f"{exposed / (work + exposed):.0%}" if work + exposed > 0 else ""
        axes.annotate(part, (work + exposed, row), (4, 0), textcoords="offset points", va="center", fontsize="small")


def _parts(point: Point) -> tuple[float, float]:
    """Seconds of own work and of exposed communication."""
    kind, metrics = _kind(point.entry), point.entry.metrics
    return metrics[f"{kind}compute_s"].median, metrics[f"{kind}exposed_comm_s"].median


def _kind(entry: Entry) -> str | None:
    """What the names of a cell's two metrics begin with: nothing where they were measured. None: it has none."""
    return next((kind for kind in KINDS if {f"{kind}compute_s", f"{kind}exposed_comm_s"} <= entry.metrics.keys()), None)
