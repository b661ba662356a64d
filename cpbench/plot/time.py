"""Time to first token against length; of a layer or of the attention where those were the target."""

from __future__ import annotations

from collections.abc import Sequence

from cpbench.plot.canvas import Chart
from cpbench.plot.entries import Entry
from cpbench.plot.lines import figure_of
from cpbench.records import TIME_METRIC

TIMES = tuple(f"{kind}{name}" for kind in ("", "derived_", "projected_") for name in TIME_METRIC.values())
NAMES = {"prefill": "TTFT", "layer": "Time of a layer", "attention": "Time of the attention"}


def draw(entries: Sequence[Entry]) -> Chart | None:
    """A line per layout and strategy; None where nothing was timed."""
    targets = {str(entry.fields.get("target")) for entry in entries}
    return figure_of(entries, "seq", TIMES, NAMES.get(targets.pop(), "Time") if len(targets) == 1 else "Time")
