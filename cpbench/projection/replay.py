"""The programs of all ranks played out against each other: who waits for whom, for how long, and when the last one is done.

A discrete-event simulation. Every rank has one stream of work and, in each group that it talks in, one stream of transfers, as in NCCL. A
transfer begins when all whom it concerns have started it and the one before it in that stream is over; a wait ends when its transfer does. While a
transfer is under way work is slower (it takes cores or SMs), and while work is done a transfer may be. What a transfer takes alone, and how much the
two disturb each other, are the costs' affair (links.py); what ranks do is in their scripts (tape.py).

A script in which a layer runs many times is played out for a few of them, and what one more adds is taken as often as layers are left:
from the third layer on every one adds the same. Across stages, where chunks overlap, that is nearly so, and short programs are played out whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import log, sqrt
from typing import Protocol

from cpbench.distributed.traffic import Transfer
from cpbench.layout import AXES, INNER_AXES, Layout
from cpbench.projection.stretch import COMPUTE, Stretch
from cpbench.projection.tape import Script
from cpbench.sharding import partial_groups

PLAYED = 3  # layers of a kind after which one more adds what every one adds
PLAYED_OF_STAGES = 8  # the same across stages, where what travels hides behind all layers of a stage: behind few of them it might not
MOST_STEPS = 200_000  # that are played out in full where ranks wait across stages
Key = tuple[str, tuple[int, ...]]


class Costs(Protocol):
    """What transfers take."""

    def seconds(self, operation: str, ranks: Sequence[int], travels: int) -> float:
        """Of a transfer alone."""

    def kappa(self, ranks: Sequence[int]) -> float:
        """By what part work is slower while a transfer of these ranks is under way."""

    def drag(self, ranks: Sequence[int]) -> float:
        """By what part a transfer of these ranks is slower while work is done."""

    def late(self, work_s: float) -> float:
        """Seconds that a transfer takes more when its ranks have worked so long before."""


@dataclass(frozen=True)
class RankOutcome:
    """Seconds of one rank in a pass. `exposed_s`: waiting; `comm_s`: what its transfers take alone."""

    end_s: float
    work_s: float
    exposed_s: float
    comm_s: float

    def plus(self, other: RankOutcome, times: float) -> RankOutcome:
        """This, and `times` as much as the other."""
        mine, theirs = vars(self).values(), vars(other).values()
        return RankOutcome(*(one + times * more for one, more in zip(mine, theirs, strict=True)))


@dataclass(frozen=True)
class Outcome:
    """What became of a pass. `stretches`: of the layer that was watched, from its beginning."""

    ranks: tuple[RankOutcome, ...]
    stretches: tuple[Stretch, ...] = ()

    @property
    def seconds(self) -> float:
        """Until the last rank is done."""
        return max(rank.end_s for rank in self.ranks)

    @property
    def slowest(self) -> int:
        """The rank with the most work of its own, for which the others wait."""
        return max(range(len(self.ranks)), key=lambda rank: self.ranks[rank].work_s)


def replay(layout: Layout, scripts: Sequence[Script], costs: Costs, jitter: float = 0.0, watched: int | None = None) -> Outcome:
    """Play out the programs of all ranks of a layout, in order; several may be one object.

    `jitter`: by what part of its work a rank may be late at a meeting, in standard deviations; the latest of n ranks is sqrt(2 ln n) of these late.
    `watched`: a layer whose stretches are wanted, in its second run where there are several. Raises RuntimeError where ranks wait for ever.
    """
    if layout.pp > 1 and sum(len(section.steps) * section.times for script in scripts for section in script.sections) <= MOST_STEPS:
        return _Replay(layout, scripts, costs, jitter, watched).run()
    most = PLAYED if layout.pp == 1 else PLAYED_OF_STAGES
    few = _Replay(layout, _cut(scripts, most, None), costs, jitter, watched)
    played = few.run()
    if layout.pp == 1:
        more = [_more(script, rank.turns) for script, rank in zip(scripts, few.ranks, strict=True)]
        return Outcome(tuple(one.plus(added, 1.0) for one, added in zip(played.ranks, more, strict=True)), played.stretches)
    ranks = played.ranks
    for left in sorted({section.times - most for script in scripts for section in script.sections if section.times > most}):
        one_more = _Replay(layout, _cut(scripts, most, left), costs, jitter, None).run()
        ranks = tuple(rank.plus(longer.plus(base, -1.0), left) for rank, longer, base in zip(ranks, one_more.ranks, played.ranks, strict=True))
    return Outcome(ranks, played.stretches)


def _more(script: Script, turns: dict[int, list[RankOutcome]]) -> RankOutcome:
    """What the layers add that were not played out: as much as the last one of their kind that was."""
    added = RankOutcome(0.0, 0.0, 0.0, 0.0)
    for number, section in enumerate(script.sections):
        if section.times > PLAYED:
            *_, before, last = turns[number]
            added = added.plus(last.plus(before, -1.0), section.times - PLAYED)
    return added


def _cut(scripts: Sequence[Script], most: int, longer: int | None) -> list[Script]:
    """The scripts with at most so many layers of each kind, one more of those of which `longer` are left."""
    made: dict[int, Script] = {}
    for script in scripts:
        if id(script) not in made:
            sections = (replace(one, times=min(one.times, most + (one.times - most == longer))) for one in script.sections)
            made[id(script)] = Script(tuple(sections))
    return [made[id(script)] for script in scripts]


@dataclass
class _Flight:
    """A transfer of one rank that is not awaited yet: when it was started, and whom it meets."""

    transfer: Transfer
    group: tuple[int, ...]
    started: float
    meetings: list[tuple[list[tuple[float, float]], int, int]]  # a list of (moment, work before it), the place in it, and how many must have come
    is_watched: bool


class _Rank:
    """One rank on its way."""

    def __init__(self, script: Script, watched: int | None) -> None:
        self.steps = _flat(script, watched)
        self.now = self.work = self.exposed = self.comm = 0.0
        self.since = 0.0  # work since the last meeting
        self.slowed_until = 0.0
        self.flights: dict[int, _Flight] = {}
        self.waiting: int | None = None
        self.done = False
        self.turns: dict[int, list[RankOutcome]] = defaultdict(list)  # of each section where the rank was after each run of it

    @property
    def outcome(self) -> RankOutcome:
        return RankOutcome(self.now, self.work, self.exposed, self.comm)


class _Replay:
    """All ranks on their way."""

    def __init__(self, layout: Layout, scripts: Sequence[Script], costs: Costs, jitter: float, watched: int | None) -> None:
        self.costs, self.jitter = costs, jitter
        self.groups = _groups(layout)
        self.ranks = [_Rank(script, watched) for script in scripts]
        self.together: dict[tuple[Key, int], list[tuple[float, float]]] = defaultdict(list)
        self.sent: dict[tuple[int, int, Key], list[tuple[float, float]]] = defaultdict(list)  # from, to
        self.received: dict[tuple[int, int, Key], list[tuple[float, float]]] = defaultdict(list)  # by, from
        self.calls: dict[tuple[int, Key], int] = defaultdict(int)
        self.free: dict[tuple[int, Key], float] = defaultdict(float)  # when a rank's stream of a group is
        self.prices: dict[tuple[str, tuple[int, ...], int], tuple[float, float, float]] = {}
        self.stretches: list[Stretch] = []

    def run(self) -> Outcome:
        going = list(range(len(self.ranks)))
        while going:
            moved = [rank for rank in going if self._advance(rank)]
            if not moved:
                raise RuntimeError(f"ranks {going[:8]} wait for collectives that others never start")
            going = [rank for rank in going if not self.ranks[rank].done]
        starts = [stretch.start for stretch in self.stretches]
        stretches = tuple(replace(one, start=one.start - min(starts), end=one.end - min(starts)) for one in self.stretches)
        return Outcome(tuple(rank.outcome for rank in self.ranks), stretches)

    def _advance(self, number: int) -> bool:
        """As far as a rank gets; whether it got anywhere."""
        rank, moved = self.ranks[number], False
        if rank.waiting is not None:
            if not self._awaited(number, rank, rank.waiting):
                return False
            rank.waiting, moved = None, True
        for work_s, serial, transfer, name, is_watched in rank.steps:
            moved = True
            if serial < 0:
                rank.turns[-serial - 1].append(rank.outcome)
                continue
            if work_s:
                if is_watched:
                    self.stretches.append(Stretch(number, COMPUTE, name or "work", rank.now, rank.now + work_s))
                rank.now += work_s
                rank.work += work_s
                rank.since += work_s
            if transfer is not None:
                self._start(number, rank, serial, transfer, is_watched)
            elif serial and not self._awaited(number, rank, serial):
                rank.waiting = serial
                return moved
        rank.done = True
        return moved

    def _start(self, number: int, rank: _Rank, serial: int, transfer: Transfer, is_watched: bool) -> None:
        group, moment, meetings = self.groups[transfer.axis, transfer.size][number], (rank.now, rank.since), []
        key = (transfer.axis, group)
        if transfer.is_whole:
            board = self.together[key, self.calls[number, key]]
            self.calls[number, key] += 1
            board.append(moment)
            meetings.append((board, 0, transfer.size))
        else:
            place = group.index(number)
            for peers, boards, others in ((transfer.to, self.sent, self.received), (transfer.source, self.received, self.sent)):
                for step in peers:
                    pair = (number, group[(place + step) % len(group)])
                    mine, theirs = boards[*pair, key], others[*pair[::-1], key]
                    meetings.append((theirs, len(mine), len(mine) + 1))
                    mine.append(moment)
        rank.flights[serial] = _Flight(transfer, group, rank.now, meetings, is_watched)

    def _awaited(self, number: int, rank: _Rank, serial: int) -> bool:
        """Whether all have come whom a transfer concerns; if so, the rank goes on when it has ended."""
        flight = rank.flights[serial]
        if any(len(board) < least for board, _, least in flight.meetings):
            return False
        del rank.flights[serial]
        transfer, key = flight.transfer, (flight.transfer.axis, flight.group)
        latest, begins = 0.0, max(flight.started, self.free[number, key])
        for board, place, least in flight.meetings:
            for moment, since in board[place:least]:
                begins, latest = max(begins, moment), max(latest, since)
        begins += self.jitter * sqrt(2 * log(transfer.size)) * latest
        seconds, kappa, drag = self._price(number, flight)
        seconds = max(0.0, seconds + self.costs.late(latest))
        behind = min(seconds, max(0.0, rank.now - begins) * (1 - drag))  # what of it was done behind work
        ends = begins + behind / (1 - drag) + seconds - behind
        self.free[number, key] = ends
        overlapped = max(0.0, min(ends, rank.now) - max(begins, rank.slowed_until))
        rank.slowed_until = max(rank.slowed_until, min(ends, rank.now))
        slowed = overlapped * kappa / (1 - kappa)
        rank.now += slowed
        rank.work += slowed
        rank.comm += seconds
        rank.since = 0.0
        if flight.is_watched:
            self.stretches.append(Stretch(number, transfer.axis, transfer.operation, begins, ends))
        if ends > rank.now:
            rank.exposed += ends - rank.now
            rank.now = ends
        return True

    def _price(self, number: int, flight: _Flight) -> tuple[float, float, float]:
        """Seconds alone, kappa and drag. A message concerns two ranks; everything else the whole group."""
        transfer, ranks = flight.transfer, flight.group
        if not (transfer.to and transfer.source):
            (step,) = (*transfer.to, *transfer.source)
            ranks = (number, ranks[(ranks.index(number) + step) % len(ranks)])
        known = (transfer.operation, ranks, transfer.travels)
        if known not in self.prices:
            self.prices[known] = (self.costs.seconds(*known), self.costs.kappa(ranks), self.costs.drag(ranks))
        return self.prices[known]


def _groups(layout: Layout) -> dict[tuple[str, int], dict[int, tuple[int, ...]]]:
    """The group that every rank is in, by axis and size."""
    lists = [(axis, layout.size(axis), layout.groups(axis)) for axis in (*AXES, *INNER_AXES, "ep")]
    return {(axis, size): {rank: ranks for ranks in groups for rank in ranks} for axis, size, groups in [*lists, *partial_groups(layout)]}


def _flat(script: Script, watched: int | None) -> Iterator[tuple[float, int, Transfer | None, str, bool]]:
    """Every step of a rank, and whether it belongs to the run of a layer that is watched: the second where there are several.

    Behind every run of section n stands -1 - n in the place of a collective's number.
    """
    seen, serial, numbers = False, 0, dict[int, int]()  # the latest serial of each number: some are awaited in a later section
    for number, section in enumerate(script.sections):
        for turn in range(section.times):
            is_watched = not seen and watched is not None and section.layer == watched and turn == min(1, section.times - 1)
            for step in section.steps:
                if step.transfer is not None:
                    serial += 1
                    numbers[step.number] = serial
                yield step.work_s, numbers[step.number] if step.number else 0, step.transfer, step.name, is_watched
            if section.rest_s:
                yield section.rest_s, 0, None, "", is_watched
            yield 0.0, -1 - number, None, "", False
            seen = seen or is_watched
