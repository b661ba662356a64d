"""Which layouts a model and a batch fit on: why a cell's layout does not fit, and the nearest one that does.

An axis cannot have more ranks than there is to divide: layers over pipeline stages, heads and columns over tensor-parallel ranks, new
tokens over context-parallel ones, experts and their columns over expert axes. Attention-DP groups without a sequence are idle, which is no
error. What one strategy needs beside this is in its `check`, and what the sizes of a layout must multiply to in layout.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from math import log2

from cpbench.batch import spread
from cpbench.cell import Cell
from cpbench.experts import ALLTOALL
from cpbench.layout import MAX_RANKS, Layout, divisors
from cpbench.models.config import ModelConfig
from cpbench.sharding import dispatch_of, unit_reach
from cpbench.strategies import STRATEGIES


def has_experts(config: ModelConfig) -> bool:
    """Whether a model has experts that a layout can divide."""
    return config.experts is not None


def layout_reason(cell: Cell) -> str | None:
    """Why the model or the batch does not divide as the layout says, with the nearest layout on which they do; None where they do."""
    layout, config = cell.layout, cell.config
    if layout.sp and cell.target == "attention":
        return f"sp cuts rows between blocks, and attention alone has none; the nearest valid layout is {replace(layout, sp=False)}"
    if cell.sp_gather == "latent" and (config.latent is None or config.latent.q_rank is None):
        return f"{config.name} has no low-rank projections to gather rows behind; the nearest valid value is sp_gather=hidden"
    if cell.sp_fused and (what := _fused_reason(cell)):
        return f"sp_fused {what}; the nearest valid value is sp_fused=false"
    if cell.dispatch == ALLTOALL and cell.has_experts and layout.ep == 1:
        return "dispatch=alltoall sends rows to experts on other ranks, and ep=1 has none; the nearest valid value is dispatch=gather"
    what = undivided(config, cell.target, layout.dp, layout.tp) or (experts_undivided(config, layout, cell.dispatch) if cell.has_experts else None)
    if what is None and layout.pp > cell.layers:
        layers = f"layer of {config.name} that runs" if cell.layers == 1 else f"layers of {config.name} that run"
        what = f"pp={layout.pp} is above the {cell.layers} {layers}"
    if what is None and layout.cp > 1 and layout.cp > (tokens := most_tokens(cell.lengths, layout.dp)):
        new = "new token" if tokens == 1 else "new tokens"
        what = f"cp={layout.cp} is above the {tokens} {new} of {'the batch' if layout.dp == 1 else 'an attention-DP group'}"
    return what and f"{what}; the nearest valid layout is {_nearest(cell)}"


def _fused_reason(cell: Cell) -> str | None:
    """Why gathers and scattered sums cannot be fused with products; None if they can."""
    if cell.device != "cuda":
        return f"needs CUDA, which {cell.device} is not"
    if cell.quant != "none":
        return f"is for weights that are not quantised, not for quant={cell.quant}"
    if cell.sp_chunks > 1 or cell.sp_gather == "latent":
        return f"gathers hidden states, a rank's at a time: not with {f'sp_chunks={cell.sp_chunks}' if cell.sp_chunks > 1 else 'sp_gather=latent'}"
    tp = cell.layout.tp
    for rows in (count for step in cell.token_rows for group in step.rows for count in group):
        if not rows or rows % tp:
            return f"needs equally many rows on each of the {tp} ranks of tp, and {rows:,} do not divide"
    return None


def strategy_reason(cell: Cell) -> str | None:
    """Why the strategy cannot run what one of the attention-DP groups has to do; None if it can."""
    strategy = STRATEGIES[cell.strategy]
    if cell.layout.dp == 1:
        return strategy.check(cell)
    group = replace(cell.layout, pp=1, dp=1, moe_dp=1, ep=1, moe_tp=0)
    batches = {_batch_of(cell, sequences) for sequences in spread(cell.lengths, cell.layout.dp) if sequences}
    return next((reason for one in sorted(batches) if (reason := strategy.check(replace(cell, layout=group, lengths=one[0], prefixes=one[1])))), None)


def _batch_of(cell: Cell, sequences: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Lengths and prefixes of some sequences."""
    return tuple(cell.lengths[s] for s in sequences), tuple(cell.prefixes[s] for s in sequences)


def undivided(config: ModelConfig, target: str, dp: int, tp: int) -> str | None:
    """What of the model does not divide over so many ranks; None if all does. Attention-DP groups share one copy of the feed-forward block."""
    what, over = None, f"tp={tp}"
    if config.heads % tp:
        what = f"{config.heads} query heads"
    elif config.kv_heads % tp and tp % config.kv_heads:
        what = f"{config.kv_heads} kv heads"
    elif target == "prefill" and config.vocab % tp:
        what = f"{config.vocab} vocabulary rows"
    elif target != "attention" and (columns := next((width for width in _widths(config, target) if width % (dp * tp)), None)):
        what, over = f"{columns} FFN columns", " x ".join(f"{name}={size}" for name, size in (("dp", dp), ("tp", tp)) if size > 1)
    return what and f"{what} of {config.name} do not divide over {over}"


