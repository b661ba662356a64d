"""What changed between two files: the ratio of each cell with its interval, around the band of changes that are too small to matter.

One panel per metric, with crosses for cells that broke. Numbers and verdicts are those of the comparison; nothing is judged here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from cpbench.comparison import Comparison
from cpbench.judging import Row
from cpbench.plot.canvas import Chart, drawing, plain, sheet
from cpbench.plot.scales import TITLES
from cpbench.plot.style import COLOURS, GREY, MARKER_SIZE

ROW, HEAD, WIDTH, LETTER, FEWEST = 0.24, 0.9, 3.8, 0.08, 3  # inches, and the rows that a panel has room for at least
MAX_ROWS = 60
BAND = "#ececec"
WORSE, BETTER = COLOURS[1], COLOURS[0]
LOOKS = {
    "slower": (WORSE, "s"),
    "worse": (WORSE, "s"),
    "broke": (WORSE, "x"),
    "faster": (BETTER, "o"),
    "better": (BETTER, "o"),
    "fixed": (BETTER, "x"),
    "same": (GREY, "D"),
    "unsure": (COLOURS[3], "P"),
    "changed": (COLOURS[6], "^"),
}


def draw(comparison: Comparison) -> Chart | None:
    """None where no cell has a ratio."""
    rows = [row for row in comparison.rows if row.verdict in LOOKS and (row.ratio or row.verdict in ("broke", "fixed"))]
    if not any(row.ratio for row in rows):
        return None
    panels = {metric: _largest([row for row in rows if row.metric == metric]) for metric in dict.fromkeys(row.metric for row in rows)}
    shown = [row for members in panels.values() for row in members]
    left = f"; {len(shown)} of {len(rows)} rows, the largest changes" if len(shown) < len(rows) else ""
    title = f"{plain(comparison.names[1])} against {plain(comparison.names[0])}\ngrey: within {100 * comparison.noise:.3g}%{left}"
    with drawing():
        height = max(FEWEST, *(len(members) for members in panels.values()))
        size = (WIDTH + LETTER * max(len(plain(row.label)) for row in shown), HEAD + ROW * height)
        handles = [_handle(verdict) for verdict in LOOKS if any(row.verdict == verdict for row in shown)]
        chart, grid = sheet(title, [TITLES.get(metric, metric) for metric in panels], size=size, legend=handles)
        for axes, members in zip(grid, panels.values(), strict=True):
            _panel(axes, members, comparison.noise, height)
    return chart


def _largest(rows: Sequence[Row]) -> list[Row]:
    """Those that fit, in their order; one without a ratio has changed most."""
    kept = sorted(range(len(rows)), key=lambda index: -abs(math.log(rows[index].ratio or math.inf)))[:MAX_ROWS]
    return [rows[index] for index in sorted(kept)]


def _handle(verdict: str) -> Line2D:
    colour, marker = LOOKS[verdict]
    return Line2D([], [], color=colour, marker=marker, markersize=MARKER_SIZE, linestyle="", label=verdict)


def _panel(axes: Axes, rows: Sequence[Row], noise: float, height: int) -> None:
    ends = [end for row in rows for end in (row.ratio, *_interval(row)) if end]
    far = 1.08 * max(noise, *(abs(end - 1) for end in ends), 0.01)
    axes.axvspan(1 / (1 + noise), 1 + noise, color=BAND, linewidth=0, zorder=0)
    axes.axvline(1, color=GREY, linewidth=1, zorder=1)
    for place, row in enumerate(rows):
        colour, marker = LOOKS[row.verdict]
        if interval := _interval(row):
            axes.plot(interval, [place, place], color=colour, linewidth=1.3, marker="|", markersize=5)
        axes.plot(row.ratio or 1 + far, place, color=colour, marker=marker, markersize=MARKER_SIZE, linestyle="", clip_on=False)
        if not row.ratio:
            axes.annotate(row.verdict, (1 + far, place), (-7, 0), textcoords="offset points", ha="right", va="center", fontsize="small", color=colour)
    axes.set_xlim(1 - far, 1 + far)
    axes.set_yticks(range(len(rows)), [plain(row.label) for row in rows])
    axes.set_ylim(height - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{100 * (ratio - 1):+.3g}%" if abs(ratio - 1) > 1e-9 else "0"))
    axes.set_xlabel("change")


def _interval(row: Row) -> tuple[float, ...]:
    return row.evidence.interval or () if row.evidence else ()
