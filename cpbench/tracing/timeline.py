"""What every instant of a traced step was spent on: a phase, and computing, communicating or neither. A sweep line over one rank's trace.

A phase is the path of the innermost span; collectives, the leaves `axis.operation`, belong to the phase around them. On CPU the thread
that runs the spans is looked at: inside a collective it communicates, inside an operator it computes, else (Python between operators) it
is idle. On a device kernels are looked at: while one computes, the rank computes; while only copies of collectives run, it communicates;
else it is idle, for the phase whose kernel comes next. A kernel belongs to the span around its launch. So the phases add up to the step.

Communication in flight is what PyTorch shows of it: kernels of collectives, and gloo's operations until the rank has asked for them. A
gloo transfer may have ended long before that, so behind its start it counts for no longer than a collective of its kind takes alone, where
that is known, as in measure/split.py.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cpbench.intervals import joined
from cpbench.tracing.chrome import COPY, KERNEL, LAUNCHES, ON_DEVICE, OPERATOR, Event
from cpbench.tracing.spans import TRACED

Kind = Literal["compute", "exposed", "idle"]
COLLECTIVE_OPERATORS = ("c10d::", "_c10d_functional::", "c10d_functional::", "symm_mem::")  # of libraries that bring their own


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a step with one phase and one kind; microseconds."""

    phase: str
    kind: Kind
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Flight:
    """Communication that a phase started, as long as it was under way."""

    phase: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Work:
    """A part of an operator, or a kernel, by name: the time that nothing below it accounts for. `calls` is 1 in the first part of each call."""

    name: str
    seconds: float
    calls: int


@dataclass
class Step:
    """One traced step of one rank: its pieces in order, without gaps, what was in flight, and its operators or kernels."""

    start: float
    end: float
    pieces: list[Piece] = field(default_factory=list)
    flights: list[Flight] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)

    def seconds(self, kind: Kind | None = None, phase: str | None = None) -> float:
        """Of a kind and a phase; None: of all."""
        chosen = (p for p in self.pieces if kind in (None, p.kind) and phase in (None, p.phase))
        return sum(p.end - p.start for p in chosen) / 1e6

    def communication(self, phase: str | None = None) -> float:
        """Seconds in which communication (of a phase) was under way, exposed or not."""
        exposed = [(p.start, p.end) for p in self.pieces if p.kind == "exposed" and phase in (None, p.phase)]
        under_way = joined([*exposed, *((f.start, f.end) for f in self.flights if phase in (None, f.phase))])
        return sum(end - start for start, end in under_way) / 1e6


def steps_of(events: Iterable[Event], alone: Mapping[str, float] | None = None) -> list[Step]:
    """The traced steps of a rank, in order; none where the trace has none. `alone`: seconds of a collective by its name, `cp.send_recv`."""
    events = list(events)
    traced = sorted((event for event in events if event.is_span and event.name == TRACED.name), key=lambda event: event.start)
    on_device = any(event.category == KERNEL for event in events)
    phases = _Phases(events)
    return [_on_device(step, events, phases) if on_device else _on_host(step, events, phases, alone or {}) for step in traced]


def phase_of(path: str) -> tuple[str, bool]:
    """The phase of a span, and whether it is a collective in it: `layer/mlp/tp.all_reduce` -> (`layer/mlp`, True)."""
    parts = path.split("/")
    for depth, part in enumerate(parts):
        if "." in part:
            return "/".join(parts[:depth]) or TRACED.name, True
    return path, False


def _on_host(step: Event, events: Sequence[Event], phases: _Phases, alone: Mapping[str, float]) -> Step:
    """What the thread that opened the step did."""
    made, counted = Step(step.start, step.end), set[int]()
    mine = [event for event in events if event.thread == step.thread and (event.is_span or event.category == OPERATOR)]
    for start, end, running in _cut(mine, step.start, step.end):
        phase, collective = phase_of(next((event.name for event in reversed(running) if event.is_span), TRACED.name))
        operators = [event for event in running if event.category == OPERATOR]
        collective = collective or any(operator.name.startswith(COLLECTIVE_OPERATORS) for operator in operators)
        kind: Kind = "exposed" if collective else "compute" if operators else "idle"
        made.pieces.append(Piece(phase, kind, start, end))
        if kind == "compute":
            made.work.append(Work(operators[-1].name, (end - start) / 1e6, int(id(operators[-1]) not in counted)))
            counted.add(id(operators[-1]))
    for event in events:
        if event.name.startswith("gloo:") and event.name != "gloo:barrier" and event.start >= step.start and event.start < step.end:
            path = phases.path(step.thread, event.start)
            longest = alone.get(path.rpartition("/")[2], float("inf")) * 1e6
            made.flights.append(Flight(phase_of(path)[0], event.start, min(event.end, step.end, event.start + longest)))
    return made


