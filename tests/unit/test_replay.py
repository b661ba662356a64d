"""Programs of ranks played out: cases that can be worked out by hand, and layers that are extrapolated against layers that are played out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import log, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpbench.distributed.traffic import Transfer
from cpbench.layout import Layout
from cpbench.projection import replay as module
from cpbench.projection.replay import Outcome, replay
from cpbench.projection.stretch import COMPUTE
from cpbench.projection.tape import Script, Section, Step


@dataclass
class Flat:
    """A transfer takes a second for each byte, wherever it goes."""

    slower: float = 0.0
    dragged: float = 0.0
    later: float = 0.0
    asked: list[tuple[str, tuple[int, ...], int]] = field(default_factory=list)

    def seconds(self, operation: str, ranks: Sequence[int], travels: int) -> float:
        self.asked.append((operation, tuple(ranks), travels))
        return float(travels)

    def kappa(self, ranks: Sequence[int]) -> float:
        return self.slower

    def late(self, work_s: float) -> float:
        return self.later if work_s >= 1.0 else 0.0

    def drag(self, ranks: Sequence[int]) -> float:
        return self.dragged


def whole(axis: str, size: int, seconds: int) -> Transfer:
    others = tuple(range(1, size))
    return Transfer(axis, size, "all_gather", seconds, others, others)


def ring(size: int, seconds: int) -> Transfer:
    return Transfer("cp", size, "send_recv", seconds, (1,), (size - 1,))


def script(*steps: Step, rest: float = 0.0, layers: int = 1) -> Script:
    return Script((Section(tuple(steps), rest, 0, layers),))


def blocking(work: float, transfer: Transfer, number: int = 1) -> tuple[Step, Step]:
    return Step(work, number, transfer), Step(0.0, number, None)


def played(layout: str, scripts: Sequence[Script], costs: Flat | None = None, jitter: float = 0.0, watched: int | None = None) -> Outcome:
    return replay(Layout.parse(layout), scripts, costs or Flat(), jitter, watched)


def test_a_transfer_behind_much_work_takes_longer() -> None:
    """By the work of the rank that worked longer since it last waited."""
    costs = Flat(later=0.25)
    one, other = script(*blocking(0.5, whole("cp", 2, 1))), script(*blocking(2.0, whole("cp", 2, 1)))
    assert played("cp2", [one, one], costs).seconds == 1.5
    assert played("cp2", [one, other], costs).seconds == 2.0 + 1.0 + 0.25
    assert played("cp2", [one, other], Flat(later=-5.0)).seconds == 2.0, "nothing takes less than no time"


def ends(outcome: Outcome) -> list[float]:
    return [rank.end_s for rank in outcome.ranks]


def test_two_ranks_meet_when_the_later_one_comes() -> None:
    outcome = played("cp2", [script(*blocking(work, whole("cp", 2, 4)), rest=1) for work in (10, 13)])
    assert ends(outcome) == [18, 18]
    assert [rank.exposed_s for rank in outcome.ranks] == [7, 4]
    assert [rank.work_s for rank in outcome.ranks] == [11, 14]
    assert [rank.comm_s for rank in outcome.ranks] == [4, 4]
    assert (outcome.seconds, outcome.slowest) == (18, 1)


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(("work", "transfer"), [(10, 4), (4, 10), (5, 5)])
def test_a_ring_hides_the_shorter_of_work_and_transfer(size: int, work: int, transfer: int) -> None:
    steps: list[Step] = []
    for number in range(1, size):
        steps += [Step(0.0, number, ring(size, transfer)), Step(work, number, None)]
    outcome = played(f"cp{size}", [script(*steps, rest=work)] * size)
    assert ends(outcome) == [(size - 1) * max(work, transfer) + work] * size
    assert outcome.ranks[0].exposed_s == (size - 1) * max(0, transfer - work)


@pytest.mark.parametrize(("second", "seconds"), [("cp", 7), ("tp", 4)])
def test_transfers_of_one_group_follow_each_other_and_those_of_two_groups_fly_together(second: str, seconds: int) -> None:
    steps = Step(0, 1, whole("cp", 2, 3)), Step(0, 2, whole(second, 2, 4)), Step(0, 1, None), Step(0, 2, None)
    assert ends(played("cp2tp2", [script(*steps)] * 4)) == [seconds] * 4


def test_work_is_slower_by_kappa_while_a_transfer_flies() -> None:
    """A transfer of 4 s behind 10 s of work: for 4 s work goes on at (1 - kappa), and what that takes more comes behind."""
    steps = Step(0, 1, whole("cp", 2, 4)), Step(10, 1, None)
    outcome = played("cp2", [script(*steps)] * 2, Flat(slower=0.2))
    assert ends(outcome) == pytest.approx([10 + 4 * 0.2 / 0.8] * 2)
    assert outcome.ranks[0].exposed_s == 0


@pytest.mark.parametrize(("work", "seconds"), [(10, 10), (8, 8), (4, 6)])
def test_a_transfer_is_slower_by_drag_while_work_is_done(work: float, seconds: float) -> None:
    """Of 4 s at half the speed 2 s are done behind 4 s of work, and 2 s are left; 8 s of work hide all of it."""
    steps = Step(0, 1, whole("cp", 2, 4)), Step(work, 1, None)
    assert ends(played("cp2", [script(*steps)] * 2, Flat(dragged=0.5))) == pytest.approx([seconds] * 2)


@pytest.mark.parametrize("size", [2, 4])
def test_jitter_makes_the_latest_of_n_ranks_late(size: int) -> None:
    outcome = played(f"cp{size}", [script(*blocking(10, whole("cp", size, 1)), *blocking(5, whole("cp", size, 1), 2))] * size, jitter=0.01)
    late = 0.01 * sqrt(2 * log(size))
    assert ends(outcome) == pytest.approx([10 + 10 * late + 1 + 5 + 5 * late + 1] * size)


def test_a_message_concerns_two_ranks_and_waits_for_the_sender() -> None:
    costs = Flat()
    send, receive = Transfer("pp", 4, "send_recv", 2, (1,), ()), Transfer("pp", 4, "send_recv", 2, (), (3,))
    idle = Script((Section((), 1.0),))
    scripts = [script(*blocking(6, send)), script(*blocking(1, receive), rest=3), idle, idle]
    assert ends(played("pp4", scripts, costs)) == [8, 11, 1, 1]
    assert {ranks for _, ranks, _ in costs.asked} == {(0, 1), (1, 0)}


def pipeline(stages: int, chunks: int, work: float, seconds: int = 0, layers: int = 1) -> list[Script]:
    """Stages that ask for the rows of the next chunk before they compute those at hand, as Pipeline does."""
    scripts = []
    for stage in range(stages):
        receive, send = Transfer("pp", stages, "send_recv", seconds, (), (stages - 1,)), Transfer("pp", stages, "send_recv", seconds, (1,), ())
        sections: list[Section] = []
        for chunk in range(chunks):
            asked, awaited = 2 * chunk, 2 * chunk + 1
            before: list[Step] = []
            if stage:
                before += [Step(0, asked + 100, receive)] if not chunk else []
                before += [Step(0, asked + 100, None)]
                before += [Step(0, asked + 102, receive)] if chunk + 1 < chunks else []
            sections += [Section(tuple(before), 0.0)] * bool(before) + [Section((), work / layers, stage, layers)]
            if stage < stages - 1:
                after = [*([Step(0, awaited - 2, None)] if chunk else []), Step(0, awaited, send)]
                sections.append(Section((*after, *([Step(0, awaited, None)] if chunk == chunks - 1 else [])), 0.0))
        scripts.append(Script(tuple(sections)))
    return scripts


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("chunks", [1, 2, 7])
def test_a_pipeline_takes_a_stage_for_each_chunk_and_each_stage_behind_the_first(stages: int, chunks: int) -> None:
    assert played(f"pp{stages}", pipeline(stages, chunks, 5.0)).seconds == 5.0 * (chunks + stages - 1)


def test_ranks_that_wait_for_what_nobody_starts_are_an_error() -> None:
    lonely = script(*blocking(1, whole("cp", 2, 1)))
    with pytest.raises(RuntimeError, match=r"ranks \[0\] wait for collectives that others never start"):
        played("cp2", [lonely, Script((Section((), 1.0),))])


def one_layer(shift: float) -> list[Step]:
    """A ring step hidden behind work, and a blocking gather over tp."""
    return [Step(0.5, 1, ring(2, 3)), Step(2.0 + shift, 1, None), *blocking(1.0 - shift / 2, whole("tp", 2, 1), 2)]


def program(shift: float, layers: tuple[int, ...], kinds: int = 1) -> Script:
    """Layers of one kind or two, between an embedding and a head."""
    middle = [Section(tuple(one_layer(shift * (1 + kind))), 0.25 * kind, kind, times) for kind, times in enumerate(layers[:kinds])]
    return Script((Section((), 1.0 + shift), *middle, Section((*blocking(0.5, whole("tp", 2, 2), 9),), 0.1)))


@given(st.lists(st.floats(0, 1), min_size=4, max_size=4), st.tuples(st.integers(1, 40), st.integers(4, 40)), st.integers(1, 2), st.sampled_from((0.0, 0.3)))
def test_layers_that_are_extrapolated_are_as_layers_played_out(shifts: list[float], layers: tuple[int, int], kinds: int, contention: float) -> None:
    scripts = [program(shift, layers, kinds) for shift in shifts]
    costs = Flat(slower=contention, dragged=contention / 2)
    short = played("cp2tp2", scripts, costs, 0.01)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, "PLAYED", 1000)
        full = played("cp2tp2", scripts, costs, 0.01)
    assert short.seconds == pytest.approx(full.seconds, rel=0.02)
    for one, other in zip(short.ranks, full.ranks, strict=True):
        assert one.comm_s == pytest.approx(other.comm_s)
        assert one.end_s == pytest.approx(one.work_s + one.exposed_s)


@pytest.mark.parametrize(("work", "seconds"), [(5.0, 0), (5.0, 1), (2.0, 4)])
def test_a_pipeline_that_is_too_long_to_play_out_is_extrapolated(monkeypatch: pytest.MonkeyPatch, work: float, seconds: int) -> None:
    """Where transfers are hidden behind a few layers as they are behind all of them, or behind neither."""

    def scripts() -> list[Script]:
        return pipeline(3, 4, work, seconds, layers=20)

    full = played("pp3", scripts()).seconds
    monkeypatch.setattr(module, "MOST_STEPS", 0)
    assert played("pp3", scripts()).seconds == pytest.approx(full, rel=0.05)


def test_ranks_that_share_a_script_end_as_ranks_with_equal_ones() -> None:
    shared = program(0.2, (12,))
    alone = [replace(shared) for _ in range(4)]
    assert played("cp2tp2", [shared] * 4).ranks == played("cp2tp2", alone).ranks


def test_stretches_are_those_of_the_second_run_of_the_watched_layer() -> None:
    steps = (Step(1.0, 0, None, "layer/project"), *blocking(2.0, whole("cp", 2, 4)))
    outcome = played("cp2", [script(*steps, rest=3.0, layers=9)] * 2, watched=0)
    mine = [(one.lane, one.name, one.start, one.end) for one in outcome.stretches if one.rank == 1]
    assert mine == [(COMPUTE, "layer/project", 0, 1), (COMPUTE, "work", 1, 3), ("cp", "all_gather", 3, 7), (COMPUTE, "work", 7, 10)]
    assert played("cp2", [script(*steps)] * 2, watched=1).stretches == ()
    assert played("cp2", [script(*steps)] * 2).stretches == ()
