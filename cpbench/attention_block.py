"""Closed forms for the attention block of a layer: projections of queries, keys and outputs, opening rows, and selecting among them.

Pure numbers, without torch. What a strategy computes, moves and holds stands in its file; the rest of a cell is in formulas.py.
"""

from __future__ import annotations

from math import ceil

from cpbench.cell import Cell
from cpbench.quantisation import attention_matrices, workspace
from cpbench.segments import Span, place
from cpbench.strategies import STRATEGIES
from cpbench.visible import Visible, attending_values, in_order, selection_values, visible_keys


def parameters(cell: Cell) -> int:
    """Parameters of the attention block of a layer on one rank, without the norm in front of it."""
    config, latent, heads = cell.config, cell.config.latent, cell.heads
    if latent is None:
        bias = config.head_dim * (heads + 2 * cell.kv_heads) if config.qkv_bias else 0
        norms = 2 * config.head_dim if config.qk_norm else 0
        return config.hidden * config.head_dim * 2 * (heads + cell.kv_heads) + bias + norms
    rank = latent.q_rank
    queries = config.hidden * heads * config.head_dim if rank is None else rank * (config.hidden + 1 + heads * config.head_dim)
    rows = config.hidden * latent.row_values + latent.kv_rank
    indexer = config.indexer
    index = 0 if indexer is None else _index_weights(cell) + 2 * indexer.dim  # a layer norm with a bias
    return queries + rows + latent.kv_rank * heads * (latent.nope_dim + latent.v_dim) + config.hidden * heads * latent.v_dim + index


def _index_weights(cell: Cell) -> int:
    """Weights of the indexer's products, whole on every rank: queries from the low-rank ones, a key and gates from the input."""
    indexer, latent, hidden = cell.config.indexer, cell.config.latent, cell.config.hidden
    if indexer is None or latent is None:
        return 0
    return indexer.heads * indexer.dim * (latent.q_rank or 0) + (indexer.dim + indexer.heads) * hidden


def projection_flops(cell: Cell, rows: int) -> int:
    """Operations of the projections of so many tokens on one rank; absorbed, those into and out of the latent's width among them."""
    config, latent, heads = cell.config, cell.config.latent, cell.heads
    if latent is None:
        return 2 * rows * config.hidden * config.head_dim * 2 * (heads + cell.kv_heads)
    rank = latent.q_rank
    queries = config.hidden * heads * config.head_dim if rank is None else rank * (config.hidden + heads * config.head_dim)
    absorbed = heads * latent.kv_rank * (latent.nope_dim + latent.v_dim) if cell.absorbed else 0
    return 2 * rows * (queries + config.hidden * latent.row_values + absorbed + config.hidden * heads * latent.v_dim + _index_weights(cell))


def opening_flops(cell: Cell, rows: int, heads: int) -> int:
    """Operations of making K and V of so many heads from rows; none where they are views."""
    latent = cell.config.latent
    return 2 * rows * latent.kv_rank * heads * (latent.nope_dim + latent.v_dim) if latent is not None and cell.shape.opened else 0


def score_pairs(step: Cell, cp_rank: int) -> int:
    """Pairs that a rank attends to in a step, summed over its query heads: at most `top_k` for a query where keys are selected."""
    if not step.shape.top_k:
        return STRATEGIES[step.strategy].score_pairs(step, cp_rank)
    return step.heads * sum(block.selected_pairs(step.shape.top_k) for block in _seen(step, cp_rank))


def selection_flops(step: Cell, cp_rank: int) -> int:
    """Operations of scoring keys in one layer of a step: of the queries that see more than they may attend to."""
    indexer = step.config.indexer
    return 0 if indexer is None else scoring_flops(step, sum(block.scored_pairs(indexer.top_k) for block in _seen(step, cp_rank)))


def scoring_flops(cell: Cell, pairs: int) -> int:
    """Operations of scoring so many pairs of a query and a key: by all heads of the indexer, on every rank."""
    indexer = cell.config.indexer
    return 0 if indexer is None else 2 * indexer.heads * indexer.dim * pairs


def selected_of(new: int, prefix: int, top_k: int) -> tuple[int, int]:
    """(pairs attended to, pairs scored) of one sequence, where a query attends to at most so many keys."""
    block = Visible(Span(0, new), Span(0, prefix + new), prefix + 1)
    return block.selected_pairs(top_k), block.scored_pairs(top_k)


def _seen(step: Cell, cp_rank: int) -> tuple[Visible, ...]:
    """What the query blocks of a rank see."""
    blocks = step.split.ranks[cp_rank]
    return visible_keys(place(blocks), {block.sequence: Span(0, block.stop) for block in blocks})


def selection_buffers(step: Cell, cp_rank: int) -> tuple[int, ...]:
    """Bytes of the reused space in which keys are selected and attended to: of scores, of tiles that attend, and of rows put in order."""
    indexer, shape, size = step.config.indexer, step.shape, step.element_bytes
    if indexer is None:
        return 0, 0, 0
    order, wide = in_order(place(step.split.ranks[cp_rank]), STRATEGIES[step.strategy].collected(step, cp_rank)), max(size, 4)
    sizes = shape.heads, shape.qk_dim, shape.v_dim
    scores, gathered = attending_values(order.visible, sizes, shape.top_k, step.device, wide)
    copies = size + wide if size < wide and step.device == "cpu" else size
    ordered = 0 if order.is_identity else len(order.rows) * shape.row_values * size
    return selection_values(order.visible, indexer.heads, step.device) * wide, scores * wide + gathered * copies, ordered


