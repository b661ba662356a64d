"""Layout against length: how much slower than the fastest of its length each layout is, with its time in the cell.

Colours stand for the ratio and texts for the time, so that short lengths, whose times are small, are as readable as long ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle

from cpbench.plot.canvas import Chart, drawing, sheet
from cpbench.plot.entries import Entry, varying
from cpbench.plot.lines import full_title
from cpbench.plot.panels import WORK, Panel, Point, arrange
from cpbench.plot.scales import Scale, scale_of
from cpbench.plot.style import GREY, OVERSUBSCRIBED, PALE, marks_of
from cpbench.plot.time import TIMES

CELL, MARGIN, LETTER = (0.72, 0.27), (1.4, 1.0), 0.08  # inches
COLOURS = "cividis_r"  # made for people with any colour vision
MOST = 4.0  # times the fastest: what is slower still has the same colour
MAX_COLUMNS = 14
UNMEASURED = {"derived", "projected"}
STEPS = 32  # of the colour bar: with 50 and more matplotlib makes a picture of it, which a page does not show
DARK = 0.55  # from this part of the colours on, texts are light
LIGHT_TEXT, DARK_TEXT = "#fcfcfc", "#101010"  # on the colours of cells, which a dark page does not change: not the white and black that it does


def draw(entries: Sequence[Entry]) -> Chart | None:
    """A row per layout and strategy, a column per batch; None where there are fewer than two of either."""
    shown = _longest(entries)
    sheet_of = arrange([entry for entry in entries if entry.fields["lengths_label"] in shown], "lengths_label", TIMES, facet=varying(entries, WORK))
    columns = [label for label in shown if any(point.x == label for point in sheet_of.points)]
    if len(columns) < 2 or len(sheet_of.series) < 2 or not any(point.value for point in sheet_of.points):
        return None
    scale = scale_of(next(name for name in TIMES if any(name in entry.metrics for entry in sheet_of.entries)), sheet_of.entries)
    with drawing():
        wide = max(CELL[0], *(LETTER * len(column) for column in columns))
        width = MARGIN[0] + wide * len(columns) + LETTER * max(map(len, sheet_of.series))
        size = (max(5.0, width), MARGIN[1] + CELL[1] * len(sheet_of.series))
        kinds = marks_of(sheet_of.points)
        chart, grid = sheet(full_title(f"{scale.title} over the fastest of each length", sheet_of), [panel.name for panel in sheet_of.panels], size=size)
        for axes, panel in zip(grid, sheet_of.panels, strict=True):
            _panel(axes, panel, columns, scale)
        colours = ScalarMappable(LogNorm(1, MOST), colormaps[COLOURS].resampled(STEPS))
        bar = chart.colorbar(
            colours, ax=grid, ticks=[1, 1.5, 2, 3, 4], format=lambda ratio, _: f"{ratio:g}x" + (" and more" if ratio == MOST else ""), shrink=0.8
        )
        bar.ax.minorticks_off()
        batches = len({entry.fields["lengths_label"] for entry in entries})
        marks = [
            *([f"{len(columns)} of {batches} lengths"] if len(columns) < batches else []),
            *(["*: more threads than cores"] if OVERSUBSCRIBED in kinds else []),
            *(f"italic: {kind}, not measured" for kind in sorted(kinds & UNMEASURED)),
        ]
        chart.supxlabel("; ".join(["bold: fastest of its length", *marks]), x=0.01, ha="left", fontsize="small", color=GREY)
    return chart


def _longest(entries: Sequence[Entry]) -> list[str]:
    """The batches that have a column: those of the longest sequences, the shortest of them first."""
    found = {str(entry.fields["lengths_label"]): entry.fields.get("seq") or 0 for entry in entries}
    return sorted(found, key=lambda label: found[label])[-MAX_COLUMNS:]


def _panel(axes: Axes, panel: Panel, columns: Sequence[str], scale: Scale) -> None:
    rows = list(dict.fromkeys(point.series for point in panel.points))
    fastest = {column: min((point.value.median for point in panel.points if point.x == column and point.value), default=math.nan) for column in columns}
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    for point in panel.points:
        _cell(axes, point, (columns.index(str(point.x)), rows.index(point.series)), fastest[str(point.x)], scale)


def _cell(axes: Axes, point: Point, place: tuple[int, int], fastest: float, scale: Scale) -> None:
    corner = (place[0] - 0.5, place[1] - 0.5)
    if point.value is None:
        axes.add_patch(Rectangle(corner, 1, 1, facecolor="white", edgecolor=PALE, hatch="////", linewidth=0))
        axes.text(
            *place,
            str(point.entry.fields["status"]),
            ha="center",
            va="center",
            fontsize="small",
            color=GREY,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
        return
    ratio = point.value.median / fastest if fastest > 0 else 1.0
    part = min(1.0, math.log(max(1.0, ratio)) / math.log(MOST))
    axes.add_patch(Rectangle(corner, 1, 1, facecolor=colormaps[COLOURS](part), edgecolor="white", linewidth=1))
    text = scale.text(point.value.median) + ("*" if point.entry.fields.get("oversubscribed") else "")
    weight, style = "bold" if ratio == 1 else "normal", "italic" if point.value.kind != "measured" else "normal"
    axes.text(*place, text, ha="center", va="center", fontsize="small", color=LIGHT_TEXT if part > DARK else DARK_TEXT, fontweight=weight, fontstyle=style)
