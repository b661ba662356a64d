"""A figure of memory over time: one panel per rank, phases as coloured bands, the peak named. PNG or SVG, by the file's suffix.

What is drawn was measured elsewhere (measure/history.py); of many ranks only those with the highest and the lowest peak are shown.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cpbench.measure.history import History, Phase
from cpbench.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Colour = tuple[float, float, float]

MAX_PANELS = 8
MAX_COLOURS = 9  # in the legend; what takes less time is grey
VISIBLE = 0.003  # part of the time that a path must be seen for to get a colour
FAR = 2.0  # a capacity beyond so many times the peak would only flatten the picture
WIDTH, HEADROOM, PANEL_HEIGHT = 11.0, 1.3, 1.9  # inches
REST: Colour = (0.9, 0.9, 0.9)
UNITS = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1))
TIMES = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


def draw(histories: Mapping[int, History], path: str | Path, capacity: int | None = None) -> None:
    """Draw histories by rank. `capacity`: bytes that a rank may have, as a line where it is in reach. Raises OSError for a file that cannot be."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    ranks = _shown(histories)
    figure = Figure(figsize=(WIDTH, HEADROOM + PANEL_HEIGHT * len(ranks)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(ranks), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    most, longest = max(histories[rank].peak for rank in ranks), max(histories[rank].seconds for rank in ranks)
    unit, time_unit = _unit(most), next((unit for unit in TIMES if longest >= unit[1]), TIMES[-1])
    limit = capacity if capacity and capacity <= FAR * most else None
    colours = _colours([histories[rank] for rank in ranks])
    for panel, rank in zip(panels, ranks, strict=True):
        is_right = _panel(panel, histories[rank], colours, unit, time_unit)
        panel.set_title(f"rank {rank}", loc="left", fontsize="medium")
        if limit:
            _line(panel, limit / unit[1], f"limit {format_bytes(limit)}", is_right=not is_right)
    panels[-1].set_xlabel(f"time in {time_unit[0]}")
    panels[0].set_xlim(0, 1.005 * longest / time_unit[1])
    panels[0].set_ylim(0, 1.15 * max(most, limit or 0) / unit[1])
    figure.supylabel(unit[0], fontsize="medium")
    hidden = f", {len(ranks)} of {len(histories)} ranks" if len(ranks) < len(histories) else ""
    figure.suptitle(f"Memory over time ({histories[ranks[0]].source}{hidden})", x=0.01, ha="left", fontsize="large")
    if colours:
        handles = [Patch(color=colour, label=path) for path, colour in colours.items()]
        figure.legend(handles=handles, loc="outside lower left", ncols=5, frameon=False, fontsize="small")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "cpbench"}):  # text that can be searched for, and the same bytes for the same data
        figure.savefig(path, dpi=150, metadata={"Date": None} if Path(path).suffix == ".svg" else None)


def _shown(histories: Mapping[int, History]) -> list[int]:
    """The ranks that are drawn, in order: all, or those with the highest peaks and the one with the lowest."""
    ranks = sorted(histories, key=lambda rank: (-histories[rank].peak, rank))
    return sorted(ranks if len(ranks) <= MAX_PANELS else [*ranks[: MAX_PANELS - 1], ranks[-1]])


def _panel(panel: Axes, history: History, colours: Mapping[str, Colour], unit: tuple[str, int], time_unit: tuple[str, float]) -> bool:
    """One rank. Returns whether its peak is on the right."""
    for phase in _bands(history):
        colour = colours.get(phase.path, REST)
        panel.axvspan(phase.start / time_unit[1], phase.end / time_unit[1], facecolor=colour, linewidth=0, zorder=phase.depth / 10)
    times = [seconds / time_unit[1] for seconds, _ in history.levels]
    sizes = [size / unit[1] for _, size in history.levels]
    end = history.seconds / time_unit[1]
    panel.step([*times, end], [*sizes, sizes[-1]], where="post", color="black", linewidth=1)
    highest = max(range(len(sizes)), key=lambda index: sizes[index])
    is_right = times[highest] > end / 2
    panel.plot(times[highest], sizes[highest], marker="o", markersize=4, color="black")
    text = f"peak {format_bytes(history.peak)}" + (f" in {history.peak_phase}" if history.peak_phase else "")
    side, offset = ("right", -6) if is_right else ("left", 6)
    panel.annotate(text, (times[highest], sizes[highest]), (offset, 5), textcoords="offset points", ha=side, fontsize="small")
    panel.spines[["top", "right"]].set_visible(False)
    return is_right


def _line(panel: Axes, height: float, text: str, *, is_right: bool) -> None:
    """A limit, named on one side."""
    panel.axhline(height, color="firebrick", linestyle="--", linewidth=1)
    x, side, offset = (1, "right", -4) if is_right else (0, "left", 4)
    panel.annotate(text, (x, height), (offset, 2), ("axes fraction", "data"), "offset points", color="firebrick", ha=side, fontsize="small")


def _bands(history: History) -> list[Phase]:
    """The phases that are drawn: those of depth 1 and, over them, 2."""
    return [phase for phase in history.phases if phase.depth <= 2]


def _colours(histories: Sequence[History]) -> dict[str, Colour]:
    """A light colour for each path that can be seen, in order of time: of too many those that take longest, without what lies over them."""
    from matplotlib import colormaps

    seen: defaultdict[str, float] = defaultdict(float)
    for phase in (phase for history in histories for phase in _bands(history)):
        seen[phase.path] += phase.end - phase.start
        seen[phase.path.rpartition("/")[0]] -= phase.end - phase.start
    shortest = VISIBLE * sum(history.seconds for history in histories)
    longest = [path for path in sorted(seen, key=lambda path: -seen[path])[:MAX_COLOURS] if seen[path] >= shortest]
    order = dict.fromkeys(phase.path for history in histories for phase in _bands(history))
    shades = {path: colormaps["tab10"](number) for number, path in enumerate(path for path in order if path in longest)}
    return {path: (0.55 + 0.45 * red, 0.55 + 0.45 * green, 0.55 + 0.45 * blue) for path, (red, green, blue, _) in shades.items()}


def _unit(most: int) -> tuple[str, int]:
    return next((unit for unit in UNITS if most >= unit[1]), UNITS[-1])
