"""Peak memory of the rank that needs most against length, with what a rank may have where all cells may have the same."""

from __future__ import annotations

from collections.abc import Sequence

from cpbench.plot.canvas import Chart
from cpbench.plot.entries import Entry
from cpbench.plot.lines import figure_of
from cpbench.plot.style import Reference
from cpbench.units import format_bytes

METRICS = ("peak_bytes", "derived_peak_live_bytes", "projected_peak_live_bytes", "derived_peak_allocator_bytes", "projected_peak_allocator_bytes")


def draw(entries: Sequence[Entry]) -> Chart | None:
    """A line per layout and strategy; None where no peak is known."""
    capacities = {entry.capacity for entry in entries}
    capacity = capacities.pop() if len(capacities) == 1 else None
    line = Reference(float(capacity), f"capacity {format_bytes(capacity)}") if capacity else None
    return figure_of(entries, "seq", METRICS, "Peak memory per rank", line)
