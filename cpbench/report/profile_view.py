"""How a profile looks on a terminal: ranks, the phases of the slowest one, what took longest, and how to open the files.

Pure: a result becomes renderables. What a phase is, and what counts as exposed, is decided in tracing/timeline.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console, ConsoleRenderable

from cpbench.records import TIME_METRIC
from cpbench.report.columns import Column, fitting
from cpbench.report.console import plain
from cpbench.results import CellResult, Collectives, ResultFile
from cpbench.tracing.record import KernelTime, NvtxRange, PhaseTime, Profile, RankTime
from cpbench.units import format_bytes, format_seconds

MAX_NAME, OTHER_COLUMNS = 60, 34
SHOWN_RANGES = 15  # of a rank
LEGEND = "exposed: communication while nothing was computed; overlap: the rest of the communication; idle: neither; a phase is without those in it"


def profile_view(result: ResultFile, folder: Path, console: Console) -> Iterator[ConsoleRenderable]:
    """All profiles of a result that lies in `folder`, in tables that fit the console's width; nothing where there is none."""
    for cell in result.cells:
        if cell.profile:
            yield plain("")
            yield from _torch(cell, cell.profile, console) if cell.profile.ranks else _nsys(cell.profile, console)
            yield from (plain(line) for line in file_lines(cell, folder))


def file_lines(cell: CellResult, folder: Path) -> Iterator[str]:
    """Where the files are, and what opens them."""
    traces = [folder / name for name in cell.artifacts if name.endswith(".pt.trace.json.gz")]
    reports = [folder / name for name in cell.artifacts if name.endswith(".nsys-rep")]
    if traces:
        yield f"Traces of {_ranks(len(traces))}: tensorboard --logdir {traces[0].parent}"
    if reports:
        yield f"Reports of {_ranks(len(reports))}: nsys-ui {' '.join(map(str, reports))}"
    yield from (f"Timeline of all ranks: {folder / name}, to be opened in ui.perfetto.dev" for name in cell.artifacts if name.endswith(".timeline.json.gz"))
    yield from (f"Memory over time: {folder / name}" for name in cell.artifacts if name.endswith(".svg"))


def _torch(cell: CellResult, profile: Profile, console: Console) -> Iterator[ConsoleRenderable]:
    slowest = max(profile.ranks, key=lambda rank: rank.step_s)
    yield plain(_heading(cell, profile, slowest), "bold")
    yield fitting(profile.ranks, RANKS, console)
    yield plain("")
    yield plain(f"Phases of rank {slowest.rank}, which is slowest" if len(profile.ranks) > 1 else "Phases", "bold")
    yield fitting([phase for phase in profile.phases if phase.rank == slowest.rank], _phase_columns(profile, slowest), console)
    yield plain(LEGEND, "dim")
    yield plain("")
    if cell.split and cell.split.collectives:
        yield plain(f"Collectives of rank {cell.split.rank} in an untraced pass, and alone", "bold")
        yield fitting(cell.split.collectives, COLLECTIVES, console)
        yield plain("")
    yield plain("What took longest, per step, on the rank where it did", "bold")
    yield fitting(profile.kernels, _kernel_columns(min(MAX_NAME, console.width - OTHER_COLUMNS)), console)


def _heading(cell: CellResult, profile: Profile, slowest: RankTime) -> str:
    """What was traced, and what tracing costs."""
    time = next((metric for name, metric in cell.metrics.items() if name in TIME_METRIC.values()), None)
    said = f"Profile of {cell.key.get('layout')} {cell.key.get('strategy')}: {profile.steps} traced steps of {format_seconds(slowest.step_s)}"
    if time is None or time.median <= 0:
        return said
    return f"{said}, {slowest.step_s / time.median - 1:+.1%} against the untraced median of {format_seconds(time.median)}"


