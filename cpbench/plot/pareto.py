"""Time against peak memory: which layouts no other beats in both, joined by a line, for each batch.

The front is that of the medians (recommend.py gives the same advice in words). Cells with context parallelism off are no candidates:
each of their ranks does the work of one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from matplotlib.axes import Axes

from cpbench.plot.canvas import Chart, drawing, sheet
from cpbench.plot.entries import Entry, varying
from cpbench.plot.lines import full_title, legend, mark
from cpbench.plot.panels import WORK, Panel, arrange
from cpbench.plot.scales import Scale, is_log, lay_out_value_x, lay_out_y, scale_of
from cpbench.plot.style import GREY, styles
from cpbench.plot.time import TIMES
from cpbench.recommend import Candidate, advise

MEMORY, PROJECTED = "peak_bytes", "projected_peak_live_bytes"


def draw(entries: Sequence[Entry]) -> Chart | None:
    """A panel per batch; None where no batch has two layouts of which time and memory are known."""
    known = [entry for entry in map(_with_peak, entries) if entry.cp_active and MEMORY in entry.metrics]
    facet = [*varying(known, WORK), "lengths_label"]
    batches = Counter(tuple(entry.get(name) for name in facet) for entry in known if any(name in entry.metrics for name in TIMES))
    sheet_of = arrange([entry for entry in known if batches[tuple(entry.get(name) for name in facet)] > 1], MEMORY, TIMES, facet=facet)
    if not sheet_of.points:
        return None
    x, y = scale_of(MEMORY, known), scale_of(next(name for name in TIMES if any(name in entry.metrics for entry in known)), known)
    looks = styles(sheet_of.series)
    log = any(is_log(y, _seconds(panel)) for panel in sheet_of.panels)
    with drawing():
        chart, grid = sheet(
            full_title(f"{y.title} against peak memory", sheet_of), [panel.name for panel in sheet_of.panels], legend=legend(sheet_of, looks, x, "")
        )
        for axes, panel in zip(grid, sheet_of.panels, strict=True):
            _panel(axes, panel, x, y, log)
            for point in panel.points:
                mark(axes, [(float(point.x), point)], looks[point.series])
    return chart


def _with_peak(entry: Entry) -> Entry:
    """A cell that was projected has the peak that was projected with its time."""
    if MEMORY in entry.metrics or PROJECTED not in entry.metrics:
        return entry
    return replace(entry, metrics={**entry.metrics, MEMORY: entry.metrics[PROJECTED]})


def _panel(axes: Axes, panel: Panel, x: Scale, y: Scale, log: bool) -> None:
    """Axes, and the front as steps, with the names of those on it."""
    lay_out_value_x(axes, x, [point.x for point in panel.points], 0.05)
    lay_out_y(axes, y, _seconds(panel), 0.1, log=log)
    if not log:  # what is compared are differences, and 0 is far away
        low, high = min(_seconds(panel)), max(_seconds(panel))
        margin = max(0.15 * (high - low), 0.05 * abs(high)) or 1.0
        axes.set_ylim(low - margin, high + margin)
    kinds = [point.value.kind for point in panel.points if point.value]
    kind = "measured" if "measured" in kinds else kinds[0]  # what was projected beats nothing that was measured
    known = [(point, point.value.median) for point in panel.points if point.value and point.value.kind == kind]
    advice = advise([Candidate(point.series, seconds, (seconds, seconds), int(point.x)) for point, seconds in known])
    front = sorted(advice.front if advice else (), key=lambda candidate: candidate.memory or 0)
    axes.plot([one.memory or 0 for one in front], [one.seconds for one in front], color=GREY, linewidth=1, linestyle="-", drawstyle="steps-post", zorder=1)
    for one in front:
        side, offset = ("right", -4) if (one.memory or 0) > axes.get_xlim()[1] / 2 else ("left", 4)
        axes.annotate(one.name, (one.memory or 0, one.seconds), (offset, 5), textcoords="offset points", ha=side, fontsize="x-small")


def _seconds(panel: Panel) -> list[float]:
    return [point.value.median for point in panel.points if point.value]
