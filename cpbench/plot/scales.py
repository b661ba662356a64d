"""Axes with the units of the trade: lengths as `4k 32k 1M` and sizes as `8 GiB` in powers of two, times as `20 ms`, parts as percentages.

Decides the scale of an axis from the values on it: logarithmic where they span more than most linear axes can show. Draws no data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from cpbench.plot.entries import Entry
from cpbench.units import format_bytes, format_count, format_seconds, format_tokens

TITLES = {
    "ttft_s": "TTFT",
    "layer_s": "time of a layer",
    "attention_s": "time of the attention",
    "tflops_per_rank": "TFLOP/s per rank",
    "tokens_per_s": "tokens/s",
    "peak_bytes": "peak memory per rank",
    "peak_live_bytes": "peak of live tensors per rank",
    "peak_allocator_bytes": "peak of the allocator per rank",
    "efficiency": "efficiency",
    "speed_up": "speed-up",
    "exposed_comm_s": "exposed communication",
    "compute_s": "own work",
    "comm_bytes": "received by a rank",
    "first_call_s": "time of the first call",
    "numerics_ratio": "error over that of one device",
    "peak_fraction": "part of the device's peak",
    "light_fraction": "part of the speed of light",
    "seq": "new tokens per sequence",
    "world_size": "ranks",
}
COUNTS = ("batch", "layers", "dp", "pp", "cp", "tp", "ep", "sp", "ulysses", "world_size", "seq")
KINDS = ("derived_", "projected_")
PERCENT = ("efficiency", "peak_fraction", "light_fraction")
SPAN = {"seconds": 6.0, "bytes": 6.0, "number": 30.0}  # largest over smallest value from which on an axis is logarithmic
MAX_TICKS, TICKS_APART = 9, 0.075  # the latter: of the width of the axis
Kind = Literal["count", "seconds", "bytes", "percent", "number", "category"]
UNITS = (1, 1 << 10, 1 << 20, 1 << 30, 1 << 40)


@dataclass(frozen=True)
class Scale:
    """What an axis shows: `name` of a field or metric, its title for people, and what kind of values it has."""

    name: str
    title: str
    kind: Kind

    def text(self, value: float) -> str:
        """A value as tables print it."""
        if self.kind == "seconds":
            return format_seconds(value)
        if self.kind == "bytes":
            return format_bytes(value)
        if self.kind == "count":
            return format_count(round(value))
        return f"{value:.0%}" if self.kind == "percent" else f"{value:#.3g}".rstrip(".")


def scale_of(name: str, entries: Sequence[Entry]) -> Scale:
    """The scale of a field or metric, by its unit, its name, and what is found in the entries."""
    kind = next((kind for kind in KINDS if name.startswith(kind)), "")
    base = name.removeprefix(kind)
    title = kind.replace("_", " ") + TITLES.get(base, base.removesuffix("_s").removesuffix("_bytes").replace("_", " "))
    value = next((entry.metrics[name] for entry in entries if name in entry.metrics), None)
    if name in PERCENT:
        return Scale(name, title, "percent")
    if value:
        return Scale(name, title, "seconds" if value.unit == "s" else "bytes" if name.endswith("bytes") else "number")
    found = [entry.fields[name] for entry in entries if entry.fields.get(name) is not None]
    if name in COUNTS and all(_is_number(one) for one in found):
        return Scale(name, title, "count")
    return Scale(name, title, "number" if found and all(_is_number(one) for one in found) else "category")


def lay_out_x(axes: Axes, scale: Scale, values: Sequence[float], categories: Sequence[str]) -> None:
    """Limits, scale and ticks of the horizontal axis for the values on it; categories stand at 0, 1, 2, ..."""
    axes.set_xlabel(scale.title)
    if scale.kind == "category":
        axes.set_xticks(
            range(len(categories)), categories, rotation=30 if sum(map(len, categories)) > 40 else 0, ha="right" if sum(map(len, categories)) > 40 else "center"
        )
        axes.set_xlim(-0.5, len(categories) - 0.5)
    elif scale.kind == "count" and min(values) > 0:
        _count_ticks(axes, sorted(set(values)))
    else:
        _value_axis(axes, scale, values, "x", 0.0)


def lay_out_y(axes: Axes, scale: Scale, values: Sequence[float], room: float, *, log: bool | None = None) -> None:
    """Limits, scale and ticks of the vertical axis; the part `room` of its height above all values stays free."""
    axes.set_ylabel(scale.title)
    _value_axis(axes, scale, values, "y", room, log)


def lay_out_value_x(axes: Axes, scale: Scale, values: Sequence[float], room: float) -> None:
    """A horizontal axis of values that starts at 0; the part `room` of its width beyond all values stays free."""
    axes.set_xlabel(scale.title)
    _value_axis(axes, scale, values, "x", room, log=False)


def is_log(scale: Scale, values: Sequence[float]) -> bool:
    """Whether the values span too much for a linear axis that starts at 0."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > SPAN.get(scale.kind, math.inf)