def _phase_columns(profile: Profile, slowest: RankTime) -> list[Column[PhaseTime]]:
    """With the range over ranks where there are several, and memory where it is known."""
    every = {phase.phase: [other.time_s for other in profile.phases if other.phase == phase.phase] for phase in profile.phases}
    step = sum(phase.time_s for phase in profile.phases if phase.rank == slowest.rank)
    columns: list[Column[PhaseTime]] = [
        Column("phase", lambda phase: phase.phase, justify="left"),
        Column("time", lambda phase: format_seconds(phase.time_s)),
        Column("share", lambda phase: f"{phase.time_s / step:.1%}" if step else "-", keep=1),
        Column("compute", lambda phase: _seconds(phase.compute_s)),
        Column("comm", lambda phase: _seconds(phase.comm_s)),
        Column("exposed", lambda phase: _seconds(phase.exposed_comm_s)),
        Column("overlap", _overlap, keep=2),
        Column("idle", lambda phase: _seconds(phase.idle_s)),
    ]
    if len(profile.ranks) > 1:
        columns.append(Column("over ranks", lambda phase: f"{format_seconds(min(every[phase.phase]))} - {format_seconds(max(every[phase.phase]))}", keep=0))
    if any(phase.peak_bytes is not None for phase in profile.phases):
        columns.append(Column("peak mem", lambda phase: format_bytes(phase.peak_bytes), keep=3))
    return columns


def _kernel_columns(width: int) -> list[Column[KernelTime]]:
    """With names of so many characters at most."""
    return [
        Column("name", lambda kernel: kernel.name if len(kernel.name) <= width else f"{kernel.name[: width - 3]}...", justify="left"),
        Column("calls", lambda kernel: f"{kernel.calls:g}"),
        Column("time", lambda kernel: format_seconds(kernel.seconds)),
        Column("share", lambda kernel: f"{kernel.share:.1%}"),
        Column("rank", lambda kernel: str(kernel.rank)),
    ]


def _nsys(profile: Profile, console: Console) -> Iterator[ConsoleRenderable]:
    ranks = sorted({range_.rank for range_ in profile.nvtx})
    for rank in ranks:
        yield plain(f"NVTX ranges of rank {rank}, {profile.steps} captured {'step' if profile.steps == 1 else 'steps'}", "bold")
        yield fitting([range_ for range_ in profile.nvtx if range_.rank == rank][:SHOWN_RANGES], RANGES, console)
        yield plain("")


def _overlap(one: RankTime | PhaseTime) -> str:
    return "-" if one.overlap is None else f"{one.overlap:.0%}"


RANKS: Sequence[Column[RankTime]] = (
    Column("rank", lambda rank: str(rank.rank), justify="left"),
    Column("step", lambda rank: format_seconds(rank.step_s)),
    Column("compute", lambda rank: _seconds(rank.compute_s)),
    Column("comm", lambda rank: _seconds(rank.comm_s)),
    Column("exposed", lambda rank: _seconds(rank.exposed_comm_s)),
    Column("overlap", _overlap, keep=2),
    Column("idle", lambda rank: _seconds(rank.idle_s)),
)
COLLECTIVES: Sequence[Column[Collectives]] = (
    Column("collective", lambda one: f"{one.operation} over {one.ranks} {one.axis} ranks", justify="left"),
    Column("calls", lambda one: str(one.calls)),
    Column("bytes", lambda one: format_bytes(one.bytes)),
    Column("exposed", lambda one: _seconds(one.exposed_s)),
    Column("alone", lambda one: _seconds(one.alone_s), keep=1),
    Column("bandwidth", lambda one: f"{format_bytes(one.bytes_per_s)}/s" if one.bytes_per_s else "-"),
)
RANGES: Sequence[Column[NvtxRange]] = (
    Column("range", lambda range_: range_.range, justify="left"),
    Column("calls", lambda range_: str(range_.calls)),
    Column("time", lambda range_: format_seconds(range_.seconds)),
    Column("on the GPU", lambda range_: format_seconds(range_.gpu_seconds)),
)


def _seconds(value: float) -> str:
    """Nothing at all is a dash, so that what there is can be seen."""
    return format_seconds(value) if value > 0 else "-"


def _ranks(count: int) -> str:
    return "the rank" if count == 1 else f"{count} ranks"
