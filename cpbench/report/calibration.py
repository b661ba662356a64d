"""What a calibration found, as a table: rates, the sizes they were measured at, and how far the fits are from what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rich.console import Console, ConsoleRenderable

from cpbench.projection.calibration_sizes import BEFORE
from cpbench.projection.profile import DeviceProfile
from cpbench.report.columns import Column, fitting
from cpbench.units import format_bytes, format_seconds


class _Row(NamedTuple):
    what: str
    rate: str
    sizes: str
    mean: float | None
    worst: float | None


def calibration_view(profile: DeviceProfile, console: Console) -> list[ConsoleRenderable | str]:
    """The device, its table, and what is left to say."""
    columns = (
        Column[_Row]("", lambda row: row.what, justify="left"),
        Column[_Row]("best", lambda row: row.rate),
        Column[_Row]("measured at", lambda row: row.sizes, keep=1),
        Column[_Row]("mean error", lambda row: _percent(row.mean)),
        Column[_Row]("worst error", lambda row: _percent(row.worst), keep=2),
    )
    contention, own = profile.links.contention, (profile.measured_with or {}).get("ranks", 1) > 1  # one rank has borrowed links
    beside = f"Beside a transfer work slows by {contention.work_inside.value:.0%}, and a transfer beside work by {contention.transfer.value:.0%}."
    links = [beside, *_behind(profile)] if own else [f"Links: {profile.links.title}."]
    return [profile.title, "", fitting([*_compute(profile), *(_collectives(profile) if own else ())], columns, console), "", *links]


def _behind(profile: DeviceProfile) -> Iterator[str]:
    """What much work before a collective does to it, where that was measured."""
    if profile.links.behind is not None:
        work_s, more_s = profile.links.behind.points[-1]
        more = f"{format_seconds(abs(more_s))} {'more' if more_s >= 0 else 'less'}"
        yield f"Behind {format_seconds(work_s)} of work a collective takes {more} than behind {format_seconds(BEFORE)}."


def _compute(profile: DeviceProfile) -> Iterator[_Row]:
    yield _Row("launch of a kernel", format_seconds(profile.launch_s), "", None, None)
    for dtype, curve in profile.gemm_efficiency.items():
        best = max(part for _, part in curve.points) * profile.peak_flops(dtype)
        yield _Row(f"GEMM, {dtype}", _flops(best), f"{curve.low:,.0f} to {curve.high:,.0f}", curve.mean_error, curve.worst_error)
    for dtype, cost in profile.attention_cost.items():
        rate = cost.efficiency.value * profile.peak_flops(dtype)
        keys = f"{cost.low_keys.value:,.0f} to {cost.high_keys.value:,.0f} keys"
        yield _Row(f"attention, {dtype}", _flops(rate), keys, cost.mean_error, cost.worst_error)
    moved = profile.moved_rate
    yield _Row("element-wise", _bytes_per_s(max(rate for _, rate in moved.points)), f"{format_bytes(moved.low)} to {format_bytes(moved.high)}", None, None)


def _collectives(profile: DeviceProfile) -> Iterator[_Row]:
    for operation in type(profile.links.inside).model_fields:
        fit = profile.links.inside.of(operation)
        for ranks, lines in fit.by_ranks.items():
            sizes = f"{format_bytes(fit.low_bytes)} to {format_bytes(fit.high_bytes)}"
            rate = f"{format_seconds(lines.small_s)} + {_bytes_per_s(lines.large_bytes_per_s)}"
            yield _Row(f"{operation} of {ranks}", rate, sizes, lines.mean_error, lines.worst_error)


def _percent(part: float | None) -> str:
    return "" if part is None else f"{part:.0%}"


def _flops(rate: float) -> str:
    return f"{rate / 1e12:.3g} TFLOP/s" if rate >= 1e12 else f"{rate / 1e9:.3g} GFLOP/s"


def _bytes_per_s(rate: float) -> str:
    return f"{rate / 1e9:.3g} GB/s"
