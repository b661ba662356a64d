"""The sheet that figures are drawn on: its panels, title, legend and size, and how it becomes a file or a picture in a notebook.

Headless: no window and no global state of matplotlib is touched. Texts from files are never read as formulas. The same data always gives
the same bytes. What is drawn on the panels is decided by the modules of the figures.
"""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import rc_context, rcParamsDefault
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

PANEL, SMALL = (5.2, 3.8), (3.5, 2.9)  # inches of the only panel, and of one of several
MAX_COLUMNS, MAX_ROWS_IN_LEGEND = 3, 26
LETTER, LINE, TITLE_LETTER = 0.085, 0.2, 0.085  # inches: of the legend, and of the title
DOTS_PER_INCH = 150
OTHERS = ("backend", "interactive", "toolbar", "webagg", "docstring")  # of the reader's settings: those that decide how figures are shown
MAX_NAME = 60  # characters of a text from a file
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",  # text that can be searched for
    "svg.hashsalt": "cpbench",
    "text.parse_math": False,
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}


class Chart(Figure):
    """A matplotlib figure like any other that a notebook shows as SVG, whatever backend it has chosen."""

    def _repr_html_(self) -> str:
        return svg(self)


@contextmanager
def drawing() -> Iterator[None]:
    """Within it matplotlib has its own defaults and ours, whatever the reader's are, and is silent about letters that no font here has."""
    settings: dict[Any, Any] = {name: value for name, value in rcParamsDefault.items() if not name.startswith(OTHERS)} | SETTINGS
    with rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def sheet(
    title: str, panels: Sequence[str], *, size: tuple[float, float] | None = None, legend: Sequence[Artist] = (), share_y: bool = False
) -> tuple[Chart, list[Axes]]:
    """An empty figure with a panel for each name, `size` inches each, or as large as panels usually are. The legend is beside them."""
    size = size or (PANEL if len(panels) == 1 else SMALL)
    columns = min(MAX_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    names = [str(handle.get_label()) for handle in legend]
    in_legend = math.ceil(len(names) / MAX_ROWS_IN_LEGEND)
    beside = in_legend * (0.6 + LETTER * max(map(len, names), default=0)) if names else 0.0
    height = max(size[1] * rows + 0.5, LINE * math.ceil(len(names) / max(1, in_legend)) + 0.6)
    chart = Chart(figsize=(size[0] * columns + beside, height), layout="constrained")
    FigureCanvasAgg(chart)
    grid = chart.subplots(rows, columns, squeeze=False, sharey=share_y).ravel().tolist()
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes, name in zip(grid, panels, strict=False):
        axes.set_title(name)
    letters = int(size[0] * columns / TITLE_LETTER)
    chart.suptitle("\n".join(line for part in title.split("\n") for line in textwrap.wrap(part, letters)), x=0.01, ha="left", fontsize="large")
    if names:
        chart.legend(handles=list(legend), loc="outside right upper", ncols=in_legend, alignment="left")
    return chart, grid[: len(panels)]


def write(chart: Figure, path: Path) -> None:
    """A file of the kind that the path ends with: .svg or .png. Raises OSError where it cannot be written."""
    with drawing():
        chart.savefig(path, dpi=DOTS_PER_INCH, metadata={"Date": None} if path.suffix == ".svg" else {"Software": None})


def svg(chart: Figure) -> str:
    """The figure as an SVG element, to stand in a page."""
    buffer = io.StringIO()
    with drawing():
        chart.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def plain(text: object) -> str:
    """A text from a file: printable, and not longer than a label may be."""
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(text))
    return shown if len(shown) <= MAX_NAME else f"{shown[: MAX_NAME - 3]}..."
