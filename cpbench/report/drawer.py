"""What the page says of one cell when its row is opened: times, split, memory, ranks, traffic, numerics, clocks, profile, and what it is.

Pure: a cell becomes sections of plain data, in which every text is a number of texts.py; page.js shows them. A section has a title and any
of `facts` (names and values), `table`, `bars`, `strip` (samples), `lines` and `log`. What is not known is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cpbench.clock_record import Spread
from cpbench.frame import value_kind
from cpbench.records import time_of
from cpbench.report.rows import Row
from cpbench.report.texts import Texts, number
from cpbench.results import CellResult, Metric
from cpbench.stats import median
from cpbench.units import format_bytes, format_seconds

MAX_LOG_LINES = 12
DRAWN = 4  # digits of what is drawn and not printed
MAX_PHASES, MAX_KERNELS, MAX_BARS = 30, 15, 16
TOO_DEEP = "nested too deeply to be shown"
Section = dict[str, Any]


def drawer(row: Row, texts: Texts, file: str | None, most_samples: int) -> dict[str, Any]:
    """All sections of a cell. `file`: whose it is, where there are several files; with more than `most_samples` its rounds are drawn by their medians."""
    cell = row.cell
    made = [_reason(cell, texts), _times(cell, texts, most_samples), *(make(cell, texts) for make in SECTIONS)]
    heading = {"title": texts(f"{row.label}, {row.batch.name}"), "status": texts(cell.status), "file": texts(file) if file else None}
    return {**{name: value for name, value in heading.items() if value is not None}, "sections": [section for section in made if section]}


def _reason(cell: CellResult, texts: Texts) -> Section | None:
    """Why it has no time, why context parallelism was off, and what warns of its numbers."""
    off = [] if cell.cp_active else [cell.cp_off_reason or "context parallelism was off; no reason recorded"]
    failed = [] if cell.status == "ok" else [cell.reason or "no reason recorded"]
    ranks = "more threads than cores: the ranks share them, and the times are not those of as many devices"
    said = [*failed, *off, *([ranks] if cell.oversubscribed else []), *cell.warnings]
    log = cell.failure.log_tail[-MAX_LOG_LINES:] if cell.failure and not cell.failure.owners else []
    if not said and not log:
        return None
    section: Section = {"title": texts("To know"), "lines": texts.line(said)}
    if cell.failure and log:
        rank = f" of rank {cell.failure.rank}" if cell.failure.rank is not None else ""
        section |= {"log": texts.line(log), "about": texts(f"The end of the log{rank}")}
    if cell.failure and cell.failure.owners:
        section["table"] = texts.table(["memory was for", "size"], [(owner.name, format_bytes(owner.bytes)) for owner in cell.failure.owners])
    return section


def _times(cell: CellResult, texts: Texts, most_samples: int) -> Section | None:
    """Every metric, and the samples of the one that the cell is about."""
    if not cell.metrics:
        return None
    rows = [(_named(name), quantity(metric.median, metric.unit), _interval(metric), metric.n, len(metric.rounds)) for name, metric in cell.metrics.items()]
    section: Section = {"title": texts("Times and rates"), "table": texts.table(["metric", "median", "95% CI", "n", "rounds"], rows)}
    if (time := time_of(cell)) and (made := _strip(time, texts, most_samples)):
        section["strip"] = made
    facts = [] if cell.first_call_s is None else ["first call", format_seconds(cell.first_call_s)]
    if cell.ab and cell.ab.ratio is not None:
        facts += [f"time over that of {cell.ab.other}", f"{cell.ab.ratio:.3f}, {cell.ab.blocks} blocks"]
    return {**section, **({"facts": texts.line(facts)} if facts else {})}


def _strip(time: Metric, texts: Texts, most_samples: int) -> dict[str, Any] | None:
    """The samples of a metric in seconds, to be drawn; of too many, the medians of the rounds."""
    few = time.n <= most_samples
    values = [samples if few else [median(samples)] for samples in time.rounds if samples]
    everything = [value for samples in values for value in samples]
    if len(everything) < 2 or not math.isfinite(sum(map(abs, [*everything, time.median, *(time.ci95 or ())]))):  # of a file that was edited
        return None
    return {
        "rounds": [[number(value, DRAWN) for value in samples] for samples in values],
        "median": number(time.median, DRAWN),
        "ci": [number(value, DRAWN) for value in time.ci95] if time.ci95 else None,
        "about": texts(f"{'Samples' if few else 'Medians'} of each round; across them the median of all samples{' and its interval' if time.ci95 else ''}"),
        "ends": texts.line([format_seconds(min(everything)), format_seconds(max(everything))]),
    }


def _split(cell: CellResult, texts: Texts) -> Section | None:
    """Own work and exposed communication of every rank, and the collectives of the one with most work."""
    split = cell.split
    if split is None:
        return None
    if split.reason:
        return {"title": texts("Where the time goes"), "lines": [texts(f"not known: {split.reason}")]}
    section: Section = {"title": texts("Where the time goes")}
    if split.ranks:
        parts = [(f"rank {rank}", (one.compute_s, one.exposed_comm_s)) for rank, one in enumerate(split.ranks[:MAX_BARS])]
        section["bars"] = _bars(["compute", "exposed communication"], parts, texts)
    if split.collectives:
        head = [f"collectives of rank {split.rank}", "calls", "bytes", "exposed", "alone", "bandwidth"]
        rows = [
            (
                f"{one.operation} over {one.ranks} {one.axis} ranks",
                one.calls,
                format_bytes(one.bytes),
                format_seconds(one.exposed_s),
                format_seconds(one.alone_s),
                f"{format_bytes(one.bytes_per_s)}/s",
            )
            for one in split.collectives
        ]
        section["table"] = texts.table(head, rows)
    return section


def _projection(cell: CellResult, texts: Texts) -> Section | None:
    """What a projection rests on, its band, and what its profile was not measured at."""
    known = cell.projection
    if known is None:
        return None
    low, high = (format_seconds(seconds) for seconds in known.band)
    facts = ["devices", f"{known.title}, {known.gpus_per_node} per node", "compute", known.compute, "links", known.links, "band", f"{low} to {high}"]
    facts += ["programs", f"{known.ranks_simulated} of {cell.world_size} ranks differ"]
    facts += [item for name, size in known.reserved.items() for item in (f"taken by {name}", format_bytes(size))]
    facts += ["memory of a device", f"{format_bytes(known.memory_bytes)}{'' if known.fits else ', which is too little'}"]
    if known.light_binds:
        facts += ["speed of light", f"bound by {known.light_binds}"]
    section: Section = {"title": texts("Projected, not measured"), "facts": texts.line(facts), "lines": texts.line(known.outside)}
    if known.by_category:
        names = [f"{name} {format_bytes(size)}" for name, size in known.by_category.items()]
        section["bars"] = _bars(names, [(f"live peak of rank {known.peak_rank}", tuple(known.by_category.values()))], texts)
    return section


def _memory(cell: CellResult, texts: Texts) -> Section | None:
    memory = cell.memory
    if memory is None:
        return None
    peaks = {
        "live tensors": memory.peak_live_bytes,
        "by formula": memory.predicted_live_bytes,
        "allocator": memory.peak_allocator_bytes,
        "reserved": memory.peak_reserved_bytes,
        "resident set": memory.peak_rss_bytes,
    }
    facts = [item for name, value in peaks.items() if value is not None for item in (name, format_bytes(value))]
    section: Section = {"title": texts(f"Peak memory of rank {memory.rank}"), "facts": texts.line(facts)}
    if memory.by_category:
        names = [f"{name} {format_bytes(size)}" for name, size in memory.by_category.items()]
        section["bars"] = _bars(names, [("live peak", tuple(memory.by_category.values()))], texts)
    return section


def _ranks(cell: CellResult, texts: Texts) -> Section | None:
    if not cell.ranks:
        return None
    axes = [axis for axis in dict.fromkeys(axis for rank in cell.ranks for axis in rank.coordinates) if len({r.coordinates.get(axis) for r in cell.ranks}) > 1]
    timed, sized = (any(getattr(rank, name) is not None for rank in cell.ranks) for name in ("median_s", "peak_live_bytes"))
    head = ["rank", *axes, "tokens", "score pairs", *(["median"] if timed else []), *(["live tensors"] if sized else [])]
    rows = [
        (
            rank.rank,
            *(rank.coordinates.get(axis, "-") for axis in axes),
            f"{rank.tokens:,}",
            f"{rank.score_pairs:,}",
            *([format_seconds(rank.median_s)] if timed else []),
            *([format_bytes(rank.peak_live_bytes)] if sized else []),
        )
        for rank in cell.ranks
    ]
    return {"title": texts("Ranks"), "table": texts.table(head, rows)}


def _traffic(cell: CellResult, texts: Texts) -> Section | None:
    """By axis and collective, by formula and as counted; the file may hold anything here."""
    predicted, recorded = (_flat(cell.traffic.get(name)) for name in ("predicted", "recorded"))
    if not predicted and not recorded:
        return None
    rows = []
    for axis, operation in dict.fromkeys([*predicted, *recorded]):
        expected, counted = predicted.get((axis, operation), {}), recorded.get((axis, operation), {})
        numbers = (expected.get("calls"), counted.get("calls"), _size(expected.get("bytes")), _size(counted.get("bytes")))
        rows.append((axis, operation, *("-" if value is None else value for value in numbers)))
    source = cell.traffic.get("source", "recorded")
    head = ["axis", "collective", "calls by formula", f"calls {source}", "bytes by formula", f"bytes {source}"]
    rank = cell.traffic.get("rank")
    title = "Traffic" if rank is None else f"Traffic of rank {rank}, which receives most"
    return {"title": texts(title), "table": texts.table(head, rows, left=2)}


def _numerics(cell: CellResult, texts: Texts) -> Section | None:
    found = cell.numerics
    if found is None:
        return None
    facts: list[object] = ["verdict", "passed" if found.passed else "failed", "limit", found.limit or "-"]
    facts += [] if found.ratio is None else ["error over that of one device", f"{found.ratio:.3f}"]
    facts += [] if found.relative_rmse is None else ["relative RMSE against fp64", f"{found.relative_rmse:.2e}"]
    facts += [] if found.logits_max_error is None else ["largest error of a logit", f"{found.logits_max_error:.2e}"]
    facts += [] if found.remote_tokens_used is None else ["remote tokens are used", "yes" if found.remote_tokens_used else "no"]
    facts += [] if found.tokens is None else ["tokens of the small input", f"{found.tokens:,}"]
    section: Section = {"title": texts("Numerics, before it was timed"), "facts": texts.line(facts)}
    if cell.first_tokens:
        rows = [(index, one.token, f"{one.margin:.4g}", one.text or "-") for index, one in enumerate(cell.first_tokens)]
        section["table"] = texts.table(["sequence", "first token", "margin", "text"], rows)
    return section


def _experts(cell: CellResult, texts: Texts) -> Section | None:
    facts = [item for name, value in cell.experts.items() for item in (str(name).replace("_", " "), shown(value))]
    return {"title": texts("Experts"), "facts": texts.line(facts)} if facts else None


def _clocks(cell: CellResult, texts: Texts) -> Section | None:
    rows: list[Sequence[object]] = []
    for index, one in enumerate(cell.clocks.rounds, 1):
        if one.cpu:
            load = f"{one.cpu.own_cores:.2f} of {one.cpu.usable_cores} cores; others {one.cpu.others_cores:.2f}, withheld {one.cpu.stolen_cores:.2f}"
            rows.append((index, "CPU", format_seconds(one.seconds), _spread(one.cpu.mhz, "MHz"), load))
        for gpu in one.gpus:
            held = ", ".join(f"{name} {share:.0%}" for name, share in gpu.throttled.items())
            state = f"{_spread(gpu.power_w, 'W')}; {_spread(gpu.temperature_c, 'C')}" + (f"; held down by {held}" if held else "")
            rows.append((index, f"GPU of rank {gpu.rank}", format_seconds(one.seconds), _spread(gpu.sm_mhz, "MHz"), state))
    head = ["round", "device", "watched", "clock", "load, power and temperature"]
    return {"title": texts("Clocks and load while it was timed"), "table": texts.table(head, rows, left=5)} if rows else None


def _profile(cell: CellResult, texts: Texts) -> Section | None:
    """Phases of the slowest rank of a profile, and what took longest."""
    profile = cell.profile
    if profile is None or not profile.ranks:
        return None
    slowest = max(profile.ranks, key=lambda rank: rank.step_s).rank
    phases = sorted((phase for phase in profile.phases if phase.rank == slowest), key=lambda phase: -phase.time_s)[:MAX_PHASES]
    rows = [(one.phase, *map(format_seconds, (one.time_s, one.compute_s, one.exposed_comm_s, one.idle_s))) for one in phases]
    longest = [f"{one.name}: {one.calls:g} calls, {format_seconds(one.seconds)}, {one.share:.1%}" for one in profile.kernels[:MAX_KERNELS]]
    table = texts.table(["phase", "time", "compute", "exposed", "idle"], rows)
    return {"title": texts(f"Profile: phases of rank {slowest}, and what took longest"), "table": table, "lines": texts.line(longest)}


def _identity(cell: CellResult, texts: Texts) -> Section:
    """What was measured, and where its files are."""
    facts: list[object] = [item for name, value in cell.key.items() if value not in (None, {}, []) for item in (name, shown(value))]
    facts += ["kernel dispatched", cell.kernel] if cell.kernel else []
    facts += ["ranks", cell.world_size]
    facts += [] if cell.threads_per_rank is None else ["threads per rank", cell.threads_per_rank]
    facts += [] if cell.peak is None else ["peak of a device", f"{cell.peak.flops / 1e12:.3g} TFLOP/s, {cell.peak.source}"]
    facts += [item for name in cell.artifacts for item in ("file", name)]
    return {"title": texts("What was measured"), "facts": texts.line([*facts, "id", cell.id])}


SECTIONS: Sequence[Callable[[CellResult, Texts], Section | None]] = (
    *(_projection, _split, _memory, _ranks, _traffic, _numerics, _experts, _clocks, _profile, _identity),
)


def _named(metric: str) -> str:
    """A metric's name, and what it is worth where it was not measured."""
    kind = value_kind(metric)
    return metric if kind == "measured" else f"{metric} ({kind}, not measured)"