def score_flops(cell: Cell, pairs: int) -> int:
    """Operations of score pairs (summed over heads): the score, and its share of the output."""
    return 2 * (cell.shape.qk_dim + cell.shape.v_dim) * pairs


def opened_flops_of_rank(part: Cell, cp_rank: int) -> int:
    """Operations of opening rows in one layer, over all steps of a pass."""
    if not part.shape.opened:
        return 0
    total = 0
    for step in part.steps:
        strategy = STRATEGIES[step.strategy]
        total += opening_flops(step, strategy.opened_rows(step, cp_rank), strategy.attended_heads(step))
    return total


def moments(step: Cell, n: int, attend: int) -> int:
    """Alive at the largest moment of the block in a step, beside the residual: `attend` bytes are those of the attention across ranks.

    Of attention alone, which has its queries beforehand, only what comes behind them.
    """
    if step.shape.top_k:
        return _selective_moments(step, n)
    if step.target == "attention":
        return max(attend, n * step.shape.heads * _released(step) * step.element_bytes)
    work = _workspaces(step, n)
    config, latent, size, shape = step.config, step.config.latent, step.element_bytes, step.shape
    q, row = n * shape.heads * shape.qk_dim * size, n * shape.row_values * size
    entering, leaving = _entering(step, n) * config.hidden * size, _leaving(step, n) * config.hidden * size
    out = n * shape.heads * (_released(step) or shape.v_dim) * size
    if latent is None:  # normed rows and packed q, k, v; rotated copies; attention; o
        return max(entering + q + row + work["qkv"], q + row + q, q + attend, out + leaving + work["o"])
    plain = n * shape.heads * config.head_dim * size
    queries = n * (latent.q_rank or 0) * size
    turned = plain + n * shape.heads * latent.rope_dim * size
    if latent.q_rank is None:  # queries of all heads and latents are made from the input
        project = max(entering + plain + max(2 * row, row + work["kv_a"], work["q"]), turned)
    else:
        project = max(entering + queries + max(queries, 2 * row, row + work["kv_a"], work["q_a"]), queries + plain + work["q"], turned)
    absorb = plain + (n * shape.heads * latent.kv_rank * size + q if step.absorbed else 0)
    return max(project, absorb, q + attend, out + leaving + work["o"])


def _workspaces(step: Cell, n: int) -> dict[str, int]:
    """What each projection of n rows needs beside its input and output."""
    return {name: workspace(step, n, matrix) for name, matrix in attention_matrices(step).items()}


def _selective_moments(step: Cell, n: int) -> int:
    """The same where keys are selected: the low-rank queries stay alive until those of the heads are made, the selection until it is used."""
    config, shape, size, indexer, latent = step.config, step.shape, step.element_bytes, step.config.indexer, step.config.latent
    assert indexer is not None and latent is not None
    wide, heads = max(size, 4), shape.heads
    ids = n * shape.top_k * 4
    attend = ids + n * heads * (shape.v_dim * size + wide)  # out and lse
    release = n * heads * (shape.v_dim + 2 * latent.v_dim) * size
    if step.target == "attention":
        return max(attend, n * heads * (shape.v_dim + latent.v_dim) * size)
    work, entering, leaving = _workspaces(step, n), _entering(step, n) * config.hidden * size, _leaving(step, n) * config.hidden * size
    low_rank, q = n * (latent.q_rank or 0) * size, n * heads * shape.qk_dim * size
    index = n * indexer.heads * (indexer.dim * size + wide)
    plain = n * heads * config.head_dim * size
    rows = n * shape.row_values * size
    indexed = low_rank + index + n * indexer.heads * latent.rope_dim * size
    project = max(entering + low_rank + max(low_rank, 2 * rows, rows + work["kv_a"], work["q_a"]), indexed)
    absorb = low_rank + ids + plain + max(n * heads * latent.rope_dim * size, n * heads * latent.kv_rank * size + q, work["q"])
    return max(project, low_rank + index + ids, absorb, q + attend, release, n * heads * latent.v_dim * size + leaving + work["o"])


def _entering(step: Cell, n: int) -> int:
    """Hidden states that are alive while the first product of the block is computed: of all its rows, or of a part and some pieces of them."""
    if step.low_values:
        return 0
    return n if step.chunks_of_rows == 1 else ceil(n / step.layout.tp) + 2 * ceil(n / step.chunks_of_rows)


def _leaving(step: Cell, n: int) -> int:
    """The same for its last product, and for what is summed while others are on their way."""
    return n if step.chunks_of_rows == 1 else ceil(n / step.layout.tp) + 4 * ceil(n / step.chunks_of_rows)


def _released(step: Cell) -> int:
    """Values of an output head in the latent's width, as the kernel padded it, and of what becomes of it; none where nothing is absorbed."""
    latent, shape = step.config.latent, step.shape
    if latent is None or not step.absorbed:
        return 0
    return latent.v_dim + (max(shape.qk_dim, shape.v_dim) if step.device == "cpu" else shape.v_dim)