def _widths(config: ModelConfig, target: str) -> list[int]:
    """Columns of what is cut as the dense block is: dense layers, and shared experts. A layer alone is a sparse one."""
    shared = [config.experts.shared * config.experts.intermediate] if config.experts and config.experts.shared else []
    return shared if config.experts and (target == "layer" or config.is_sparse(0)) else [config.intermediate, *shared]


def experts_undivided(config: ModelConfig, layout: Layout, dispatch: str | None) -> str | None:
    """What of the experts does not divide over the expert axes, or why rows cannot reach them; None if all does."""
    experts = config.experts
    assert experts is not None
    if experts.count % layout.ep:
        return f"{experts.count} experts of {config.name} do not divide over ep={layout.ep}"
    if experts.intermediate % layout.moe_tp:
        return f"{experts.intermediate} columns of an expert of {config.name} do not divide over /tp={layout.moe_tp}"
    way = dispatch_of(layout, dispatch)
    if unit_reach(layout, way) is None:
        ranks = layout.moe_tp * (1 if way == ALLTOALL else layout.ep)
        return f"{ranks} ranks of {layout} must see the same tokens at the experts, and are no whole attention groups nor a part of one"
    return None


@lru_cache(maxsize=4096)
def most_tokens(lengths: tuple[int, ...], groups: int) -> int:
    """New tokens of the attention-DP group that has most."""
    return max(sum(lengths[sequence] for sequence in sequences) for sequences in spread(lengths, groups))


def _nearest(cell: Cell) -> Layout:
    """The nearest layout that fits. Ranks of stages for which there are no layers divide the tokens, where they can."""
    layout, config, target = cell.layout, cell.config, cell.target
    dp, tp = _nearest_divided(config, target, layout)
    pp, tokens = min(layout.pp, cell.layers), most_tokens(cell.lengths, dp)
    wider = layout.cp * layout.pp // pp
    degrees = [wider] if wider <= tokens and not layout.pp % pp else []
    found = (
        Layout(pp, dp, cp, tp, u, sp=layout.sp and tp > 1) for cp in [*degrees, *range(min(layout.cp, tokens), 0, -1)] for u in _hybrids(layout.ulysses, cp)
    )
    nearest = next(fitting for fitting in found if _runs(cell, fitting))
    return _nearest_experts(cell, nearest) if cell.has_experts else nearest


def _nearest_experts(cell: Cell, layout: Layout) -> Layout:
    """The layout with the nearest expert axes that fit. A copy of all experts on every rank always does."""
    size, asked = layout.stage_size, (cell.layout.moe_dp, cell.layout.ep, cell.layout.moe_tp)
    splits = [(moe_dp, ep, size // moe_dp // ep) for moe_dp in divisors(size) for ep in divisors(size // moe_dp)]
    doublings = {split: [abs(log2(mine / theirs)) for mine, theirs in zip(split, asked, strict=True)] for split in splits}
    splits.sort(key=lambda split: (sum(doublings[split]), doublings[split][1], split))  # of equally near ones that which keeps ep
    dispatch = None if cell.dispatch == ALLTOALL else cell.dispatch
    divided = (replace(layout, moe_dp=moe_dp, ep=ep, moe_tp=moe_tp) for moe_dp, ep, moe_tp in splits)
    return next(fitting for fitting in divided if experts_undivided(cell.config, fitting, dispatch) is None)


def _nearest_divided(config: ModelConfig, target: str, layout: Layout) -> tuple[int, int]:
    """The nearest dp and tp over which the model divides; tp is looked for first, because heads restrict it."""
    room = MAX_RANKS // (layout.pp * layout.cp)
    tp = next(tp for tp in _outwards(layout.tp, min(room // layout.dp, config.heads)) if undivided(config, target, 1, tp) is None)
    return next(dp for dp in _outwards(layout.dp, room // tp) if undivided(config, target, dp, tp) is None), tp


def _outwards(wanted: int, largest: int) -> Iterator[int]:
    """1 to `largest`, those nearest to `wanted` first and the smaller one of two."""
    for distance in range(max(wanted, largest)):
        if 1 <= wanted - distance <= largest:
            yield wanted - distance
        if distance and wanted + distance <= largest:
            yield wanted + distance


def _hybrids(ulysses: int, cp: int) -> list[int]:
    """Ways to divide a hybrid's group, those nearest to `ulysses` first; what is not divided stays so."""
    return sorted(divisors(cp), key=lambda degree: (abs(degree - ulysses), degree)) if ulysses > 1 else [1]


def _runs(cell: Cell, layout: Layout) -> bool:
    """Whether the strategy of a cell can run on a layout that fits. One context-parallel rank needs none, and more than one always have one."""
    return cell.strategy == "none" or layout.cp == 1 or strategy_reason(replace(cell, layout=layout)) is None