def _count_ticks(axes: Axes, values: Sequence[float]) -> None:
    """log2, with a tick at each value that is there as long as they do not run into each other."""
    low, high = math.log2(values[0]), math.log2(values[-1])
    margin = 0.06 * (high - low) or 0.5
    axes.set_xscale("log", base=2)
    axes.set_xlim(2 ** (low - margin), 2 ** (high + margin))
    apart = TICKS_APART * (high - low)
    shown: list[float] = []
    for value in values:
        if not shown or math.log2(value / shown[-1]) >= apart:
            shown.append(value)
    shown = shown[:: math.ceil(len(shown) / MAX_TICKS)]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_major_formatter(FixedFormatter([_count(round(value)) for value in shown]))
    axes.xaxis.set_minor_locator(NullLocator())


def _count(value: int) -> str:
    exact = format_count(value)
    return exact if len(exact) <= 5 else format_tokens(value)


def _value_axis(axes: Axes, scale: Scale, values: Sequence[float], which: Literal["x", "y"], room: float, log: bool | None = None) -> None:
    axis = axes.xaxis if which == "x" else axes.yaxis
    limits, scaled = (axes.set_xlim, axes.set_xscale) if which == "x" else (axes.set_ylim, axes.set_yscale)
    low, high = min(values, default=0.0), max(values, default=0.0)
    if is_log(scale, values) if log is None else log and low > 0:
        base, (bottom, top) = (2, (math.log2(low), math.log2(high))) if scale.kind == "bytes" else (10, (math.log10(low), math.log10(high)))
        scaled("log", base=base)
        margin = 0.06 * (top - bottom) or 0.1
        limits(base ** (bottom - margin), base ** (top + margin + room / (1 - room) * (top - bottom + 2 * margin)))
        subs = (1.0,) if base == 2 or top - bottom > 3 else (1.0, 2.0, 5.0)
        axis.set_major_locator(LogLocator(base, subs, numticks=12))
        axis.set_minor_locator(NullLocator())
    else:
        top = 1.06 * high / (1 - room) if high > 0 else 1.0
        limits(min(0.0, 1.06 * low), top)
        axis.set_major_locator(_sizes(top) if scale.kind == "bytes" else MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _tick(scale, value)))  # after the scale, which brings its own


def _sizes(top: float) -> FixedLocator:
    """Round numbers of a binary unit."""
    unit = max((unit for unit in UNITS if unit <= top), default=1)
    rough = top / unit / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough) * unit
    return FixedLocator([number * step for number in range(math.floor(top / step) + 1)])


def _tick(scale: Scale, value: float) -> str:
    """As tables print it, without digits that say nothing: `20 ms`, `8 GiB`."""
    if value == 0:
        return "0"
    if scale.kind == "seconds" and value >= 1:
        return f"{value:g} s"
    number, space, unit = scale.text(value).partition(" ")
    return (number.rstrip("0").rstrip(".") if "." in number else number) + space + unit


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