def quantity(value: float, unit: str) -> str:
    """A value with its unit, as the tables of the terminal have it where they do."""
    if unit == "s":
        return format_seconds(value)
    if unit in ("B", "bytes"):
        return format_bytes(value)
    return _plain(value) + ("" if unit == "1" else f" {unit}")


def _plain(value: float) -> str:
    """Four digits: `5,426`, `0.03852`, `1.001`."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def shown(value: Any) -> str:
    """A value of a file that may hold anything."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    try:
        return json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        return TOO_DEEP


def _interval(metric: Metric) -> str:
    if metric.ci95 is None:
        return "-"
    low, high = (quantity(value, metric.unit if metric.unit in ("s", "B", "bytes") else "1") for value in metric.ci95)
    return f"{low} to {high}"


def _spread(spread: Spread | None, unit: str) -> str:
    return "-" if spread is None else f"{spread.median:,.0f} {unit} ({spread.min:,.0f} to {spread.max:,.0f})"


def _bars(names: Sequence[str], rows: Sequence[tuple[str, Sequence[float]]], texts: Texts) -> dict[str, Any]:
    """Stacked bars: what their parts are called, and a label and the parts of each."""
    return {"names": texts.line(names), "rows": [[texts(label), [number(max(0, part), DRAWN) for part in parts]] for label, parts in rows]}


def _flat(found: Any) -> dict[tuple[str, str], dict[str, Any]]:
    """{axis: {operation: counts}} by both names."""
    return {(axis, operation): dict(counts) for axis, named in _items(found) for operation, counts in _items(named) if isinstance(counts, dict)}


def _items(found: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(found, Mapping):
        yield from ((str(name), value) for name, value in found.items())


def _size(value: Any) -> str | None:
    return None if value is None else format_bytes(value) if isinstance(value, int | float) else shown(value)
