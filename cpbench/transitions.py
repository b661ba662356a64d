"""Everything that one rank exchanges with others in one step of a pass, in the order in which it happens: what `cpbench explain` shows.

These are the plans that communicator.py executes (sharding.py), written out one by one, and the closed form of what is received: formulas.py
sums them up, and tests hold the sums against what is counted. Pure numbers, without torch. How rows travel inside the attention is the
strategy's: its traffic stands as one line for each kind of collective. Rows that are sent to experts are as many as one says, else as if all
experts had equal loads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from cpbench import feed_forward
from cpbench.cell import Cell
from cpbench.deterministic import shares
from cpbench.distributed.traffic import Traffic
from cpbench.sharding import (
    ATTENTION,
    DENSE_MLP,
    VOCABULARY,
    Spans,
    TokenRows,
    common_spans,
    dispatch_of,
    exchange_over,
    spans_of,
    unit_of,
    unit_rows,
    without,
)
from cpbench.strategies import STRATEGIES


@dataclass(frozen=True)
class Transition:
    """One collective of a rank: rows of `values` values before and after it, and the bytes received from other ranks."""

    where: str
    operation: str
    axis: str
    rows_before: int | None
    rows_after: int | None
    values: int | None
    received: int
    calls: int = 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def transitions(cell: Cell, rank: int, layers: range | None = None, index: int = 0) -> list[Transition]:
    """Those of a global rank in step `index`, of all layers of its stage or of some. Embedding, stages and the first token stand with all."""
    step = _Step(cell, rank, index, {})
    found = [one for layer in step.layers if layers is None or layer in layers for one in step.of_layer(layer)]
    return found if layers is not None else [*step.before_layers(), *found, *step.behind_layers()]


def received(cell: Cell, rank: int, index: int, travelled: Mapping[int, int]) -> Traffic:
    """The sum of a step. `travelled`: rows that came to a rank's experts from others and came back, by layer; of other layers as if all experts
    had equal loads."""
    step, total = _Step(cell, rank, index, travelled), Traffic()
    layers = cell.config.kinds(step.layers) if not travelled else dict.fromkeys(step.layers, 1)
    for one in (*step.before_layers(), *step.behind_layers()):
        total.add(one.axis, one.operation, one.received, one.calls)
    for layer, count in layers.items():
        for one in step.of_layer(layer):
            total.add(one.axis, one.operation, one.received * count, one.calls * count)
    return total


class _Step:
    """A step of a pass on one rank."""

    def __init__(self, cell: Cell, rank: int, index: int, travelled: Mapping[int, int]) -> None:
        self.cell, self.place, self.travelled = cell, cell.layout.coordinates(rank), travelled
        self.step: TokenRows = cell.token_rows[index]
        part = cell.parts[self.place.dp].cell
        self.part = part.steps[index] if index < len(part.steps) else None  # None: this group has no tokens left
        self.is_last = index == max(cell.step_count - 1, 0)
        self.row = cell.config.hidden * cell.element_bytes
        self.layers = cell.layer_range[:1] if cell.target == "attention" else cell.stage_layers(self.place.pp)  # alone, on every stage

    def before_layers(self) -> Iterator[Transition]:
        """Hidden states from the stage before, or embeddings."""
        cell, place, held = self.cell, self.place, len(self.step.held(self.place))
        if cell.target != "prefill":
            return
        if place.pp and held:
            yield Transition("from the stage before", "send_recv", "pp", None, held, cell.config.hidden, held * self.row)
        elif not place.pp and self.part is not None:
            yield from self._after("embedding", spans_of(cell.layout, VOCABULARY), self.step)  # nothing before: every rank knows all token ids

    def of_layer(self, layer: int) -> Iterator[Transition]:
        """Around and inside the attention, and around the feed-forward block."""
        name, spans, whole = f"layer {layer}", spans_of(self.cell.layout, ATTENTION), self.cell.target != "attention"
        if self.part is not None:
            if whole:
                yield from self._before(f"{name}, before attention", spans, self.step, self.cell.low_values)
            for (axis, operation), (calls, received) in self._strategy_traffic.counts.items():
                yield Transition(f"{name}, attention ({self.part.strategy})", operation, axis, None, None, None, received, calls)
            if whole:
                yield from self._after(f"{name}, after attention", spans, self.step)
        if whole:
            yield from self._experts(name, layer) if self.cell.config.is_sparse(layer) else self._dense(name)

    @cached_property
    def _strategy_traffic(self) -> Traffic:
        """What the attention of one layer receives from other context-parallel ranks."""
        assert self.part is not None, "the rank attends in this step"
        return STRATEGIES[self.part.strategy].traffic(self.part, self.place.cp)

    def _dense(self, name: str) -> Iterator[Transition]:
        spans = spans_of(self.cell.layout, DENSE_MLP)
        yield from self._before(f"{name}, before feed-forward", spans, self.step)
        yield from self._after(f"{name}, after feed-forward", spans, self.step)

    def _experts(self, name: str, layer: int) -> Iterator[Transition]:
        cell, layout, place, hidden = self.cell, self.cell.layout, self.place, self.cell.config.hidden
        experts = cell.config.experts
        assert experts is not None
        unit = unit_of(layout, place, dispatch_of(layout, cell.dispatch))
        common = common_spans(layout, self.step, unit)
        step = replace(self.step, tp=1) if common else self.step
        shared, routed = (without(spans, common) for spans in (spans_of(layout, DENSE_MLP), unit.spans))
        yield from self._before(f"{name}, before experts", common, self.step)
        if experts.shared:
            yield from self._before(f"{name}, before shared experts", shared, step)
            yield from self._after(f"{name}, after shared experts", shared, step, last=cell.deterministic)
        yield from self._before(f"{name}, before routed experts", routed, step)
        if unit.alltoall:
            counts = (layout.ep - 1) * experts.count // layout.ep * feed_forward.INDEX_BYTES
            asked = unit_rows(unit, place, self.step) * experts.top_k
            travelled = self.travelled.get(layer, feed_forward.expected_rows(cell, self.step, place))
            yield Transition(f"{name}, how many rows each expert gets", "all_to_all", "ep", None, None, None, counts)
            yield Transition(f"{name}, to experts and back, about", "all_to_all", "ep", asked, asked, hidden, travelled * self.row, 2)
        yield from self._after(f"{name}, after routed experts", routed, step, last=False)
        mine = self.step.attended(place)
        if mine and unit.share.size > 1 and unit.ranks == 1 and (cell.deterministic or not experts.shared):
            share = len(unit.rows(mine))
            yield Transition(f"{name}, after experts", "all_gather", "tp", share, mine, hidden, (mine - share) * self.row)
        elif mine and layout.tp > 1 and self.step.tp == 1:
            yield self._all_reduce(f"{name}, after experts", "tp", layout.tp, mine)
        yield from self._after(f"{name}, after experts", common, self.step)

    def behind_layers(self) -> Iterator[Transition]:
        """The last token of each sequence, and the first that is generated."""
        cell, place = self.cell, self.place
        part = cell.parts[place.dp]
        batch = len(part.sequences)
        if cell.target != "prefill" or place.pp < cell.layout.pp - 1 or not self.is_last or not batch:
            return
        if cell.layout.cp > 1 and not part.cell.steps[-1].split.replicated:
            yield self._all_reduce("last token of each sequence", "cp", cell.layout.cp, batch)
        if cell.layout.sp:
            yield self._all_reduce("last token of each sequence", "tp", cell.layout.tp, batch)
        if cell.layout.tp > 1:
            values = 4  # the two best logits and their indices, in fp64
            yield Transition("first token", "all_gather", "tp", batch, batch * cell.layout.tp, values, (cell.layout.tp - 1) * batch * values * 8)

    def _before(self, where: str, spans: Spans, step: TokenRows, low: int = 0) -> Iterator[Transition]:
        """Gathered rows. `low`: values of each; 0: hidden states."""
        values = low or self.cell.config.hidden
        for gather in exchange_over(self.place, step, spans).gathers:
            own, whole = gather.own(self.place), sum(gather.rows)
            yield Transition(where, "all_gather", gather.axis, own, whole, values, (whole - own) * values * self.cell.element_bytes)

    def _after(self, where: str, spans: Spans, step: TokenRows, *, last: bool = True) -> Iterator[Transition]:
        """Scattered sums, and sums; without the `last` one, over tp, which routed and shared experts have in common."""
        plan = exchange_over(self.place, step, spans)
        for gather in reversed(plan.gathers):
            own = gather.own(self.place)
            received = own * (len(gather.rows) - 1) * self.row
            operation = "all_to_all" if self.cell.deterministic else "reduce_scatter"  # each adds what it receives
            yield Transition(where, operation, gather.axis, sum(gather.rows), own, self.cell.config.hidden, received)
        for axis, size in plan.sums if step.attended(self.place) else ():
            if last or axis != "tp":
                yield from self._sum(where, axis, size, step.attended(self.place))

    def _sum(self, where: str, axis: str, size: int, rows: int) -> Iterator[Transition]:
        if not self.cell.deterministic:
            yield self._all_reduce(where, axis, size, rows)
            return
        hidden, own = self.cell.config.hidden, shares(rows, size)[getattr(self.place, axis) % size]
        yield Transition(where, "all_to_all", axis, rows, own, hidden, own * (size - 1) * self.row)
        yield Transition(where, "all_gather", axis, own, rows, hidden, (rows - own) * self.row)

    def _all_reduce(self, where: str, axis: str, size: int, rows: int) -> Transition:
        return Transition(where, "all_reduce", axis, rows, rows, self.cell.config.hidden, 2 * rows * self.row * (size - 1) // size)
