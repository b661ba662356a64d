"""Scaling: the speed-up over the baseline as a part of the compute that was added, against ranks; the ideal is all of it.

On a CPU the compute is the cores that the ranks' threads can fill, so that ranks beyond the cores are no reproach. Numbers are those of
the tables (report/rows.py). One panel per batch, one line per axis that grows: `cpN ring`, `cpNtp2 ring`, `tpN`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from cpbench.plot.canvas import Chart
from cpbench.plot.entries import Entry, varying
from cpbench.plot.lines import draw as draw_lines
from cpbench.plot.panels import WORK, arrange
from cpbench.plot.scales import scale_of
from cpbench.plot.style import Reference

GROWING = ("cp", "tp", "dp", "pp")  # the first that a layout has is the one that grows along a line
IDEAL = Reference(1.0, "ideal")


def draw(entries: Sequence[Entry]) -> Chart | None:
    """None where fewer than two numbers of ranks have an efficiency."""
    known = [entry for entry in entries if "efficiency" in entry.metrics]
    if len({entry.fields["world_size"] for entry in known}) < 2:
        return None
    extra, facet = varying(known, ("file",)), [*varying(known, WORK), "lengths_label"]
    grown = _grown(known, [*extra, *facet])
    families = [
        replace(entry, fields={**entry.fields, "family": name})
        for entry in known
        for name in (entry.is_baseline and grown.get(_panel(entry, [*extra, *facet]))) or [family(entry)]
    ]
    sheet_of = arrange(families, "world_size", ("efficiency",), by=("family", *extra), facet=facet)
    return draw_lines(sheet_of, scale_of("world_size", families), scale_of("efficiency", families), "Scaling efficiency against the smallest layout", IDEAL)


def _grown(entries: Sequence[Entry], same: Sequence[str]) -> dict[str, list[str]]:
    """The lines of every panel: each starts at the baseline, and has what is alike but for its size."""
    found: dict[str, dict[str, None]] = {}
    for entry in entries:
        if not entry.is_baseline:
            found.setdefault(_panel(entry, same), {})[family(entry)] = None
    return {panel: list(names) for panel, names in found.items()}


def _panel(entry: Entry, same: Sequence[str]) -> str:
    return repr([entry.get(name) for name in same])


def family(entry: Entry) -> str:
    """The label of a cell with N for the size of the axis that grows; as it is on one rank."""
    for axis in GROWING:
        replaced, found = re.subn(rf"(?<![a-z]){axis}\d+", f"{axis}N", entry.label, count=1)
        if found and entry.fields["world_size"] != 1:
            return replaced
    return entry.label
