"""Values at one place, as with a single length: a row per series with its interval and number, so that layouts can be held against each other.

The axis starts at 0, and cells that failed have an open cross at its far end.
"""

from __future__ import annotations

from matplotlib.axes import Axes

from cpbench.plot.canvas import Chart, drawing, sheet
from cpbench.plot.panels import Panel, Point, Sheet
from cpbench.plot.scales import Scale, lay_out_value_x
from cpbench.plot.style import GREY, MARKER_SIZE, REACH, Reference, Style, face, mark_handles, marks_of, styles

ROW, HEAD, WIDTH, LETTER = 0.24, 0.75, 4.6, 0.08  # inches
ROOM, FEWEST = 0.12, 2  # part of the width for the numbers behind the markers; rows that a panel has room for


def draw(sheet_of: Sheet, scale: Scale, title: str, line: Reference | None = None) -> Chart:
    """A figure of a sheet; `line` is drawn where it is in reach of the values."""
    looks = styles(sheet_of.series)
    with drawing():
        rows = max(FEWEST, *(len({point.series for point in panel.points}) for panel in sheet_of.panels))
        size = (WIDTH + LETTER * max(map(len, sheet_of.series)), HEAD + ROW * rows)
        chart, grid = sheet(title, [_name(panel) for panel in sheet_of.panels], size=size, legend=mark_handles(marks_of(sheet_of.points)))
        for axes, panel in zip(grid, sheet_of.panels, strict=True):
            values = [number for point in panel.points if point.value for number in (point.value.median, point.value.high) if number is not None]
            reach = [line.value] if line and line.value <= REACH[False] * max(values, default=0.0) else []
            names = [name for name in looks if any(point.series == name for point in panel.points)]
            lay_out_value_x(axes, scale, [*values, *reach], ROOM)
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(rows - 0.4, -0.6)
            axes.tick_params(axis="y", length=0)
            for row, name in enumerate(names):
                for point in (point for point in panel.points if point.series == name):
                    _row(axes, point, row, looks[name], scale)
            if line and reach:
                axes.axvline(line.value, color=GREY, linestyle="--", linewidth=1, zorder=1)
                axes.annotate(line.text, (line.value, 1), (-3, 2), ("data", "axes fraction"), "offset points", ha="right", fontsize="small", color=GREY)
            elif line:
                axes.annotate(f"{line.text}, beyond this axis", (1, 1), (0, 2), "axes fraction", "offset points", ha="right", fontsize="small", color=GREY)
    return chart


def _name(panel: Panel) -> str:
    """With the length, which is on no axis."""
    lengths = {str(point.entry.fields["lengths_label"]) for point in panel.points}
    return ", ".join(part for part in (panel.name, *(lengths if len(lengths) == 1 and not lengths & {*panel.name.split(", ")} else ())) if part)


def _row(axes: Axes, point: Point, row: int, style: Style, scale: Scale) -> None:
    value = point.value
    if value is None:
        over_axes = axes.get_yaxis_transform()
        axes.plot(0.98, row, marker="x", markersize=MARKER_SIZE, markeredgewidth=2, color=style.colour, linestyle="", transform=over_axes, clip_on=False)
        status = str(point.entry.fields["status"])
        axes.annotate(status, (0.98, row), (-7, 0), over_axes, "offset points", ha="right", va="center", fontsize="small", color=style.colour)
        return
    axes.plot([0, value.median], [row, row], color=style.colour, linewidth=1, alpha=0.35, zorder=1)
    if value.low is not None and value.high is not None:
        below, above = max(0.0, value.median - value.low), max(0.0, value.high - value.median)
        axes.errorbar(value.median, row, xerr=[[below], [above]], color=style.colour, capsize=2.5, linewidth=1)
    filled = face(style, value.kind, bool(point.entry.fields.get("oversubscribed")))
    axes.plot(value.median, row, color=style.colour, marker=style.marker, markersize=MARKER_SIZE, linestyle="", **filled)  # type: ignore[arg-type]
    end = max(value.median, value.high or value.median)
    axes.annotate(scale.text(value.median), (end, row), (6, 0), textcoords="offset points", va="center", fontsize="small")
