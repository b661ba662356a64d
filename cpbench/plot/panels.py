"""Points, series and panels: what of the entries a figure shows, how each series is called, and what stands in a panel of its own.

A series is called by layout and strategy, and by as much more as tells its cells from others at the same place. Draws nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from cpbench.plot.canvas import plain
from cpbench.plot.entries import Entry, Value, varying
from cpbench.units import format_count

WORK = ("target", "model", "layers", "dtype", "device")  # cells that differ in these do different work, and get panels of their own
BATCHES = ("batch", "prefix")  # so do these, unless something else is asked for; then a line never joins cells that differ in them
UNLIKE = ("file", *BATCHES)
REST = ("lengths_label", "partition", "kernel", "options", "cell")  # what else may tell cells apart, as far as it is needed
UNITS_OF = {"batch": "b{}", "prefix": "@{}", "dp": "dp{}", "cp": "cp{}", "tp": "tp{}", "pp": "pp{}", "ep": "ep{}"}
MAX_PANELS, MAX_SERIES = 6, 40


@dataclass(frozen=True)
class Point:
    """One value of one cell; None where the cell failed."""

    entry: Entry
    series: str
    x: Any
    value: Value | None


@dataclass(frozen=True)
class Panel:
    """Points that share a pair of axes."""

    name: str
    points: list[Point] = field(default_factory=list)


@dataclass(frozen=True)
class Sheet:
    """All panels of a figure. `series`: an entry of each, in order of appearance; `left_out`: what there was no room for, in words."""

    panels: list[Panel]
    series: dict[str, Entry]
    left_out: str = ""

    @property
    def points(self) -> list[Point]:
        return [point for panel in self.panels for point in panel.points]

    @property
    def entries(self) -> list[Entry]:
        return [point.entry for point in self.points]


def arrange(entries: Sequence[Entry], x: str, y: Sequence[str], *, by: Sequence[str] = (), facet: Sequence[str] | None = None) -> Sheet:
    """Points of those metrics `y` that a cell has, in series by the fields `by` (layout and strategy) and panels by `facet` (different work)."""
    used = [entry for entry in entries if entry.get(x) is not None and (entry.failed or any(name in entry.metrics for name in y))]
    apart = varying(used, (*WORK, *BATCHES)) if facet is None else list(facet)
    panels: dict[str, list[Entry]] = {}
    for entry in used:
        panels.setdefault(_name(entry, apart), []).append(entry)
    drawn = {name: members for name, members in panels.items() if any(not entry.failed for entry in members)}
    shown = dict(sorted(drawn.items(), key=lambda item: _last(item[1]))[:MAX_PANELS])
    members = [entry for name, entries_of in drawn.items() if name in shown for entry in entries_of]
    names = _series(members, x, by, apart)
    series: dict[str, Entry] = {}
    for entry, name in zip(members, names, strict=True):
        series.setdefault(name, entry)
    kept = set(list(series)[:MAX_SERIES])
    sheet: dict[str, Panel] = {name: Panel(name) for name in drawn if name in shown}
    for entry, name in zip(members, names, strict=True):
        if name in kept:
            sheet[_name(entry, apart)].points.extend(_points(entry, name, x, y))
    left = [f"{len(part)} of {len(whole)} {what}" for part, whole, what in ((shown, drawn, "panels"), (kept, series, "series")) if len(part) < len(whole)]
    return Sheet(list(sheet.values()), {name: entry for name, entry in series.items() if name in kept}, " and ".join(left))


def _points(entry: Entry, series: str, x: str, y: Sequence[str]) -> list[Point]:
    values: list[Value | None] = [entry.metrics[name] for name in y if name in entry.metrics]
    return [Point(entry, series, entry.get(x), value) for value in values or [None]]


def common(entries: Sequence[Entry]) -> str:
    """What all cells share, for a title: `qwen3-tiny, 1 layer, float32 on cpu`."""
    fields = {name: entries[0].fields.get(name) for name in WORK if name not in varying(entries, WORK)} if entries else {}
    layers = fields.get("layers") if fields.get("target", "prefill") == "prefill" else None
    dtype, device = fields.get("dtype"), fields.get("device")
    on = f"{dtype} on {device}" if dtype and device else dtype or device
    parts = [fields.get("model"), _layers(layers) if layers else None, on]
    return ", ".join(plain(part) for part in parts if part)


def _layers(layers: int) -> str:
    return "1 layer" if layers == 1 else f"{layers} layers"


def _last(entries: Sequence[Entry]) -> tuple[int, float]:
    """Panels in the order in which they have room: those with more cells first, and then those of longer sequences."""
    return -len(entries), -float(entries[0].fields.get("seq") or 0)


def _name(entry: Entry, fields: Sequence[str]) -> str:
    return ", ".join(_field(entry, name) for name in fields)


def _field(entry: Entry, name: str) -> str:
    value = entry.get(name)
    if name in UNITS_OF and isinstance(value, int):
        return UNITS_OF[name].format(format_count(value) if name == "prefix" else value)
    if name == "layers" and isinstance(value, int):
        return _layers(value)
    if name == "seq" and isinstance(value, int):
        return format_count(value)
    return plain("none" if value in (None, "") else f"{value:.3g}" if isinstance(value, float) else value)


def _series(entries: Sequence[Entry], x: str, by: Sequence[str], apart: Sequence[str]) -> list[str]:
    """A name for each entry. What tells entries apart that would stand at the same place is added, one field after the other."""
    names = [", ".join(_field(entry, name) for name in by) if by else plain(entry.label) for entry in entries]
    if by:
        return names
    told = BATCHES if x == "lengths_label" else ()
    for extra in (name for name in (*UNLIKE, *REST) if name not in (x, *apart, *told)):
        places: dict[tuple[str, str, str], list[Entry]] = {}
        panels: dict[str, list[Entry]] = {}
        for name, entry in zip(names, entries, strict=True):
            places.setdefault((name, str(entry.get(x)), _name(entry, apart)), []).append(entry)
            panels.setdefault(_name(entry, apart), []).append(entry)
        if any(varying(members, [extra]) for members in (panels if extra in UNLIKE else places).values()):
            names = [f"{name} {_field(entry, extra)}" for name, entry in zip(names, entries, strict=True)]
    return names
