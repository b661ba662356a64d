"""Closed forms for a whole cell: operations, wire bytes, score pairs and the peak of live tensors.

The formulas of a strategy stand in its file and those of the feed-forward block in feed_forward.py; this module adds what the decoder
around them costs. Pure numbers: nothing is run and torch is not imported. Tests hold every one of them against what is counted or measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cpbench import attention_block, feed_forward, transitions
from cpbench.cell import Cell
from cpbench.distributed.traffic import Traffic
from cpbench.layout import Coordinates
from cpbench.quantisation import saved_bytes
from cpbench.sharding import ATTENTION
from cpbench.strategies import STRATEGIES
from cpbench.strategies.base import row_values

Sent = Sequence[Sequence[Sequence[int]]]  # by rank, by step and sparse layer of its stage: rows that its routers sent to each expert-parallel rank


def score_pairs(cell: Cell, rank: int) -> int:
    """Score pairs of one layer on a global rank, summed over its query heads and the steps of a pass."""
    place = cell.layout.coordinates(rank)
    return sum(attention_block.score_pairs(step, place.cp) for step in cell.parts[place.dp].cell.steps)


def new_rows(cell: Cell, rank: int) -> int:
    """New tokens that a global rank attends with, over all steps."""
    place = cell.layout.coordinates(rank)
    return sum(rows.attended(place) for rows in cell.token_rows)


def held_rows(cell: Cell, rank: int) -> int:
    """New tokens whose rows a global rank holds between blocks, over all steps."""
    place = cell.layout.coordinates(rank)
    return sum(len(rows.held(place)) for rows in cell.token_rows)


def flops_of_rank(cell: Cell, rank: int) -> int:
    """Floating-point operations of one pass on a global rank: two per multiply-add, no masked score counted."""
    config, rows, place = cell.config, new_rows(cell, rank), cell.layout.coordinates(rank)
    part = cell.parts[place.dp].cell
    attention = attention_block.score_flops(cell, score_pairs(cell, rank)) + attention_block.opened_flops_of_rank(part, place.cp)
    attention += sum(attention_block.selection_flops(step, place.cp) for step in part.steps)
    if cell.target == "attention":
        return attention
    projections = attention_block.projection_flops(cell, rows)
    stage = cell.stage_layers(place.pp)
    layers = (attention + projections) * len(stage) + sum(feed_forward.flops(cell, step, place, layer) for step in cell.token_rows for layer in stage)
    head = 2 * len(cell.parts[place.dp].sequences) * config.hidden * config.vocab // cell.layout.tp
    return layers + (head if cell.target == "prefill" and place.pp == cell.layout.pp - 1 else 0)


def flops(cell: Cell) -> int:
    """Floating-point operations of one pass on all ranks together: what `flops_of_rank` sums up to, without a plan per rank.

    Every score pair of a head is computed on one rank, by all strategies; where context parallelism is off, on each. Rows that are opened
    on several ranks are counted once: for estimates.
    """
    return sum(_flops_of_part(part, cell) * groups for part, groups in cell.distinct_parts)


def _flops_of_part(cell: Cell, whole: Cell) -> int:
    config, layout = cell.config, cell.layout
    pairs, scored = _pairs_of_part(cell)
    copies, opened = layout.cp if cell.cp_off else 1, cell.tokens + sum(cell.prefixes)
    attention = attention_block.score_flops(cell, pairs * cell.heads) + attention_block.scoring_flops(cell, scored)
    attention = copies * (attention + attention_block.opening_flops(cell, opened, cell.heads))
    if cell.target == "attention":
        return attention * layout.tp
    held = layout.cp if cell.cp_off or cell.partition == "replicated" else 1
    rows = cell.tokens * held
    projections = attention_block.projection_flops(cell, rows)
    head = 2 * len(cell.lengths) * config.hidden * config.vocab // layout.tp if cell.target == "prefill" else 0
    mlp = sum(count * feed_forward.whole_flops(whole, rows, held, layer) for layer, count in config.kinds(cell.layer_range).items())
    return layout.tp * (cell.layers * (attention + projections) + layout.cp * head) + mlp


def _pairs_of_part(cell: Cell) -> tuple[int, int]:
    """(pairs attended to, pairs scored to select them) of one head over all sequences."""
    top_k = cell.shape.top_k or max((prefix + n for n, prefix in zip(cell.lengths, cell.prefixes, strict=True)), default=0)
    found = [attention_block.selected_of(n, prefix, top_k) for n, prefix in zip(cell.lengths, cell.prefixes, strict=True)]
    return sum(pairs for pairs, _ in found), sum(scored for _, scored in found)


def traffic(cell: Cell, rank: int, sent: Sent | None = None) -> Traffic:
    """What a global rank receives in one pass. Rows that travel to experts are as many as were `sent`, else as if all experts had equal loads."""
    total = Traffic()
    for index in range(cell.step_count):
        total += transitions.received(cell, rank, index, travelled(cell, rank, index, sent))
    return total


def sparse_layers(cell: Cell, place: Coordinates) -> list[int]:
    """The layers of a stage that have experts."""
    return [layer for layer in cell.stage_layers(place.pp) if cell.config.is_sparse(layer)]


def travelled(cell: Cell, rank: int, index: int, sent: Sent | None) -> dict[int, int]:
    """By layer: rows that came to a rank's experts from others in a step, and that came back to it."""
    if sent is None:
        return {}
    place = cell.layout.coordinates(rank)
    layers = sparse_layers(cell, place)
    peers = next(ranks for ranks in cell.layout.groups("ep") if rank in ranks)
    found = {}
    for number, layer in enumerate(layers, index * len(layers)):
        came = sum(sent[peer][number][place.ep] for peer in peers if peer != rank)
        found[layer] = came + sum(rows for ep, rows in enumerate(sent[rank][number]) if ep != place.ep)
    return found


