"""Closed forms for what surrounds the attention across ranks in a layer: projections of queries, keys and outputs, and opening rows.

Pure numbers, without torch. What a strategy computes, moves and holds stands in its file; the rest of a cell is in formulas.py.
"""

from __future__ import annotations

from cpbench.cell import Cell
from cpbench.quantisation import attention_matrices, workspace
from cpbench.strategies import STRATEGIES


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
    return queries + rows + latent.kv_rank * heads * (latent.nope_dim + latent.v_dim) + config.hidden * heads * latent.v_dim


def projection_flops(cell: Cell, rows: int) -> int:
    """Operations of the projections of so many tokens on one rank; absorbed, those into and out of the latent's width among them."""
    config, latent, heads = cell.config, cell.config.latent, cell.heads
    if latent is None:
        return 2 * rows * config.hidden * config.head_dim * 2 * (heads + cell.kv_heads)
    rank = latent.q_rank
    queries = config.hidden * heads * config.head_dim if rank is None else rank * (config.hidden + heads * config.head_dim)
    absorbed = heads * latent.kv_rank * (latent.nope_dim + latent.v_dim) if cell.mla == "absorbed" else 0
    return 2 * rows * (queries + config.hidden * latent.row_values + absorbed + config.hidden * heads * latent.v_dim)


def opening_flops(cell: Cell, rows: int, heads: int) -> int:
    """Operations of making K and V of so many heads from rows; none where they are views."""
    latent = cell.config.latent
    return 2 * rows * latent.kv_rank * heads * (latent.nope_dim + latent.v_dim) if latent is not None and cell.shape.opened else 0


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
    if step.target == "attention":
        return max(attend, n * step.shape.heads * _released(step) * step.element_bytes)
    config, latent, size, shape = step.config, step.config.latent, step.element_bytes, step.shape
    residual, q, row = n * config.hidden * size, n * shape.heads * shape.qk_dim * size, n * shape.row_values * size
    out = n * shape.heads * (_released(step) or shape.v_dim) * size
    work = {name: workspace(step, n, matrix) for name, matrix in attention_matrices(step).items()}
    if latent is None:  # normed rows and packed q, k, v; rotated copies; attention; o
        return max(residual + q + row + work["qkv"], q + row + q, q + attend, out + residual + work["o"])
    plain = n * shape.heads * config.head_dim * size
    queries = n * (latent.q_rank or 0) * size
    lower = max(row + work["kv_a"], queries + work.get("q_a", 0), queries + plain + work["q"])
    project = residual + max(2 * row, 2 * queries, lower, plain + n * shape.heads * latent.rope_dim * size)
    absorb = plain + (n * shape.heads * latent.kv_rank * size + q if step.mla == "absorbed" else 0)
    return max(project, absorb, q + attend, out + residual + work["o"])


def _released(step: Cell) -> int:
    """Values of an output head in the latent's width, as the kernel padded it, and of what becomes of it; none where nothing is absorbed."""
    latent, shape = step.config.latent, step.shape
    if latent is None or step.mla != "absorbed":
        return 0
    return latent.v_dim + (max(shape.qk_dim, shape.v_dim) if step.device == "cpu" else shape.v_dim)
