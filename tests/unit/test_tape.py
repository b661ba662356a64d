"""Tapes become scripts: work and collectives cut where layers begin, layers that repeat, and what may cross their borders."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpbench.distributed.traffic import Transfer
from cpbench.projection.tape import Script, Section, Step, Tape
from cpbench.tracing.spans import LAYER, Category

GATHER = Transfer("cp", 4, "all_gather", 300, (1, 2, 3), (1, 2, 3))
RECEIVE = Transfer("pp", 2, "send_recv", 50, (), (1,))


class Ticks:
    """A clock that stands still until it is told to go on, or somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def mark(self) -> float:
        return self.now

    perf_counter = mark

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def between(first: float, second: float) -> float:
    return second - first


def recorded(*events: object, detailed: bool = False, times: int = 1) -> Script:
    """A number is work; a transfer starts; `-n` as text waits for n; `[3` enters layer 3, `]` leaves it; other texts are spans."""
    clock = Ticks()
    tape = Tape(clock.mark, detailed)
    tape.begin()
    for event in events:
        if isinstance(event, Transfer):
            tape.start(event)
        elif isinstance(event, str):
            if event[0] == "-":
                tape.wait(int(event[1:]))
            elif event[0] == "[":
                tape.enter(LAYER.name, Category.LAYER, float(event[1:]))
            elif event == "]":
                tape.exit()
            else:
                tape.enter(event, Category.LAYER, None)
        else:
            assert isinstance(event, int | float)
            clock.now += event
    return tape.script(clock.now, between, lambda layer: times)


def test_work_and_collectives_are_steps_and_layers_are_sections() -> None:
    script = recorded(1, "[0", 2, GATHER, 3, "-1", 4, "]", 5, times=7)
    layer = Section((Step(2, 1, GATHER, "layer"), Step(3, 1, None, "layer")), 4, 0, 7)
    assert script.sections == (Section((), 1), layer, Section((), 5))
    assert script.work_s == 1 + 7 * 9 + 5
    assert script.transfers == [(GATHER, 7)]


def test_details_cut_work_where_spans_begin_and_name_it() -> None:
    events = ("[2", 1, "layer/mlp", 2, GATHER, 3, "-1", "]", 4, "]")
    (section,) = recorded(*events, detailed=True).sections
    assert [(step.name, step.work_s) for step in section.steps] == [("layer", 1), ("layer/mlp", 2), ("layer/mlp", 3), ("layer/mlp", 0)]
    assert section.rest_s == 4
    (plain,) = recorded(*events).sections
    assert [step.work_s for step in plain.steps] == [3, 3]
    assert plain.work_s == section.work_s == 10


def test_a_recording_that_begins_again_forgets() -> None:
    clock = Ticks()
    tape = Tape(clock.mark)
    tape.begin()
    tape.start(GATHER)
    clock.now = 5.0
    tape.begin()
    assert tape.start(RECEIVE) == 1
    tape.wait(1)
    assert tape.script(5.0, between, lambda layer: 1).sections == (Section((Step(0, 1, RECEIVE), Step(0, 1, None)), 0),)


def test_what_is_asked_for_between_layers_may_arrive_behind_the_next_one() -> None:
    script = recorded(RECEIVE, "[0", 1, GATHER, "-2", "]", 2, "-1", times=3)
    assert [[step.number for step in section.steps] for section in script.sections] == [[1], [2, 2], [1]]


@pytest.mark.parametrize(
    ("events", "message"),
    [
        (("[0", GATHER, 1, "]"), "layer 0 starts collectives that it does not await"),
        (("[0", GATHER, 1, "]", "-1"), "layer 0 starts"),
        ((GATHER, "[0", "-1", "]"), "collective 1 crosses the border of a layer"),
        ((1, GATHER, 1, GATHER, "-2"), r"collectives \[1\] are never awaited"),
    ],
)
def test_collectives_that_would_be_lost_when_a_layer_is_repeated_are_refused(events: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recorded(*events)


transfers = st.builds(
    Transfer, st.sampled_from(("cp", "tp", "pp")), st.integers(2, 9), st.just("send_recv"), st.integers(0, 1 << 40), st.just((1,)), st.just(())
)
steps = st.builds(Step, st.floats(0, 10), st.integers(0, 9), st.none() | transfers, st.text(max_size=5))
sections = st.builds(Section, st.lists(steps, max_size=4).map(tuple), st.floats(0, 10), st.none() | st.integers(0, 99), st.integers(1, 99))


@given(st.lists(sections, max_size=4).map(tuple).map(Script))
def test_a_script_survives_json(script: Script) -> None:
    assert Script.from_dict(json.loads(json.dumps(script.to_dict()))) == script


def test_a_wait_pauses_for_what_is_left_of_its_transfer_and_that_is_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Ticks()
    monkeypatch.setattr("cpbench.projection.tape.time", clock)
    tape = Tape(clock.mark, pause=lambda transfer: 5.0)
    tape.begin()
    tape.wait(tape.start(GATHER))
    clock.now += 1.0
    number = tape.start(GATHER)
    clock.now += 3.0
    tape.wait(number)
    number = tape.start(GATHER)
    clock.now += 7.0
    tape.wait(number)
    assert clock.slept == [5.0, 2.0]
    assert [step.work_s for step in tape.script(clock.now, between, lambda layer: 1).sections[0].steps] == [0.0, 0.0, 1.0, 3.0, 0.0, 7.0]
