"""How series look: a colour and a marker each, told apart without seeing colours, and the marks of values that are not plain measurements.

Colours are those of Okabe and Ito (2008), which people with any colour vision tell apart; the eighth, yellow, is lost on white and left
out. Colours stand for what varies most and markers for the rest, so that twelve layouts of four algorithms are readable.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.lines import Line2D

from cpbench.plot.entries import Entry
from cpbench.plot.panels import Point

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h", "d")
GREY, PALE = "#767676", "#d9d9d9"
FAILED, OVERSUBSCRIBED = "failed", "oversubscribed"
MARKER_SIZE = 6.0
REACH = {False: 2.0, True: 16.0}  # so many times the largest value may a reference line be on a linear and on a logarithmic axis
LINES = {"measured": "-", "derived": "--", "projected": ":"}


@dataclass(frozen=True)
class Style:
    """How one series is drawn."""

    colour: str
    marker: str


@dataclass(frozen=True)
class Reference:
    """A line that means something: an ideal, or what a device has."""

    value: float
    text: str


def styles(series: Mapping[str, Entry]) -> dict[str, Style]:
    """By the name of each series, from one entry of it. Algorithms get colours and layouts markers where there are more series than colours."""
    labels = list(dict.fromkeys(entry.label for entry in series.values()))
    if len(labels) < len(series) and len(labels) <= len(COLOURS) and all(name.startswith(entry.label) for name, entry in series.items()):
        return _by_label(series, labels)
    if len(series) <= len(COLOURS):
        return {name: Style(COLOURS[number], MARKERS[number]) for number, name in enumerate(series)}
    layouts, strategies = (list(dict.fromkeys(str(entry.fields[field]) for entry in series.values())) for field in ("layout", "strategy"))
    looks = {name: (str(entry.fields["strategy"]), str(entry.fields["layout"])) for name, entry in series.items()}
    shared = max(Counter(strategy for strategy, _ in looks.values()).values())
    is_unique = len(set(looks.values())) == len(series) and len(strategies) <= len(COLOURS) and len(layouts) <= len(MARKERS)
    if is_unique and 2 * shared <= len(series):  # otherwise one colour would be most of the figure
        return {name: Style(COLOURS[strategies.index(one)], MARKERS[layouts.index(two)]) for name, (one, two) in looks.items()}
    return {name: Style(COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]) for number, name in enumerate(series)}


def _by_label(series: Mapping[str, Entry], labels: Sequence[str]) -> dict[str, Style]:
    """A colour for each layout and strategy; its files, batches or kernels are told apart by markers."""
    seen = dict.fromkeys(labels, 0)
    found = {}
    for name, entry in series.items():
        found[name] = Style(COLOURS[labels.index(entry.label)], MARKERS[seen[entry.label] % len(MARKERS)])
        seen[entry.label] += 1
    return found


def face(style: Style, kind: str, oversubscribed: bool) -> dict[str, str]:
    """How the marker of a value is filled: fully; not at all where it is oversubscribed or projected; half where it is derived."""
    if kind == "derived":
        return {"fillstyle": "left", "markerfacecolor": style.colour, "markerfacecoloralt": "white"}
    return {"markerfacecolor": "white" if oversubscribed or kind == "projected" else style.colour}


def marks_of(points: Iterable[Point]) -> set[str]:
    """Which marks occur among these points."""
    found = set()
    for point in points:
        found.add(point.value.kind if point.value else FAILED)
        found |= {OVERSUBSCRIBED} if point.value and point.entry.fields.get("oversubscribed") else set()
    return found


def mark_handles(marks: Collection[str]) -> list[Line2D]:
    """Legend entries that say what the marks mean that occur."""
    grey = Style(GREY, "o")
    texts = {OVERSUBSCRIBED: "hollow: more threads than cores", "derived": "derived, not measured", "projected": "projected, not measured"}
    handles = [
        Line2D([], [], color=GREY, marker="o", markersize=MARKER_SIZE, linestyle=LINES.get(mark, ""), label=text, **face(grey, mark, mark == OVERSUBSCRIBED))  # type: ignore[arg-type]
        for mark, text in texts.items()
        if mark in marks
    ]
    if FAILED in marks:
        handles.append(Line2D([], [], color=GREY, marker="x", markersize=MARKER_SIZE, markeredgewidth=2, linestyle="", label="failed: no value"))
    return handles
