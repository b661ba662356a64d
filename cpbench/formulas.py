"""Closed forms for a whole cell: operations, wire bytes, score pairs and the peak of live tensors.

The formulas of a strategy stand in its file; this module adds what the decoder around it costs. Pure numbers:
nothing is run and torch is not imported. Tests hold every one of them against what is counted or measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from cpbench.cell import Cell
from cpbench.distributed.traffic import Traffic
from cpbench.strategies import STRATEGIES
from cpbench.strategies.base import row_values


def score_pairs(cell: Cell, rank: int) -> int:
    """Score pairs of one layer on a global rank, summed over its query heads and the steps of a pass."""
    return sum(STRATEGIES[step.strategy].score_pairs(step, cell.layout.coordinates(rank)["cp"]) for step in cell.steps)


def new_rows(cell: Cell, rank: int) -> int:
    """New tokens that a global rank holds, over all steps."""
    return sum(step.split.rows(cell.layout.coordinates(rank)["cp"]) for step in cell.steps)


def flops_of_rank(cell: Cell, rank: int) -> int:
    """Floating-point operations of one pass on a global rank: two per multiply-add, no masked score counted."""
    config, rows = cell.config, new_rows(cell, rank)
    attention = 4 * config.head_dim * score_pairs(cell, rank)
    if cell.target == "attention":
        return attention
    projections = 2 * rows * config.hidden * config.head_dim * 2 * (cell.heads + cell.kv_heads)
    mlp = 6 * rows * config.hidden * config.intermediate // cell.layout.tp
    layers = (attention + projections + mlp) * cell.layers
    head = 2 * len(cell.lengths) * config.hidden * config.vocab // cell.layout.tp
    return layers + (head if cell.target == "prefill" else 0)


def flops(cell: Cell) -> int:
    """Floating-point operations of one pass on all ranks together: what `flops_of_rank` sums up to, without a plan per rank.

    Every score pair of a head is computed on one rank, by all strategies; where context parallelism is off, on each.
    """
    config, layout = cell.config, cell.layout
    pairs = sum(n * prefix + n * (n + 1) // 2 for n, prefix in zip(cell.lengths, cell.prefixes, strict=True))
    attention = 4 * config.head_dim * pairs * cell.heads * (layout.cp if cell.cp_off else 1)
    if cell.target == "attention":
        return attention * layout.tp
    rows = cell.tokens * (layout.cp if cell.cp_off or cell.partition == "replicated" else 1)
    projections = 2 * rows * config.hidden * config.head_dim * 2 * (cell.heads + cell.kv_heads)
    mlp = 6 * rows * config.hidden * config.intermediate // layout.tp
    head = 2 * len(cell.lengths) * config.hidden * config.vocab // layout.tp if cell.target == "prefill" else 0
    return layout.tp * (cell.layers * (attention + projections + mlp) + layout.cp * head)


def traffic(cell: Cell, rank: int) -> Traffic:
    """What a global rank receives in one pass."""
    total = Traffic()
    for step in cell.steps:
        total += _traffic_of_step(step, rank)
    layout, config = cell.layout, cell.config
    if cell.target == "prefill":
        batch = len(cell.lengths)
        if layout.cp > 1 and not cell.steps[-1].split.replicated:
            total.add("cp", "all_reduce", 2 * (batch * config.hidden * cell.element_bytes) * (layout.cp - 1) // layout.cp)
        if layout.tp > 1:
            total.add("tp", "all_gather", (layout.tp - 1) * batch * 4 * 8)  # two values and two indices in fp64
    return total


def _traffic_of_step(step: Cell, rank: int) -> Traffic:
    """The layers and the embedding of one step."""
    cp_rank, layout = step.layout.coordinates(rank)["cp"], step.layout
    strategy = STRATEGIES[step.strategy].traffic(step, cp_rank)
    if step.target == "attention":
        return strategy
    total = strategy.times(step.layers)
    if layout.tp > 1:
        partial = 2 * (step.split.rows(cp_rank) * step.config.hidden * step.element_bytes) * (layout.tp - 1) // layout.tp
        reductions = 2 * step.layers + (1 if step.target == "prefill" else 0)
        total.add("tp", "all_reduce", partial * reductions, reductions)
    return total


def live_bytes(cell: Cell, rank: int, steps: Iterable[Cell] = ()) -> int:
    """Peak of live tensors on a global rank: weights, kept K/V, reused buffers, and the largest moment of a layer in any step.

    With `steps`, only these of the cell's are looked at: an estimate where there are hundreds.
    """
    cp_rank, config, size = cell.layout.coordinates(rank)["cp"], cell.config, cell.element_bytes
    costs = [_step_bytes(step, cp_rank) for step in tuple(steps) or cell.steps]
    layers = 1 if cell.target == "attention" or cell.kv_cache == "drop" else cell.layers
    kept = pool_bytes(cell, cp_rank) if cell.paged else max(cost.kept for cost in costs)
    buffers: int = sum(max(sizes) for sizes in zip(*(cost.buffers for cost in costs), strict=True))
    fixed = kept * layers + buffers + max(cost.moment for cost in costs)
    rows = new_rows(cell, rank)
    if cell.target == "attention":  # the inputs of all steps are made once
        inputs = rows * cell.heads * config.head_dim + (rows * row_values(cell) if len(cell.steps) > 1 else 0)
        return fixed + inputs * size
    hidden = rows if cell.target == "layer" else max(step.split.rows(cp_rank) for step in cell.steps)
    angles = max(step.split.rows(cp_rank) for step in cell.steps) * config.head_dim * 4  # cos and sin in fp32, half a head each
    return fixed + weights_bytes(cell) + hidden * config.hidden * size + angles


@dataclass(frozen=True)
class _StepBytes:
    """Kept by each layer where nothing is paged, buffers that all layers reuse, and what is alive at the largest moment of a layer."""

    kept: int
    buffers: tuple[int, ...]
    moment: int


def _step_bytes(step: Cell, cp_rank: int) -> _StepBytes:
    strategy, config, size = STRATEGIES[step.strategy], step.config, step.element_bytes
    extra, n = strategy.memory(step, cp_rank), step.split.rows(cp_rank)
    local, row = strategy.keeps_local_rows, row_values(step) * size
    cached = sum(block.rows for block in strategy.cached(step, cp_rank)) if local else 0
    kept = extra.new_rows + (n * row if local else 0)
    buffers: tuple[int, ...] = (extra.buffers, extra.merge, 0 if local else n * row)
    attend = extra.transient
    if step.paged:
        kept, buffers = 0, (extra.buffers, extra.merge, (cached + n) * row, extra.new_rows)
        if step.kv_cache == "keep":  # the rows on their way into pages
            stored = sum(block.rows for block, _ in strategy.stored(step, cp_rank)) * cache_row_bytes(step, cp_rank)
            attend = max(attend, stored)
    if step.target == "attention":
        return _StepBytes(kept, buffers, attend)
    q, residual = n * step.heads * config.head_dim * size, n * config.hidden * size
    project = residual + q + n * row  # normed rows and packed q, k, v
    rotate = q + n * row + q
    feed_forward = residual + 2 * n * config.intermediate // step.layout.tp * size
    return _StepBytes(kept, buffers, max(project, rotate, q + attend, q + residual, feed_forward))


def cached_tokens(cell: Cell, cp_rank: int) -> list[int]:
    """Tokens of each sequence that a context-parallel rank has in pages when a pass is over."""
    strategy, last = STRATEGIES[cell.steps[0].strategy], cell.steps[-1]
    counts = [0] * len(cell.lengths)
    stored = [block for block, _ in strategy.stored(last, cp_rank)] if cell.kv_cache == "keep" else []
    for block in [*strategy.cached(last, cp_rank), *stored]:
        counts[block.sequence] += block.rows
    return counts


def cache_row_bytes(cell: Cell, cp_rank: int) -> int:
    """K and V of one token in the cache of one layer."""
    strategy = STRATEGIES[cell.steps[0].strategy]
    heads = sum(len(lane) for lane in strategy.cache_heads(cell.steps[0], cp_rank))
    return 2 * heads * cell.config.head_dim * cell.element_bytes


def cached_pages(cell: Cell, cp_rank: int) -> int:
    """Pages that a context-parallel rank needs for one layer: a page holds tokens of one sequence only."""
    return sum(-(-tokens // cell.tokens_per_page) for tokens in cached_tokens(cell, cp_rank))


def pool_bytes(cell: Cell, cp_rank: int) -> int:
    """All pages of one layer on a context-parallel rank."""
    size = cell.tokens_per_page
    pages = max(cached_pages(cell, cp_rank), -(-(cell.cache_tokens or 0) // size))
    return pages * size * cache_row_bytes(cell, cp_rank)


def weights_bytes(cell: Cell) -> int:
    """Parameters of one rank in bytes: layers, and for prefill the embedding and head shards."""
    config, tp = cell.config, cell.layout.tp
    attention = config.hidden * config.head_dim * 2 * (cell.heads + cell.kv_heads)
    bias = config.head_dim * (cell.heads + 2 * cell.kv_heads) if config.qkv_bias else 0
    norms = 2 * config.hidden + (2 * config.head_dim if config.qk_norm else 0)
    layer = attention + bias + norms + 3 * config.hidden * config.intermediate // tp
    ends = config.hidden * (1 + config.vocab // tp * (1 if config.tied_embeddings else 2)) if cell.target == "prefill" else 0
    return (layer * cell.layers + ends) * cell.element_bytes
