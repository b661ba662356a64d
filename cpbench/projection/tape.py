"""What one rank's program did while nothing moved: its own work, the collectives that it started, and where it waited for them.

A tape is recorded by the null backend (distributed/null.py) on whatever clock it is given: a real one, where the work is done and takes its
time, or one that prices advance (pricing.py). A finished tape is a `Script`: plain data, in which the layers of one kind stand once and
say how often they run. What transfers take, and who waits for whom, is worked out in replay.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cpbench.distributed.traffic import Transfer
from cpbench.tracing.spans import LAYER, Category

Clock = Callable[[], Any]  # a mark; what lies between two of them is known at the end


@dataclass(frozen=True)
class Step:
    """Seconds of own work, and then a collective, by its number: its start, with what travels, or the wait for its end; 0: nothing.

    `name`: of the span that the work was in, where these were asked for.
    """

    work_s: float
    number: int
    transfer: Transfer | None
    name: str = ""


@dataclass(frozen=True)
class Section:
    """A stretch of a rank's program, and how often it runs in a row: a layer stands for all of its kind that follow. Work ends it.

    Collectives that a layer starts are awaited in it, so that it can be repeated. What is started between layers may be under way during some:
    a pipeline stage asks for its next rows before it computes those at hand.
    """

    steps: tuple[Step, ...]
    rest_s: float
    layer: int | None = None
    times: int = 1

    @property
    def work_s(self) -> float:
        """Own work of one run."""
        return sum(step.work_s for step in self.steps) + self.rest_s


@dataclass(frozen=True)
class Script:
    """What one rank does in a pass."""

    sections: tuple[Section, ...]

    @property
    def work_s(self) -> float:
        return sum(section.work_s * section.times for section in self.sections)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"sections": [vars(section) | {"steps": [_step_dict(step) for step in section.steps]} for section in self.sections]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Script:
        """The inverse of `to_dict`."""
        return cls(tuple(Section(**{**section, "steps": tuple(_step_of(step) for step in section["steps"])}) for section in data["sections"]))

    @property
    def transfers(self) -> list[tuple[Transfer, int]]:
        """Everything that is started, and how often."""
        return [(step.transfer, section.times) for section in self.sections for step in section.steps if step.transfer is not None]


def _step_dict(step: Step) -> dict[str, Any]:
    return vars(step) | {"transfer": vars(step.transfer) if step.transfer else None}


def _step_of(data: dict[str, Any]) -> Step:
    found = data["transfer"]
    moved = found and Transfer(**{**found, **{name: tuple(found[name]) for name in ("to", "source")}})
    return Step(**{**data, "transfer": moved})


@dataclass
class _Entry:
    """A moment of the recording: a start, a wait, or the border of a span, of a layer's where `is_layer`."""

    mark: Any
    number: int = 0
    transfer: Transfer | None = None
    name: str = ""  # of the span before
    is_layer: bool = False
    layer: int | None = None  # that begins here
    resumed: Any = None  # where the rank went on, if it paused


@dataclass
class Tape:
    """A recording of one rank. It is a tool for spans, too, because only these know where layers begin. `detailed`: work is cut where spans are.

    `pause`: about what a transfer takes in seconds, for which a wait lets go of the core, as it would if it were one. Work behind a pause is
    slower than work in a row: others have used core and caches, and the scheduler has to find one again.
    """

    clock: Clock
    detailed: bool = False
    pause: Callable[[Transfer], float] | None = None
    fills: bool = False  # as the null backend has it
    entries: list[_Entry] = field(default_factory=list)
    _open: list[str] = field(default_factory=list)
    _started: int = 0
    _until: dict[int, float] = field(default_factory=dict)  # when the transfers that were started would be over

    def start(self, transfer: Transfer) -> int:
        """A collective starts; its number."""
        self._started += 1
        if self.pause is not None:
            self._until[self._started] = time.perf_counter() + self.pause(transfer)
        self.entries.append(_Entry(self.clock(), self._started, transfer, self._name))
        return self._started

    def wait(self, number: int) -> None:
        entry = _Entry(self.clock(), number, name=self._name)
        self.entries.append(entry)
        left = self._until.pop(number, 0.0) - time.perf_counter()
        if left > 0:
            time.sleep(left)
            entry.resumed = self.clock()

    def enter(self, path: str, category: Category, payload: float | None) -> None:
        self._border(path == LAYER.name, int(payload or 0))
        self._open.append(path)

    def exit(self) -> None:
        self._border(self._open[-1] == LAYER.name, None)
        self._open.pop()

    @property
    def _name(self) -> str:
        return self._open[-1] if self._open else ""

    def _border(self, is_layer: bool, layer: int | None) -> None:
        if is_layer or self.detailed:
            self.entries.append(_Entry(self.clock(), name=self._name, is_layer=is_layer, layer=layer))

    def begin(self) -> None:
        """What was recorded is forgotten, and the recording begins here."""
        self.entries, self._open, self._started = [_Entry(self.clock())], [], 0

    def script(self, end: Any, between: Callable[[Any, Any], float], times: Callable[[int], int]) -> Script:
        """The recording up to a mark. `times(layer)`: how many layers the one that ran stands for.

        Raises ValueError where one that a layer starts is awaited outside of it, or the other way round, or one is never awaited.
        """
        sections: list[Section] = []
        steps: list[Step] = []
        layer: int | None = None
        under_way: dict[int, bool] = {}  # whether a layer started it
        last, work = self.entries[0].mark, 0.0
        for entry in [*self.entries[1:], _Entry(end, is_layer=True)]:
            work, last = work + max(0.0, between(last, entry.mark)), entry.mark if entry.resumed is None else entry.resumed
            if not entry.is_layer:
                steps.append(Step(work, entry.number, entry.transfer, entry.name))
                work = 0.0
                if entry.transfer is not None:
                    under_way[entry.number] = layer is not None
                elif entry.number and under_way.pop(entry.number) != (layer is not None):
                    raise ValueError(f"collective {entry.number} crosses the border of a layer")
                continue
            if layer is not None and any(under_way.values()):
                raise ValueError(f"layer {layer} starts collectives that it does not await")
            if steps or work:
                sections.append(Section(tuple(steps), work, layer, times(layer) if layer is not None else 1))
            steps, work, layer = [], 0.0, entry.layer
        if under_way:
            raise ValueError(f"collectives {sorted(under_way)} are never awaited")
        return Script(tuple(sections))