def live_bytes(cell: Cell, rank: int, steps: Iterable[int] = (), pairs: int | None = None) -> int:
    """Peak of live tensors on a global rank: weights, kept K/V, reused buffers, and the largest moment of a layer in any step.

    With `steps`, only those of the cell's are looked at: an estimate where there are hundreds. `pairs`: rows that the experts of the rank compute
    in the layer and step where they are most; None: as if all experts had equal loads.
    """
    place, config, size = cell.layout.coordinates(rank), cell.config, cell.element_bytes
    part, layers = cell.parts[place.dp].cell, cell.stage_layers(place.pp)
    chosen = sorted(steps) or range(cell.step_count)
    costs = [_step_bytes(part.steps[index], place.cp) for index in chosen if index < len(part.steps)] or [_StepBytes(0, (), 0)]
    copies = 1 if cell.target == "attention" or cell.kv_cache == "drop" else len(layers)
    kept = pool_bytes(part, place.cp) if part.paged and part.steps else max(cost.kept for cost in costs)
    buffers: int = sum(max(sizes) for sizes in zip(*(cost.buffers for cost in costs), strict=True))
    fixed = kept * copies + buffers
    attention = max(cost.moment for cost in costs)
    rows = held_rows(cell, rank)
    if cell.target == "attention":  # the inputs of all steps are made once
        inputs = rows * cell.heads * cell.shape.qk_dim + (rows * row_values(cell) if len(part.steps) > 1 else 0)
        inputs += rows * config.indexer.heads * (config.indexer.dim + max(1, 4 // size)) if config.indexer else 0  # gates are wide
        latent = config.latent.kv_rank * cell.heads * (config.latent.nope_dim + config.latent.v_dim) if config.latent else 0
        return fixed + attention + (inputs + latent) * size
    largest = max(len(cell.token_rows[index].held(place)) for index in chosen)
    attended = max(cell.token_rows[index].attended(place) for index in chosen)
    kinds = config.kinds(layers)
    attention = max(attention, *(feed_forward.surrounding_bytes(cell, cell.token_rows[index], place, ATTENTION) for index in chosen))
    moment = max(attention, *(feed_forward.live_bytes(cell, cell.token_rows[index], place, layer, pairs) for index in chosen for layer in kinds))
    hidden = (rows if cell.target == "layer" else largest * _hidden_tensors(cell, place)) * config.hidden * size
    angles = attended * config.rotary_dim * 4  # cos and sin in fp32, half a head each
    return fixed + moment + weights_bytes(cell, rank) + hidden + angles


def _hidden_tensors(cell: Cell, place: Coordinates) -> int:
    """Hidden states of how many steps are alive on a stage: the one at hand, one that is on its way out, one that comes in."""
    if cell.step_count == 1:
        return 1
    return 1 + (place.pp < cell.layout.pp - 1) + (place.pp > 0)


@dataclass(frozen=True)
class _StepBytes:
    """Kept by each layer where nothing is paged, buffers that all layers reuse, and what is alive at the largest moment of the attention block."""

    kept: int
    buffers: tuple[int, ...]
    moment: int


def _step_bytes(step: Cell, cp_rank: int) -> _StepBytes:
    strategy, size = STRATEGIES[step.strategy], step.element_bytes
    extra, n = strategy.memory(step, cp_rank), step.split.rows(cp_rank)
    local, row = strategy.keeps_local_rows, row_values(step) * size
    cached = sum(block.rows for block in strategy.cached(step, cp_rank)) if local else 0
    kept = extra.new_rows + (n * row if local else 0)
    selecting = attention_block.selection_buffers(step, cp_rank)
    buffers: tuple[int, ...] = (extra.buffers, extra.merge, 0 if local else n * row, *selecting)
    attend = extra.transient
    if step.paged:
        kept, buffers = 0, (extra.buffers, extra.merge, (cached + n) * row, extra.new_rows, *selecting)
        if step.kv_cache == "keep":  # the rows on their way into pages
            stored = sum(block.rows for block, _ in strategy.stored(step, cp_rank)) * cache_row_bytes(step, cp_rank)
            attend = max(attend, stored)
    return _StepBytes(kept, buffers, attention_block.moments(step, n, attend))


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
    parts = sum(len(lane) for lane in strategy.cache_heads(cell.steps[0], cp_rank))
    return parts * cell.shape.part_values * cell.element_bytes


def cached_pages(cell: Cell, cp_rank: int) -> int:
    """Pages that a context-parallel rank needs for one layer: a page holds tokens of one sequence only."""
    return sum(-(-tokens // cell.tokens_per_page) for tokens in cached_tokens(cell, cp_rank))


def pool_bytes(cell: Cell, cp_rank: int) -> int:
    """All pages of one layer on a context-parallel rank."""
    size = cell.tokens_per_page
    pages = max(cached_pages(cell, cp_rank), -(-(cell.cache_tokens or 0) // size))
    return pages * size * cache_row_bytes(cell, cp_rank)


def weights_bytes(cell: Cell, rank: int = 0) -> int:
    """Parameters of one rank in bytes: its stage's layers, and for prefill the embedding of the first stage and the head of the last."""
    config, place, layout = cell.config, cell.layout.coordinates(rank), cell.layout
    first, last, layers = place.pp == 0, place.pp == layout.pp - 1, cell.stage_layers(place.pp)
    tables = first + last - (first and last and config.tied_embeddings)
    ends = config.hidden * (last + config.vocab // layout.tp * tables) if cell.target == "prefill" else 0
    blocks = (attention_block.parameters(cell) + 2 * config.hidden) * len(layers) + sum(feed_forward.parameters(cell, layer) for layer in layers)
    return (blocks + ends) * cell.element_bytes - saved_bytes(cell, layers)
