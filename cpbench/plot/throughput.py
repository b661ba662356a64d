"""Achieved TFLOP/s of each rank against length, with what a device reaches at best where all cells have the same."""

from __future__ import annotations

from collections.abc import Sequence

from cpbench.plot.canvas import Chart
from cpbench.plot.entries import Entry
from cpbench.plot.lines import figure_of
from cpbench.plot.style import Reference

METRICS = ("tflops_per_rank", "derived_tflops_per_rank", "projected_tflops_per_rank")


def draw(entries: Sequence[Entry]) -> Chart | None:
    """A line per layout and strategy; None where no FLOP/s are known."""
    peaks = {entry.peak.flops / 1e12 if entry.peak else None for entry in entries if "tflops_per_rank" in entry.metrics}
    peak = peaks.pop() if len(peaks) == 1 else None
    line = Reference(peak, f"peak of the device {peak:.3g}") if peak else None
    return figure_of(entries, "seq", METRICS, "TFLOP/s per rank", line)
