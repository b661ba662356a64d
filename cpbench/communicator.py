"""What must be gathered, scattered or reduced between the blocks of a decoder layer. Models call this and hold no collective.

A block says over which axes its weights are cut. `gather` brings the tokens that such a block must see, `complete` sums its partial
results and returns each rank its own rows; which collectives these are is decided in sharding.py. What a block returns is a `Partial`,
which can be completed and nothing else, so that no sum is left out or done twice. Experts have `enter_experts`, `gather_unit` and
`combine_unit` for the same, and `dispatch` for tokens that travel to them. Vocabulary shards, the last token of a
sequence and the first generated one are here too. Attention across ranks is not here: that is the strategies' part, and hidden states go
from stage to stage in pipeline.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cpbench.distributed.collectives import Group
from cpbench.distributed.mesh import Groups
from cpbench.models.router import Routing
from cpbench.partition import cut
from cpbench.sharding import Axes, Exchange, Spans, TokenRows, Unit, exchange_over, spans_of


@dataclass(frozen=True)
class Partial:
    """What a block computed with its part of the weights, which are cut over the axes `weights`: to be summed over them, here and once."""

    values_nM: Tensor
    weights: Axes


@dataclass(frozen=True)
class Dispatch:
    """How the rows of a step travel between the units of expert-parallel ranks, here sent in the order of their experts.

    `sent` and `received`: rows to and from each rank. `counts` [ranks, experts]: how many of those received are for which expert here.
    """

    group: Group
    sent: list[int]
    received: list[int]
    counts: Tensor

    def to_experts(self, rows_PM: Tensor) -> Tensor:
        """Rows [sent] -> [received], by sender, and of each sender by expert."""
        return self._exchange(rows_PM, self.sent, self.received)

    def back(self, rows_RM: Tensor) -> Tensor:
        """Rows [received] -> [sent], in the order in which they left."""
        return self._exchange(rows_RM, self.received, self.sent)

    def _exchange(self, rows: Tensor, away: list[int], here: list[int]) -> Tensor:
        output = rows.new_empty(sum(here), rows.shape[1])
        self.group.all_to_all(output, rows, here, away).wait()
        return output


class Communicator:
    """The exchanges of one rank in one step of a pass, of whose tokens every rank has `rows`.

    `unit` and `routing` are for models with experts: the ranks that see the same tokens there, and what their routers need.
    """

    def __init__(self, groups: Groups, rows: TokenRows, unit: Unit | None = None, routing: Routing | None = None) -> None:
        self._groups, self._rows = groups, rows
        self._tp, self._cp = groups.tp, groups.cp
        self._unit, self.routing = unit, routing
        self._plans: dict[Spans, Exchange] = {}

    def gather(self, x_nM: Tensor, weights: Axes) -> Tensor:
        """The rows that a block must see whose weights are cut over the axes `weights`: those of other ranks too where an axis cuts both."""
        return self._gathered(x_nM, spans_of(self._groups.layout, weights))

    def complete(self, partial: Partial) -> Tensor:
        """Sum the partial results of a block over the axes that cut its weights. Returns this rank's rows; in place where nothing was gathered."""
        if not isinstance(partial, Partial):
            raise TypeError(f"a {type(partial).__name__} is complete already: only partial sums are summed")
        spans = spans_of(self._groups.layout, partial.weights)
        return self._sum(self._scattered(partial.values_nM, spans), self._exchange(spans).sums)

    @property
    def unit(self) -> Unit:
        assert self._unit is not None, "the model has no experts"
        return self._unit

    @cached_property
    def _inside(self) -> Axes:
        """The axes that are gathered before a block of experts and scattered after it, once for routed and shared experts together."""
        sequence_parallel = self._rows.tp > 1 and dict(self.unit.spans)["tp"] == self._tp.size
        return ("tp",) if sequence_parallel else ()

    def enter_experts(self, x_nM: Tensor) -> Tensor:
        """The rows that routed and shared experts both start from: those of the whole tensor-parallel group where both must see them."""
        return self._gathered(x_nM, tuple((axis, self._groups.layout.size(axis)) for axis in self._inside))

    def gather_shared(self, x_nM: Tensor, weights: Axes) -> Tensor:
        """As `gather`, of what `enter_experts` returned."""
        return self._gathered(x_nM, self._outside(spans_of(self._groups.layout, weights)))

    def scatter_shared(self, partial: Partial) -> Tensor:
        """As `complete` of what shared experts computed, without the last sum, over tp, which `combine_unit` does for all experts together."""
        spans = self._outside(spans_of(self._groups.layout, partial.weights))
        return self._sum(self._scattered(partial.values_nM, spans), [span for span in self._exchange(spans).sums if span[0] != "tp"])

    def gather_unit(self, x_nM: Tensor) -> Tensor:
        """The rows that the experts of this rank's unit are asked for: those that its ranks must see together, or a share of its own."""
        seen_nM = self._gathered(x_nM, self._outside(self.unit.spans))
        rows = self.unit.rows(len(seen_nM))
        return seen_nM[rows.start : rows.stop]

    def combine_unit(self, partial_uM: Tensor, rows: int, shared_nM: Tensor | None) -> Tensor:
        """Each rank's own rows from the unit's partial sums, with those of shared experts (`scatter_shared`) added; may reuse either.

        `rows`: how many `enter_experts` returned. A unit that took a share of them has zeros to add to the others. One of a single rank has no
        partial sums: its share is whole.
        """
        unit, spans = self.unit, self._outside(self.unit.spans)
        sums = self._exchange(spans).sums
        partial_uM = self._sum(self._scattered(partial_uM, spans), [span for span in sums if span[0] != "tp"])
        if unit.share.size > 1 and unit.ranks == 1 and shared_nM is None:
            out_nM = partial_uM.new_empty(rows, partial_uM.shape[1])
            if rows:
                self._tp.all_gather_rows(out_nM, partial_uM.contiguous(), [last - first for first, last in cut(rows, self._tp.size)]).wait()
            return out_nM
        if unit.share.size > 1:
            mine = unit.rows(rows)
            out_nM = partial_uM.new_zeros(rows, partial_uM.shape[1]) if shared_nM is None else shared_nM
            out_nM[mine.start : mine.stop] += partial_uM
        else:
            out_nM = partial_uM if shared_nM is None else partial_uM.add_(shared_nM)
        out_nM = self._sum(out_nM, [span for span in sums if span[0] == "tp"])
        return self._scattered(out_nM, tuple((axis, self._groups.layout.size(axis)) for axis in self._inside))

    def _outside(self, spans: Spans) -> Spans:
        """Without the axes that `enter_experts` gathers over."""
        return tuple(span for span in spans if span[0] not in self._inside)

    def dispatch(self, loads_E: Tensor) -> Dispatch:
        """Tell the other expert-parallel ranks how many rows each of their experts gets from here, and learn what they send."""
        group = self._groups.ep
        here = len(loads_E) // group.size
        counts = torch.empty_like(loads_E)
        group.all_to_all(counts, loads_E, [here] * group.size, [here] * group.size).wait()
        sent, received = torch.stack([loads_E, counts]).view(2, group.size, here).sum(2).tolist()  # waits for the device: it must know sizes
        return Dispatch(group, sent, received, counts.view(group.size, here))

    def _gathered(self, x_nM: Tensor, spans: Spans) -> Tensor:
        for step in self._exchange(spans).gathers:
            gathered = x_nM.new_empty(sum(step.rows), x_nM.shape[1])
            self._groups.along(step.axis, len(step.rows)).all_gather_rows(gathered, x_nM.contiguous(), step.rows).wait()
            x_nM = gathered
        return x_nM

    def _scattered(self, partial_nM: Tensor, spans: Spans) -> Tensor:
        """The way back of what was gathered."""
        for step in reversed(self._exchange(spans).gathers):
            group = self._groups.along(step.axis, len(step.rows))
            mine = partial_nM.new_empty(step.rows[group.rank], partial_nM.shape[1])
            group.reduce_scatter_rows(mine, partial_nM, step.rows)
            partial_nM = mine
        return partial_nM

    def _sum(self, partial_nM: Tensor, sums: Iterable[tuple[str, int]]) -> Tensor:
        """In place. Ranks that a sum is over have the same rows, so without rows none of them calls."""
        for axis, size in sums if len(partial_nM) else ():
            self._groups.along(axis, size).all_reduce(partial_nM)
        return partial_nM

    def _exchange(self, spans: Spans) -> Exchange:
        if spans not in self._plans:
            self._plans[spans] = exchange_over(self._groups.place, self._rows, spans)
        return self._plans[spans]

    def share_last(self, last_BM: Tensor, token_sharded: bool) -> Tensor:
        """The hidden state of each sequence's last token [batch, M] on every rank, from rows that are zero except on the one that holds it.

        Where every context-parallel rank computes every token, all have it.
        """
        if self._rows.tp > 1:
            self._tp.all_reduce(last_BM)  # every other rank adds zeros, which is exact
        if token_sharded:
            self._cp.all_reduce(last_BM)
        return last_BM

    def greedy(self, logits_BV: Tensor, first: int) -> tuple[list[int], list[float]]:
        """Arg-max over the vocabulary shards, and the gap to the runner-up, both from fp32 logits. The lowest index wins a tie.

        `logits_BV` is this rank's shard, `first` the vocabulary index of its first column.
        """
        batch = logits_BV.shape[0]
        logits = logits_BV.float()
        best, index = logits.max(1)
        rest = logits.scatter(1, index[:, None], float("-inf")).max(1)
        mine = torch.stack([best.double(), index.double() + first, rest[0].double(), rest[1].double() + first], 1)
        everyone = mine.new_empty(self._tp.size * batch, 4)
        self._tp.all_gather(everyone, mine.contiguous()).wait()
        tokens, margins = [], []
        for shards in everyone.view(self._tp.size, batch, 4).transpose(0, 1).tolist():
            candidates = sorted(((-value, column) for row in shards for value, column in (row[:2], row[2:])))
            tokens.append(int(candidates[0][1]))
            margins.append(candidates[1][0] - candidates[0][0])
        return tokens, margins
