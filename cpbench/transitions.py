"""Everything that one rank exchanges with others in one step of a pass, in the order in which it happens: what `cpbench explain` shows.

The same plans that communicator.py executes (sharding.py) and formulas.py sums up, written out one by one; tests hold the sum of these
against the formulas. Pure numbers, without torch. How rows travel inside the attention is the strategy's: its traffic stands as one line
for each kind of collective. Rows that are sent to experts are counted as if all experts had equal loads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from cpbench import feed_forward
from cpbench.cell import Cell
from cpbench.distributed.traffic import Traffic
from cpbench.layout import Coordinates
from cpbench.sharding import ATTENTION, DENSE_MLP, VOCABULARY, Axes, Exchange, Spans, TokenRows, exchange_over, spans_of, unit_of, unit_rows
from cpbench.sharding import dispatch_of as way_to_experts
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
    return list(_Rank(cell, rank, index).all(layers))


class _Rank:
    def __init__(self, cell: Cell, rank: int, index: int) -> None:
        self.cell, self.place, self.index = cell, cell.layout.coordinates(rank), index
        self.step: TokenRows = cell.token_rows[index]
        part = cell.parts[self.place.dp].cell
        self.part = part.steps[index] if index < len(part.steps) else None
        self.ends = index == max(cell.step_count - 1, 0)
        self.hidden, self.size = cell.config.hidden, cell.element_bytes

    def all(self, layers: range | None) -> Iterator[Transition]:
        cell, place = self.cell, self.place
        stage, held = cell.stage_layers(place.pp), len(self.step.held(place))
        if layers is None and cell.target == "prefill":
            if place.pp and held:
                yield Transition("from the stage before", "send_recv", "pp", None, held, self.hidden, held * self.hidden * self.size)
            elif not place.pp and self.part is not None:
                yield from self._after("embedding", spans_of(cell.layout, VOCABULARY), self.step)
        for layer in stage:
            if layers is None or layer in layers:
                yield from self._layer(layer)
        if layers is None and cell.target == "prefill" and place.pp == cell.layout.pp - 1 and self.ends:
            yield from self._head()

    def _layer(self, layer: int) -> Iterator[Transition]:
        name, spans = f"layer {layer}", spans_of(self.cell.layout, ATTENTION)
        if self.part is not None and self.cell.target != "attention":
            yield from self._before(f"{name}, before attention", spans, self.step, self.cell.low_values)
        if self.part is not None:
            for (axis, operation), (calls, received) in _strategy_traffic(self.part, self.place).counts.items():
                yield Transition(f"{name}, attention ({self.part.strategy})", operation, axis, None, None, None, received, calls)
        if self.part is not None and self.cell.target != "attention":
            yield from self._after(f"{name}, after attention", spans, self.step)
        if self.cell.target != "attention":
            yield from self._experts(name) if self.cell.config.is_sparse(layer) else self._dense(name, DENSE_MLP)

    def _dense(self, name: str, weights: Axes) -> Iterator[Transition]:
        spans = spans_of(self.cell.layout, weights)
        yield from self._before(f"{name}, before feed-forward", spans, self.step)
        yield from self._after(f"{name}, after feed-forward", spans, self.step)

    def _experts(self, name: str) -> Iterator[Transition]:
        cell, layout, place = self.cell, self.cell.layout, self.place
        experts = cell.config.experts
        assert experts is not None
        unit = unit_of(layout, place, way_to_experts(layout, cell.dispatch))
        inside = feed_forward.common_spans(cell, self.step, unit)
        step = TokenRows(self.step.rows, self.step.replicated) if inside else self.step
        shared, routed = (feed_forward.without(spans, inside) for spans in (spans_of(layout, DENSE_MLP), unit.spans))
        yield from self._before(f"{name}, before experts", inside, self.step)
        if experts.shared:
            yield from self._before(f"{name}, before shared experts", shared, step)
            yield from self._after(f"{name}, after shared experts", shared, step, last=False)
        yield from self._before(f"{name}, before routed experts", routed, step)
        if unit.alltoall:
            counts = (layout.ep - 1) * experts.count // layout.ep * feed_forward.INDEX_BYTES
            asked = unit_rows(unit, place, self.step) * experts.top_k
            travelled = feed_forward.expected_rows(cell, self.step, place) * self.hidden * self.size
            yield Transition(f"{name}, how many rows each expert gets", "all_to_all", "ep", None, None, None, counts)
            yield Transition(f"{name}, to experts and back, about", "all_to_all", "ep", asked, asked, self.hidden, travelled, 2)
        yield from self._after(f"{name}, after routed experts", routed, step, last=False)
        mine = self.step.attended(place)
        if mine and unit.share.size > 1 and unit.ranks == 1 and not experts.shared:
            share = len(unit.rows(mine))
            yield Transition(f"{name}, after experts", "all_gather", "tp", share, mine, self.hidden, (mine - share) * self.hidden * self.size)
        elif mine and layout.tp > 1 and self.step.tp == 1:
            yield self._all_reduce(f"{name}, after experts", "tp", layout.tp, mine, self.hidden * self.size)
        yield from self._after(f"{name}, after experts", inside, self.step)

    def _head(self) -> Iterator[Transition]:
        cell, place = self.cell, self.place
        part = cell.parts[place.dp]
        batch, row = len(part.sequences), self.hidden * self.size
        if not batch:
            return
        if cell.layout.cp > 1 and not part.cell.steps[-1].split.replicated:
            yield self._all_reduce("last token of each sequence", "cp", cell.layout.cp, batch, row)
        if cell.layout.sp:
            yield self._all_reduce("last token of each sequence", "tp", cell.layout.tp, batch, row)
        if cell.layout.tp > 1:
            yield Transition("first token", "all_gather", "tp", batch, batch * cell.layout.tp, 4, (cell.layout.tp - 1) * batch * 4 * 8)

    def _before(self, where: str, spans: Spans, step: TokenRows, low: int = 0) -> Iterator[Transition]:
        values = low or self.hidden
        for gather in self._exchange(spans, step).gathers:
            own, whole = gather.rows[getattr(self.place, gather.axis) % len(gather.rows)], sum(gather.rows)
            yield Transition(where, "all_gather", gather.axis, own, whole, values, (whole - own) * values * self.size)

    def _after(self, where: str, spans: Spans, step: TokenRows, *, last: bool = True) -> Iterator[Transition]:
        """Scattered sums, and sums; without the `last` one, over tp, which routed and shared experts have in common."""
        plan, row = self._exchange(spans, step), self.hidden * self.size
        for gather in reversed(plan.gathers):
            own = gather.rows[getattr(self.place, gather.axis) % len(gather.rows)]
            yield Transition(where, "reduce_scatter", gather.axis, sum(gather.rows), own, self.hidden, own * (len(gather.rows) - 1) * row)
        for axis, size in plan.sums if step.attended(self.place) else ():
            if last or axis != "tp":
                yield self._all_reduce(where, axis, size, step.attended(self.place), row)

    def _all_reduce(self, where: str, axis: str, size: int, rows: int, row: int) -> Transition:
        return Transition(where, "all_reduce", axis, rows, rows, self.hidden, 2 * rows * row * (size - 1) // size)

    def _exchange(self, spans: Spans, step: TokenRows) -> Exchange:
        return exchange_over(self.place, step, spans)


def _strategy_traffic(step: Cell, place: Coordinates) -> Traffic:
    return STRATEGIES[step.strategy].traffic(step, place.cp)
