"""Values against something with an order: a line with markers and intervals per series, panels side by side, failures at the top edge.

Where all points stand at one place, as with a single length, there is no line to draw, and each series is a row instead (dots.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from cpbench.plot import dots
from cpbench.plot.canvas import Chart, drawing, sheet
from cpbench.plot.entries import Entry
from cpbench.plot.panels import Panel, Point, Sheet, arrange, common
from cpbench.plot.scales import Scale, is_log, lay_out_x, lay_out_y, scale_of
from cpbench.plot.style import GREY, LINES, MARKER_SIZE, REACH, Reference, Style, face, mark_handles, marks_of, styles

FAILURES_TOP, FAILURE_STEP, MOST_ROOM = 0.965, 0.055, 0.5  # parts of the height of a panel


def draw(sheet_of: Sheet, x: Scale, y: Scale, title: str, line: Reference | None = None) -> Chart:
    """A figure of a sheet that has at least one value. `line` is drawn where it is in reach."""
    categories = _categories(sheet_of, x)
    if all(len({str(point.x) for point in panel.points}) == 1 for panel in sheet_of.panels) and x.kind != "category":
        return dots.draw(sheet_of, y, full_title(title, sheet_of), line)
    looks = styles(sheet_of.series)
    values = [number for point in sheet_of.points if point.value for number in (point.value.median, point.value.low, point.value.high) if number is not None]
    reach = [line.value] if line and line.value <= REACH[is_log(y, values)] * max(values) else []
    with drawing():
        handles = legend(sheet_of, looks, x)
        chart, grid = sheet(full_title(title, sheet_of), [panel.name for panel in sheet_of.panels], legend=handles, share_y=True)
        places = {category: number for number, category in enumerate(categories)} if x.kind == "category" else {}
        for axes, panel in zip(grid, sheet_of.panels, strict=True):
            lay_out_y(axes, y, [*values, *reach], _room(panel, sheet_of))
            lay_out_x(axes, x, [0.0] if x.kind == "category" else [float(category) for category in categories], [str(category) for category in categories])
            for name, style in looks.items():
                _series(axes, [point for point in panel.points if point.series == name], style, places, x.kind == "count")
            _failures(axes, panel, looks, places)
            if line and reach:
                _line(axes, line)
            if not axes.get_subplotspec().is_first_col():  # type: ignore[union-attr]
                axes.set_ylabel("")
        if line and not reach:
            grid[0].annotate(f"{line.text}, beyond this axis", (1, 1), (0, 2), "axes fraction", "offset points", ha="right", fontsize="small", color=GREY)
    return chart


def figure_of(entries: Sequence[Entry], x: str, y: Sequence[str], title: str, line: Reference | None = None) -> Chart | None:
    """The figure of the first metric in `y` that a cell has, and its derived and projected values; None where no cell has one."""
    sheet_of = arrange(entries, x, y)
    if not any(point.value for point in sheet_of.points):
        return None
    found = next(name for name in y if any(name in entry.metrics for entry in sheet_of.entries))
    return draw(sheet_of, scale_of(x, entries), scale_of(found, entries), title, line)


def full_title(title: str, sheet_of: Sheet) -> str:
    """Two lines: `TTFT`, and `qwen3-tiny, 1 layer, float32 on cpu; 6 of 12 panels`."""
    return f"{title}\n" + "; ".join(part for part in (common(sheet_of.entries), sheet_of.left_out) if part)


def legend(sheet_of: Sheet, looks: Mapping[str, Style], x: Scale, dash: Literal["-", ""] = "-") -> list[Line2D]:
    """The series, each with what failed of it, and then what the marks mean."""
    handles = []
    for name, style in looks.items():
        failed: dict[str, list[str]] = {}
        for point in sheet_of.points:
            if point.series == name and point.value is None:
                failed.setdefault(str(point.entry.fields["status"]), []).append(x.text(point.x) if x.kind != "category" else str(point.x))
        text = "".join(f", {status} at {' '.join(dict.fromkeys(places))}" for status, places in failed.items())
        handles.append(Line2D([], [], color=style.colour, marker=style.marker, markersize=MARKER_SIZE, linestyle=dash, linewidth=1.3, label=name + text))
    return [*handles, *mark_handles(marks_of(sheet_of.points))]


def _categories(sheet_of: Sheet, x: Scale) -> list[Any]:
    """The places on the horizontal axis: in order of size, or of appearance."""
    found = list(dict.fromkeys(str(point.x) if x.kind == "category" else point.x for point in sheet_of.points))
    return found if x.kind == "category" else sorted(found)


def _series(axes: Axes, points: Sequence[Point], style: Style, places: Mapping[object, int], joined: bool) -> None:
    """One line per kind of value, broken where a cell failed, and a marker with its interval for each."""
    for kind, dash in LINES.items():
        known = sorted(((_place(point, places), point.value, point) for point in points if point.value and point.value.kind == kind), key=lambda one: one[0])
        if not known:
            continue
        if joined:
            gaps = [(_place(point, places), math.nan) for point in points if point.value is None]
            track = sorted([*((place, value.median) for place, value, _ in known), *gaps], key=lambda one: one[0])
            axes.plot([place for place, _ in track], [height for _, height in track], color=style.colour, linestyle=dash, linewidth=1.3)
        mark(axes, [(place, point) for place, _, point in known], style)


def mark(axes: Axes, placed: Sequence[tuple[float, Point]], style: Style) -> None:
    """The markers of values at their places, and their intervals."""
    known = [(place, point.value) for place, point in placed if point.value]
    ends = [(place, value.median, value.low, value.high) for place, value in known if value.low is not None and value.high is not None]
    if ends:
        reach = [[max(0.0, middle - low) for _, middle, low, _ in ends], [max(0.0, high - middle) for _, middle, _, high in ends]]
        axes.errorbar([end[0] for end in ends], [end[1] for end in ends], reach, color=style.colour, capsize=2.5, linestyle="", elinewidth=1)
    looks: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for place, point in placed:
        if point.value:
            looks.setdefault((point.value.kind, bool(point.entry.fields.get("oversubscribed"))), []).append((place, point.value.median))
    for (kind, oversubscribed), spots in looks.items():
        xs, ys = zip(*spots, strict=True)
        filled = face(style, kind, oversubscribed)
        axes.plot(xs, ys, color=style.colour, marker=style.marker, markersize=MARKER_SIZE, linestyle="", **filled)  # type: ignore[arg-type]


def _failures(axes: Axes, panel: Panel, looks: Mapping[str, Style], places: Mapping[object, int]) -> None:
    """Open crosses below each other at the top edge, with their status."""
    stacked: dict[float, int] = {}
    order, first = list(looks), min((_place(point, places) for point in panel.points), default=0.0)
    for point in sorted((point for point in panel.points if point.value is None), key=lambda point: order.index(point.series)):
        place, style = _place(point, places), looks[point.series]
        height = FAILURES_TOP - stacked.get(place, 0) * _step(panel)
        stacked[place] = stacked.get(place, 0) + 1
        over_axes = axes.get_xaxis_transform()
        axes.plot(place, height, marker="x", markersize=MARKER_SIZE, markeredgewidth=2, color=style.colour, linestyle="", transform=over_axes, clip_on=False)
        status = str(point.entry.fields["status"])
        side, offset = ("left", 6) if place == first else ("right", -6)
        axes.annotate(status, (place, height), (offset, 0), over_axes, "offset points", ha=side, va="center", fontsize="x-small", color=style.colour)


def _most_failures(panel: Panel) -> int:
    places = [str(point.x) for point in panel.points if point.value is None]
    return max((places.count(place) for place in places), default=0)


def _step(panel: Panel) -> float:
    return min(FAILURE_STEP, MOST_ROOM / max(1, _most_failures(panel)))


def _room(panel: Panel, sheet_of: Sheet) -> float:
    """The part of the height that failures take; the same in all panels, because they share an axis."""
    most = max(sheet_of.panels, key=_most_failures)
    return _most_failures(most) * _step(most) + 0.02 if _most_failures(most) else 0.0


def _place(point: Point, places: Mapping[object, int]) -> float:
    return float(places[str(point.x)]) if places else float(point.x)


def _line(axes: Axes, line: Reference) -> None:
    axes.axhline(line.value, color=GREY, linestyle="--", linewidth=1, zorder=1)
    axes.annotate(line.text, (1, line.value), (-2, 2), ("axes fraction", "data"), "offset points", ha="right", fontsize="small", color=GREY)
