"""What must be gathered, scattered or reduced between the blocks of a decoder layer. Models call this and hold no collective.

A block says over which axes its weights are cut. `incoming` brings the tokens that such a block must see, `complete` sums its partial
results and returns each rank its own rows; which collectives these are is decided in sharding.py. A block gets an `Incoming`, which can be
used once, and returns a `Partial`, which can be completed once and nothing else, so that no sum is left out or done twice. Experts have
`enter_experts`, `gather_unit` and `combine_unit` for the same, and `dispatch` for tokens that travel to them. Vocabulary shards, the last
token of a sequence and the first generated one are here too. Attention across ranks is not here: that is the strategies' part, and hidden
states go from stage to stage in pipeline.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from cpbench.distributed.collectives import Group
from cpbench.distributed.deterministic import tree_all_reduce, tree_reduce_scatter
from cpbench.distributed.mesh import Groups
from cpbench.models.linear import Projection, Weight, linear, plain
from cpbench.models.router import Routing
from cpbench.partition import cut
from cpbench.sharding import Axes, Exchange, Gather, Spans, TokenRows, Unit, common_spans, exchange_over, spans_of, without

Products = Sequence[Projection]
Together = Callable[[Tensor, Products], tuple[Tensor, ...]]  # products of the rows of all ranks, while these come together


class Incoming:
    """The normed input of a block on the rows that this rank holds. It is used once, so that nothing keeps it alive.

    A block says which products of the rows it needs, and by what kind of weights; how the rows that it must see get together is decided here.
    """

    def __init__(self, x_nM: Tensor, gather: Callable[[Tensor], Tensor], gathers_low: bool = False, together: Together | None = None) -> None:
        self._x_nM: Tensor | None = x_nM
        self._gather, self._gathers_low, self._together = gather, gathers_low, together

    def cut(self, *products: Projection) -> tuple[Tensor, ...]:
        """Products, by weights that are cut over ranks, of all rows that the block must see."""
        return self._together(self._take(), products) if self._together else _products(self._gather(self._take()), products)

    def whole(self, *products: Projection) -> tuple[Tensor, ...]:
        """The same by weights that every rank has whole: rows may as well be gathered behind them, where they are narrower."""
        if not self._gathers_low:
            return self.cut(*products)
        low = _products(self._take(), products)
        widths = [part.shape[1] for part in low]
        return tuple(self._gather(torch.cat(low, 1)).split_with_sizes(widths, 1))

    def _take(self) -> Tensor:
        x_nM, self._x_nM = self._x_nM, None
        if x_nM is None:
            raise TypeError("the input of a block is used once")
        return x_nM


class Partial:
    """What a block computed with its part of the weights, which are cut over the axes `weights`: to be summed over them, here and once.

    `last` is the weight of the last product of the block, which is still to do on the rows.
    """

    def __init__(self, rows_nX: Tensor, weights: Axes, last: Weight | None = None) -> None:
        self._rows_nX: Tensor | None = rows_nX
        self.weights, self.last = weights, last

    def take(self) -> Tensor:
        """The rows that `last` is to be applied to. Raises TypeError the second time."""
        rows_nX, self._rows_nX = self._rows_nX, None
        if rows_nX is None:
            raise TypeError("these partial sums are complete already")
        return rows_nX

    def values(self) -> Tensor:
        """The partial sums [n, M]."""
        return self.take() if self.last is None else linear(self.take(), self.last)


def _products(x_nM: Tensor, products: Products) -> tuple[Tensor, ...]:
    return tuple(product(x_nM) for product in products)


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

    `unit` and `routing` are for models with experts: the ranks that see the same tokens there, and what their routers need. With `chunks`, rows
    that are cut over tensor-parallel ranks come together, and are summed, in so many pieces, each while another is computed; with `gathers_low`
    they come together behind projections that every rank has whole; with `fused` inside of the products themselves. `deterministic`: sums go in a tree.
    """

    def __init__(
        self,
        groups: Groups,
        rows: TokenRows,
        unit: Unit | None = None,
        routing: Routing | None = None,
        chunks: int = 1,
        gathers_low: bool = False,
        fused: bool = False,
        deterministic: bool = False,
    ) -> None:
        self._groups, self._rows, self._chunks, self._gathers_low, self._fused = groups, rows, chunks, gathers_low, fused
        self.deterministic = deterministic
        self._tp, self._cp = groups.tp, groups.cp
        self._unit, self.routing = unit, routing
        self._plans: dict[Spans, Exchange] = {}

    def incoming(self, x_nM: Tensor, weights: Axes) -> Incoming:
        """The input of a block whose weights are cut over the axes `weights`: its rows, and those of other ranks where an axis cuts both."""
        spans = spans_of(self._groups.layout, weights)
        together: Together | None = None
        if gather := self._overlapped(spans):
            together = self._inside_products if self._fused else partial(self._piecewise, gather)
        return Incoming(x_nM, partial(self._gathered, spans=spans), self._gathers_low and self._rows.tp > 1, together)

    def complete(self, partial: Partial) -> Tensor:
        """Sum the partial results of a block over the axes that cut its weights. Returns this rank's rows; in place where nothing was gathered."""
        if not isinstance(partial, Partial):
            raise TypeError(f"a {type(partial).__name__} is complete already: only partial sums are summed")
        spans = spans_of(self._groups.layout, partial.weights)
        gather = self._overlapped(spans)
        if gather and partial.last is not None:
            if self._fused:
                return self._tp.product_scatter(partial.take(), plain(partial.last))
            return self._tp.reduce_scatter_pieces(partial.take(), Projection(partial.last), gather.rows, self._chunks)
        return self._sum(self._scattered(partial.values(), spans), self._exchange(spans).sums)

    def _overlapped(self, spans: Spans) -> Gather | None:
        """The only gather before a block, where it is one over tp and is overlapped with products; their sum is scattered the same way."""
        gathers = self._exchange(spans).gathers
        return gathers[0] if (self._chunks > 1 or self._fused) and [gather.axis for gather in gathers] == ["tp"] else None

    def _inside_products(self, x_nM: Tensor, products: Products) -> tuple[Tensor, ...]:
        """Products of the rows of all ranks, each rank's while those of the next one come."""
        outs = self._tp.gather_products(x_nM, [plain(product.weight) for product in products])
        return tuple(product.behind(out) for product, out in zip(products, outs, strict=True))

    def _piecewise(self, gather: Gather, x_nM: Tensor, products: Products) -> tuple[Tensor, ...]:
        """Products of the rows of all ranks, a piece at a time while the next one is on its way."""
        results: tuple[Tensor, ...] = ()
        for rows_pM, places in self._tp.all_gather_pieces(x_nM, gather.rows, self._chunks):
            parts = _products(rows_pM, products)
            results = results or tuple(part.new_empty(sum(gather.rows), part.shape[1]) for part in parts)
            for whole, part in zip(results, parts, strict=True):
                for here, there in places:
                    whole[there] = part[here]
            del rows_pM, parts, part  # before the next piece but one is asked for
        return results

    @property
    def unit(self) -> Unit:
        assert self._unit is not None, "the model has no experts"
        return self._unit

    @cached_property
    def _common(self) -> Spans:
        """What is gathered before a block of experts and scattered after it, once for routed and shared experts together."""
        return common_spans(self._groups.layout, self._rows, self.unit)

    def enter_experts(self, x_nM: Tensor) -> Tensor:
        """The rows that routed and shared experts both start from: those of the whole tensor-parallel group where both must see them."""
        return self._gathered(x_nM, self._common)

    def incoming_shared(self, x_nM: Tensor, weights: Axes) -> Incoming:
        """As `incoming`, of what `enter_experts` returned."""
        return Incoming(x_nM, partial(self._gathered, spans=without(spans_of(self._groups.layout, weights), self._common)))

    def scatter_shared(self, partial: Partial) -> Tensor:
        """As `complete` of what shared experts computed, without the last sum, over tp, which `combine_unit` does for all experts together.

        In a tree, in which routed experts have no place, it is done here.
        """
        spans = without(spans_of(self._groups.layout, partial.weights), self._common)
        sums = self._exchange(spans).sums
        return self._sum(self._scattered(partial.values(), spans), sums if self.deterministic else [span for span in sums if span[0] != "tp"])

    def gather_unit(self, x_nM: Tensor) -> Tensor:
        """The rows that the experts of this rank's unit are asked for: those that its ranks must see together, or a share of its own."""
        seen_nM = self._gathered(x_nM, without(self.unit.spans, self._common))
        rows = self.unit.rows(len(seen_nM))
        return seen_nM[rows.start : rows.stop]

    def combine_unit(self, partial_uM: Tensor, rows: int, shared_nM: Tensor | None) -> Tensor:
        """Each rank's own rows from the unit's partial sums, with those of shared experts (`scatter_shared`) added; may reuse either.

        `rows`: how many `enter_experts` returned. A unit that took a share of them has zeros to add to the others. One of a single rank has no
        partial sums: its share is whole.
        """
        unit, spans = self.unit, without(self.unit.spans, self._common)
        sums = self._exchange(spans).sums
        partial_uM = self._sum(self._scattered(partial_uM, spans), [span for span in sums if span[0] != "tp"])
        if unit.share.size > 1 and unit.ranks == 1 and (shared_nM is None or self.deterministic):
            out_nM = partial_uM.new_empty(rows, partial_uM.shape[1])
            if rows:
                self._tp.all_gather_rows(out_nM, partial_uM.contiguous(), [last - first for first, last in cut(rows, self._tp.size)]).wait()
            return out_nM if shared_nM is None else shared_nM.add_(out_nM)
        if unit.share.size > 1:
            mine = unit.rows(rows)
            out_nM = partial_uM.new_zeros(rows, partial_uM.shape[1]) if shared_nM is None else shared_nM
            out_nM[mine.start : mine.stop] += partial_uM
        else:
            out_nM = partial_uM if shared_nM is None else partial_uM.add_(shared_nM)
        out_nM = self._sum(out_nM, [span for span in sums if span[0] == "tp"])
        return self._scattered(out_nM, self._common)

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
            partial_nM = tree_reduce_scatter(group, partial_nM, step.rows) if self.deterministic else group.reduce_scatter_rows(partial_nM, step.rows)
        return partial_nM

    def _sum(self, partial_nM: Tensor, sums: Iterable[tuple[str, int]]) -> Tensor:
        """In place. Ranks that a sum is over have the same rows, so without rows none of them calls."""
        for axis, size in sums if len(partial_nM) else ():
            group = self._groups.along(axis, size)
            if self.deterministic:
                tree_all_reduce(group, partial_nM)
            else:
                group.all_reduce(partial_nM)
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

    def together(self, x_nM: Tensor, weights: Axes) -> Tensor:
        """The rows that a product by weights cut over the axes `weights` must see: this rank's, and those of others where an axis cuts both."""
        return self._gathered(x_nM, spans_of(self._groups.layout, weights))

    def whole_logits(self, logits_nV: Tensor) -> Tensor:
        """Logits [n, V] on every tensor-parallel rank, from the vocabulary shard [n, V / tp] that each has of the same rows."""
        if self._tp.size == 1:
            return logits_nV
        shards = logits_nV.new_empty(self._tp.size * len(logits_nV), logits_nV.shape[1])
        self._tp.all_gather(shards, logits_nV.contiguous()).wait()
        return torch.cat(shards.chunk(self._tp.size), 1)

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
        tokens, margins = list[int](), list[float]()
        if everyone.is_meta:  # shapes alone: there are no logits to read
            return tokens, margins
        for shards in everyone.view(self._tp.size, batch, 4).transpose(0, 1).tolist():
            candidates = sorted(((-value, column) for row in shards for value, column in (row[:2], row[2:])))
            tokens.append(int(candidates[0][1]))
            margins.append(candidates[1][0] - candidates[0][0])
        return tokens, margins
