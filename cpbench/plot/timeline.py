"""The timeline of a layer: a row for the work of each rank and one for each axis that it communicates on, hatched where nothing hides it.

Of many ranks only the first are drawn, and the title says so. How the stretches came about is the projection's affair.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from cpbench.plot.canvas import Chart, drawing, plain, sheet
from cpbench.plot.scales import Scale, lay_out_value_x
from cpbench.plot.style import COLOURS
from cpbench.projection.lanes import Laid, laid_out
from cpbench.projection.stretch import COMPUTE, Stretch

WIDTH, ROW, HEAD, LETTER = 8.0, 0.3, 0.9, 0.065  # inches: of the axes, of a row, of what is around rows, and of a letter in a bar
MOST_ROWS, THICK, ROOM = 24, 0.74, 0.01
SCALE = Scale("layer_s", "time from the start of the layer", "seconds")


def draw(stretches: Sequence[Stretch], title: str) -> Chart | None:
    """A figure with this title, of one line or several; None where nothing happens."""
    laid = laid_out(stretches)
    rows = list(dict.fromkeys((one.stretch.rank, one.stretch.lane) for one in laid))
    if not rows:
        return None
    shown, ranks = _that_fit(rows), len({rank for rank, _ in rows})
    drawn = len({rank for rank, _ in shown})
    colours = {
        lane: COLOURS[number % len(COLOURS)] for number, lane in enumerate(sorted(dict.fromkeys(lane for _, lane in shown), key=lambda lane: lane != COMPUTE))
    }
    handles = [Patch(color=colour, label="own work" if lane == COMPUTE else plain(lane)) for lane, colour in colours.items()]
    if any(one.exposed for one in laid):
        handles.append(Patch(facecolor="white", edgecolor="black", hatch="////", linewidth=0.5, label="exposed: the rank\ndoes nothing else"))
    with drawing():
        heading = "\n".join(map(plain, title.split("\n"))) + (f"\nthe first {drawn} of {ranks} ranks" if drawn < ranks else "")
        chart, (axes,) = sheet(heading, [""], size=(WIDTH, HEAD + ROW * len(shown)), legend=handles)
        end = max(one.stretch.end for one in laid)
        lay_out_value_x(axes, SCALE, [end], ROOM)
        _label_rows(axes, shown)
        for one in laid:
            if (row := (one.stretch.rank, one.stretch.lane)) in shown:
                _bar(axes, shown.index(row), one, colours[one.stretch.lane], end)
    return chart


def _that_fit(rows: Sequence[tuple[int, str]]) -> list[tuple[int, str]]:
    """The rows of as many ranks as there is room for, of one at least."""
    ranks = list(dict.fromkeys(rank for rank, _ in rows))
    most = max((count for count in range(1, len(ranks) + 1) if sum(rank in ranks[:count] for rank, _ in rows) <= MOST_ROWS), default=1)
    return [row for row in rows if row[0] in ranks[:most]]


def _label_rows(axes: Axes, rows: Sequence[tuple[int, str]]) -> None:
    """One label for each row, and a line between two ranks."""
    axes.set_yticks(range(len(rows)), [f"rank {rank}  {plain(lane)}" for rank, lane in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    for number in range(1, len(rows)):
        if rows[number][0] != rows[number - 1][0]:
            axes.axhline(number - 0.5, color="#b0b0b0", linewidth=0.7)


def _bar(axes: Axes, row: int, one: Laid, colour: str, end: float) -> None:
    """A stretch, its exposed parts, and as much of its name as fits."""
    axes.barh(row, one.seconds, THICK, left=one.stretch.start, color=colour, edgecolor="white", linewidth=0.6)
    for start, stop in one.exposed:
        axes.barh(row, stop - start, THICK, left=start, color="none", hatch="////", edgecolor="white", linewidth=0)
    if text := _that_fits(one.stretch.name, one.seconds / end * WIDTH / LETTER):
        place = one.stretch.start + one.seconds / 2
        box = {"facecolor": colour, "edgecolor": "none", "pad": 1.0} if one.exposed else None
        axes.text(place, row, text, ha="center", va="center", fontsize="x-small", color="white", clip_on=True, bbox=box)


def _that_fits(name: str, letters: float) -> str:
    """A name, else the last part of its path, else nothing."""
    return next((text for text in (plain(name), plain(name.rpartition("/")[2])) if len(text) + 1 <= letters), "")
