"""Closed forms for a whole cell: operations, wire bytes, score pairs and the peak of live tensors.

The formulas of a strategy stand in its file; this module adds what the decoder around it costs. Pure numbers:
nothing is run and torch is not imported. Tests hold every one of them against what is counted or measured.
"""

from __future__ import annotations

from cpbench.cell import Cell
from cpbench.distributed.traffic import Traffic
from cpbench.strategies import STRATEGIES


def score_pairs(cell: Cell, rank: int) -> int:
    """Score pairs of one layer on a global rank, summed over its query heads."""
    return STRATEGIES[cell.strategy].score_pairs(cell, cell.layout.coordinates(rank)["cp"])


def flops_of_rank(cell: Cell, rank: int) -> int:
    """Floating-point operations of one pass on a global rank: two per multiply-add, no masked score counted."""
    config, rows = cell.config, cell.split.rows(cell.layout.coordinates(rank)["cp"])
    attention = 4 * config.head_dim * score_pairs(cell, rank)
    if cell.target == "attention":
        return attention
    projections = 2 * rows * config.hidden * config.head_dim * 2 * (cell.heads + cell.kv_heads)
    mlp = 6 * rows * config.hidden * config.intermediate // cell.layout.tp
    layers = (attention + projections + mlp) * cell.layers
    head = 2 * len(cell.lengths) * config.hidden * config.vocab // cell.layout.tp
    return layers + (head if cell.target == "prefill" else 0)


def flops(cell: Cell) -> int:
    """Floating-point operations of one pass on all ranks together."""
    return sum(flops_of_rank(cell, rank) for rank in range(cell.world_size))


def traffic(cell: Cell, rank: int) -> Traffic:
    """What a global rank receives in one pass."""
    layout, config = cell.layout, cell.config
    strategy = STRATEGIES[cell.strategy].traffic(cell, layout.coordinates(rank)["cp"])
    if cell.target == "attention":
        return strategy
    rows = cell.split.rows(layout.coordinates(rank)["cp"])
    total = strategy.times(cell.layers)
    if layout.tp > 1:
        partial = 2 * (rows * config.hidden * cell.element_bytes) * (layout.tp - 1) // layout.tp
        reductions = 2 * cell.layers + (1 if cell.target == "prefill" else 0)
        total.add("tp", "all_reduce", partial * reductions, reductions)
    if cell.target == "prefill":
        batch = len(cell.lengths)
        if layout.cp > 1:
            total.add("cp", "all_reduce", 2 * (batch * config.hidden * cell.element_bytes) * (layout.cp - 1) // layout.cp)
        if layout.tp > 1:
            total.add("tp", "all_gather", (layout.tp - 1) * batch * 4 * 8)  # two values and two indices in fp64
    return total


def live_bytes(cell: Cell, rank: int) -> int:
    """Peak of live tensors on a global rank: weights, kept K/V, reused buffers, and the largest moment of a layer."""
    cp_rank = cell.layout.coordinates(rank)["cp"]
    strategy = STRATEGIES[cell.strategy]
    extra = strategy.memory(cell, cp_rank)
    config, size, n = cell.config, cell.element_bytes, cell.split.rows(cp_rank)
    heads, kv_heads, dim = cell.heads, cell.kv_heads, config.head_dim
    q, rows = n * heads * dim * size, n * 2 * kv_heads * dim * size
    held_layers = 1 if cell.target == "attention" or cell.kv_cache == "drop" else cell.layers
    kept = (extra.cache + (rows if strategy.keeps_local_rows else 0)) * held_layers
    fixed = kept + extra.buffers + (0 if strategy.keeps_local_rows else rows)
    attend = q + extra.transient
    if cell.target == "attention":
        return fixed + attend
    residual = n * config.hidden * size
    fixed += weights_bytes(cell) + residual + n * dim * 4  # cos and sin in fp32, half a head each
    project = residual + q + rows  # normed rows and packed q, k, v
    rotate = q + rows + q
    output = q + residual
    feed_forward = residual + 2 * n * config.intermediate // cell.layout.tp * size
    return fixed + max(project, rotate, attend, output, feed_forward)


def weights_bytes(cell: Cell) -> int:
    """Parameters of one rank in bytes: layers, and for prefill the embedding and head shards."""
    config, tp = cell.config, cell.layout.tp
    attention = config.hidden * config.head_dim * 2 * (cell.heads + cell.kv_heads)
    bias = config.head_dim * (cell.heads + 2 * cell.kv_heads) if config.qkv_bias else 0
    norms = 2 * config.hidden + (2 * config.head_dim if config.qk_norm else 0)
    layer = attention + bias + norms + 3 * config.hidden * config.intermediate // tp
    ends = config.hidden * (1 + config.vocab // tp * (1 if config.tied_embeddings else 2)) if cell.target == "prefill" else 0
    return (layer * cell.layers + ends) * cell.element_bytes