def _on_device(step: Event, events: Sequence[Event], phases: _Phases) -> Step:
    """What the device of the rank did, streams together."""
    made = Step(step.start, step.end)
    launches = {event.correlation: event for event in events if event.category in LAUNCHES and event.correlation is not None}
    mine = [event for event in events if event.category in ON_DEVICE and event.start < step.end and event.end > step.start]
    placed = {event: _launched(event, launches, phases) for event in mine}
    waiting: list[tuple[float, float]] = []
    for start, end, running in _cut(mine, step.start, step.end):
        chosen = next((event for event in running if not placed[event][1]), running[0] if running else None)
        if chosen is None:
            waiting.append((start, end))
            continue
        phase, communicates = placed[chosen]
        made.pieces += [Piece(phase, "idle", *gap) for gap in waiting]
        waiting.clear()
        made.pieces.append(Piece(phase, "exposed" if communicates else "compute", start, end))
    made.pieces += [Piece(TRACED.name, "idle", *gap) for gap in waiting]
    for event in mine:
        start, end = max(event.start, step.start), min(event.end, step.end)
        made.work.append(Work(event.name, (end - start) / 1e6, 1))
        if placed[event][1]:
            made.flights.append(Flight(placed[event][0], start, end))
    return made


def _launched(event: Event, launches: Mapping[int, Event], phases: _Phases) -> tuple[str, bool]:
    """The phase that launched a kernel, and whether it communicates: NCCL's, and copies of collectives or between devices."""
    launch = launches.get(event.correlation) if event.correlation is not None else None
    phase, collective = phases.at(launch.thread, launch.start) if launch else (TRACED.name, False)
    name = event.name.lower()
    communicates = "nccl" in name or (event.category == COPY and (collective or "ptop" in name))
    return phase, communicates


class _Phases:
    """Which phase a thread was in at a time."""

    def __init__(self, events: Sequence[Event]) -> None:
        threads: defaultdict[tuple[object, object], list[Event]] = defaultdict(list)
        for event in events:
            if event.is_span:
                threads[event.thread].append(event)
        self._changes = {thread: list(_innermost(spans)) for thread, spans in threads.items()}

    def at(self, thread: tuple[object, object], time: float) -> tuple[str, bool]:
        """The phase, and whether a collective was called in it."""
        return phase_of(self.path(thread, time))

    def path(self, thread: tuple[object, object], time: float) -> str:
        """The innermost span; the step itself outside of all spans."""
        changes = self._changes.get(thread, [])
        index = bisect.bisect_right(changes, time, key=lambda change: change[0]) - 1
        return changes[index][1] if index >= 0 else TRACED.name


def _innermost(spans: Sequence[Event]) -> Iterator[tuple[float, str]]:
    """From when on which span is the innermost."""
    first, last = min(span.start for span in spans), max(span.end for span in spans)
    for start, _, running in _cut(spans, first, last):
        yield start, running[-1].name if running else TRACED.name
    yield last, TRACED.name


def _cut(events: Iterable[Event], start: float, end: float) -> Iterator[tuple[float, float, list[Event]]]:
    """[start, end) cut wherever an event begins or ends; with each part the events that run in it, in the order in which they began."""
    marks: list[tuple[float, int, float, int, Event]] = []
    for number, event in enumerate(events):
        first, last = max(event.start, start), min(event.end, end)
        if first < last:
            marks += [(first, 1, -event.end, number, event), (last, 0, -event.start, number, event)]
    running: list[Event] = []
    at = start
    for time, begins, _, _, event in sorted(marks, key=lambda mark: mark[:4]):
        if time > at:
            yield at, time, list(running)
            at = time
        if begins:
            running.append(event)
        else:
            running.remove(event)
    if at < end:
        yield at, end, list(running)
