"""A device profile of what the ranks of a calibration wrote: constants with their source, curves with their fit errors, and the rows themselves.

What a single device cannot measure, its links, is that of the shipped profile that is nearest, and says so. The curves are fitted in
least_squares.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from statistics import fmean
from typing import Any

from cpbench.environment import Machine, describe, git_state
from cpbench.projection.calibration_sizes import BEFORE
from cpbench.projection.constants import Curve, Kind, Number
from cpbench.projection.least_squares import attention_fit, errors, flops_of, gemm_rates, rates, two_lines
from cpbench.projection.links import Behind, Contention, Fit, Inside, LinkCosts, whole_buffer, wire
from cpbench.projection.profile import SCHEMA_VERSION, UNITS, Attention, DeviceProfile, Reserve, load_profile, profile_names, side

Rows = Sequence[dict[str, Any]]


def profile_of(rows: Rows, machine: Machine, ranks: int, threads: int, quick: bool) -> DeviceProfile:
    """A device profile of what the ranks wrote."""
    facts = next(row for row in rows if row["what"] == "environment")
    launch = next(row["seconds"] for row in rows if row["what"] == "launch")
    cuda = facts["device"] == "cuda"
    near = nearest(facts["device_name"], facts["device"])
    source = f"measured by cpbench calibrate on {datetime.now(UTC):%Y-%m-%d}: {describe(machine)}, torch {facts['torch']}"
    each = f"{ranks} {'rank' if ranks == 1 else 'ranks'} busy, {threads} {'thread' if threads == 1 else 'threads'} each"
    name = re.sub(r"[^a-z0-9]+", "-", facts["device_name"].lower()).strip("-")
    memory = machine.gpu_memory_bytes if cuda else machine.memory_bytes // ranks
    moved = _curve(rates(_only(rows, "moved"), launch), "bytes/s", "bytes", source)
    none = Number(value=0, unit="bytes", kind="assumed", source="a CPU rank has no context and gloo no buffers of a fixed size")
    known = load_profile(near) if near else None
    peaks = {dtype: max(rate for _, rate in gemm_rates(_only(rows, "gemm", dtype=dtype), launch)) for dtype in _dtypes(rows, "gemm")}
    return DeviceProfile(
        schema="cpbench.device",
        schema_version=SCHEMA_VERSION,
        name=name,
        title=f"{facts['device_name'] if cuda else machine.cpu or 'CPU'}, calibrated: {each}",
        device="cuda" if cuda else "cpu",
        backend="nccl" if cuda else "gloo",
        memory=_measured(memory, "bytes", source if cuda else f"{source}: host memory shared by {ranks} ranks"),
        reserve=known.reserve if cuda and known else Reserve(context=none, buffers_of_two=none, buffers=none),
        node=_measured(machine.devices if cuda else ranks, "devices", source),
        peaks={dtype: _measured(peak, "FLOP/s", f"the fastest GEMMs {source}") for dtype, peak in peaks.items()},
        bandwidth=_measured(max(rate for _, rate in moved.points), "bytes/s", source),
        launch=_measured(launch, "s", source),
        gemm_efficiency={dtype: _gemm_curve(_only(rows, "gemm", dtype=dtype), peak, launch, moved, source) for dtype, peak in peaks.items()},
        attention_cost={dtype: _attention(_only(rows, "attention", dtype=dtype), peaks[dtype], launch, source) for dtype in _dtypes(rows, "attention")},
        moved_rate=moved,
        links=_links(rows, known, "NCCL" if cuda else "gloo", source),
        measured_with={
            "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "git": git_state(),
            "machine": describe(machine),
            **{key: value for key, value in facts.items() if key not in ("what", "ranks")},
            "ranks": ranks,
            "quick": quick,
            "rows": [row for row in rows if row["what"] not in ("environment", "collective")],
        },
    )


def nearest(device_name: str, kind: str) -> str | None:
    """The shipped profile of a device by the name that its driver gives it; None where there is none."""
    if kind == "cpu":
        return "cpu" if "cpu" in profile_names() else None
    return next((name for name in sorted(profile_names(), key=len, reverse=True) if name.upper() in device_name.upper()), None)


def _only(rows: Rows, what: str, **fields: Any) -> Rows:
    return [row for row in rows if row["what"] == what and all(row[name] == value for name, value in fields.items())]


def _dtypes(rows: Rows, what: str) -> list[str]:
    return list(dict.fromkeys(row["dtype"] for row in rows if row["what"] == what))


def _measured(value: float, unit: str, source: str, kind: Kind = "measured") -> Number:
    return Number(value=value, unit=unit, kind=kind, source=source)


def _curve(points: Sequence[tuple[float, float]], unit: str, size_unit: str, source: str) -> Curve:
    return Curve(unit=unit, size_unit=size_unit, kind="measured", source=source, low=points[0][0], high=points[-1][0], points=tuple(points))


def _gemm_curve(rows: Rows, peak: float, launch: float, moved: Curve, source: str) -> Curve:
    """The part of the peak by size, with the distance of each shape from it."""
    curve = _curve([(size, rate / peak) for size, rate in gemm_rates(rows, launch)], "of peak", UNITS["gemm"], source)
    sizes = [side(row["m"], row["n"], row["k"]) for row in rows]
    found = [flops_of(row) / (peak * curve.at(size)) + launch for row, size in zip(rows, sizes, strict=True)]
    mean, worst = errors(found, [row["seconds"] for row in rows])
    return curve.model_copy(update={"low": min(sizes), "high": max(sizes), "mean_error": mean, "worst_error": worst})


def _attention(rows: Rows, peak: float, launch: float, source: str) -> Attention:
    fit = attention_fit(rows, launch)
    keys = [row["k_rows"] for row in rows]
    return Attention(
        efficiency=_measured(fit.flops / peak, "of peak", source),
        half_keys=_measured(fit.half_keys, "keys", source),
        tile_keys=_measured(fit.tile_keys, "keys", source),
        score_operations=_measured(fit.score_operations, "operations", source),
        low_keys=_measured(min(keys), "keys", source),
        high_keys=_measured(max(keys), "keys", source),
        mean_error=fit.mean_error,
        worst_error=fit.worst_error,
        kernel=", ".join(dict.fromkeys(row["kernel"] for row in rows)),
    )


def _links(rows: Rows, known: DeviceProfile | None, backend: str, source: str) -> LinkCosts:
    """The links as measured; of one rank those that are shipped."""
    if not any(row["what"] == "collective" for row in rows):
        costs = known.links if known else wire("pcie4")
        return costs.model_copy(update={"title": f"{costs.title} (preset: one device cannot measure links)"})
    contended = next(row for row in rows if row["what"] == "contention")
    fits = {operation: _fit(_only(rows, "collective", operation=operation), operation, source) for operation in Inside.model_fields}
    slowed, dragged = contention_of(contended)
    first = min(lines.small_s for lines in fits["send_recv"].by_ranks.values())
    return LinkCosts(
        title=f"{backend} on this machine",
        inside=Inside(**fits),
        step=_measured(first, "s", f"a message more for each rank more: the first line of send_recv {source}", "derived"),
        in_model=_measured(0, "of the time", f"calls are those of programs, {source}", "derived"),
        between=known.links.between if known else None,
        contention=Contention(
            work_inside=_measured(slowed, "of its rate", source),
            work_between=_measured(slowed, "of its rate", f"as inside of a node, {source}", "derived"),
            transfer=_measured(dragged, "of its rate", source),
        ),
        behind=behind_of(_only(rows, "behind"), source),
    )


def behind_of(rows: Rows, source: str) -> Behind | None:
    """What collectives take more, or less, behind other work than that which all of them were measured behind."""
    if not rows:
        return None
    works = sorted({row["work_s"] for row in rows})
    means = {work_s: fmean(row["seconds"] for row in rows if row["work_s"] == work_s) for work_s in works}
    return Behind(kind="measured", source=source, points=tuple((work_s, means[work_s] - means[BEFORE]) for work_s in works))


def _fit(rows: Rows, operation: str, source: str) -> Fit:
    """Lines of every number of ranks; a step around a ring is the same for all, so that of the most counts."""
    worlds = sorted({row["ranks"] for row in rows})
    points = {world: tuple((row["bytes"], row["seconds"]) for row in rows if row["ranks"] == world) for world in worlds}
    used = worlds[-1:] if operation == "send_recv" else worlds
    whole = [whole_buffer(operation, world, travels) for world in worlds for travels, _ in points[world]]
    lines = {world: two_lines(operation, world, points[world]) for world in used}
    return Fit(kind="measured", source=source, low_bytes=min(whole), high_bytes=max(whole), by_ranks=lines, points=points)


def contention_of(row: dict[str, Any]) -> tuple[float, float]:
    """The part by which work slows while a transfer is in flight, and a transfer that is longer while there is work.

    What was left of the transfer when the work was done went at its own speed; so the rest took as long as the work.
    """
    slowed = 1 - row["work_s"] / row["work_during_s"]
    progressed = 1 - (row["both_s"] - row["work_during_s"]) / row["transfer_s"]
    dragged = 1 - progressed * row["transfer_s"] / row["work_during_s"]
    return min(max(slowed, 0.0), 0.9), min(max(dragged, 0.0), 0.9)
