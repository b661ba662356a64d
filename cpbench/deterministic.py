"""Which cells can be computed so that every layout gives the same bits (`deterministic`), and what that needs in memory. Pure data.

Bits depend on a layout in four places, and each is fixed by an order that no layout changes:

* A product of rows and columns: it is computed in blocks of a fixed shape, padded where there is less, so that what a row is multiplied
  with never depends on how many rows or columns a rank has.
* A sum over inputs that ranks share (`o_proj`, `down_proj`): the inputs are cut into tiles of 128. The products of a *run* of tiles are added
  from left to right, and runs in a binary tree; cutting the inputs in two keeps the run, so a rank's tree is a branch of the whole one, and
  ranks add theirs in the same tree (distributed/deterministic.py). Every node has the dtype that travels. A run is what is left of the number
  of tiles after halving it while it is even and above two, because a tree over an odd number of tiles has no such branches.
* A sum over experts: in a binary tree over their numbers.
* Attention: every query meets all of its keys in one call, in blocks that begin at the first token of its sequence.

The arithmetic is in models/invariant.py and kernels/fixed_blocks.py. Where two machines, or two builds of PyTorch, multiply differently, their
bits differ still.
"""

from __future__ import annotations

from dataclasses import replace

from cpbench.cell import Cell
from cpbench.experts import ALLTOALL
from cpbench.kernels import FIXED
from cpbench.layout import Layout
from cpbench.models.config import ModelConfig
from cpbench.partition import cut
from cpbench.sharding import dispatch_of

TILE = 128  # inputs of a product that is one leaf of the tree
ROWS, COLUMNS, DEPTH = 128, 256, 512  # of one product: at these a CPU reaches nine tenths of what it reaches at large ones
MOST_TILED = 16  # tensor-parallel ranks that a narrow model is for where nobody says how many there are
QUERIES, KEYS = 128, 256  # of one product of attention
STRATEGIES = ("none", "allgather", "ulysses", "ulysses-gather")  # those that bring all keys of a query to one call


def run_of(tiles: int) -> int:
    """How many tiles are added from left to right before the tree begins."""
    while tiles > 2 and tiles % 2 == 0:
        tiles //= 2
    return tiles


def shares(rows: int, ranks: int) -> list[int]:
    """How many rows of an all-reduce each rank adds up."""
    return [last - first for first, last in cut(rows, ranks)]


def workspace(cell: Cell, rows: int, inputs: int) -> int:
    """Bytes that a product of so many rows holds beside its input and its output."""
    wide = max(cell.element_bytes, 4)
    widened = rows * inputs * wide if cell.element_bytes < wide else 0
    return widened + wide * (ROWS * inputs * bool(rows % ROWS) + COLUMNS * inputs + 3 * ROWS * COLUMNS)


def attention_workspace(keys: int, dims: int, element_bytes: int) -> int:
    """Bytes that a call holds beside its inputs and outputs: K and V of one head (`dims` values of a key), scores and weights of a block."""
    return -(-keys // KEYS) * KEYS * (dims + 2 * QUERIES) * max(4, element_bytes)


def reduced(config: ModelConfig, deterministic: bool, tp: int = MOST_TILED) -> ModelConfig:
    """The model in a narrow width; if deterministic, with whole tiles over `tp` ranks, or over as many of them as the model itself has tiles for."""
    small, experts = config.reduced(), config.experts
    if not deterministic:
        return small
    step = TILE * _parts(config.intermediate, tp)
    small = replace(small, intermediate=min(config.intermediate, -(-small.intermediate // step) * step))
    if experts is None or small.experts is None:
        return small
    width, step = TILE, TILE * _parts(experts.shared * experts.intermediate, tp)
    while experts.shared * width % step:
        width += TILE
    return replace(small, experts=replace(small.experts, intermediate=min(width, experts.intermediate)))


def _parts(inputs: int, tp: int) -> int:
    """Over how many ranks, of a power of two, so many inputs cut into whole tiles: at most `tp`."""
    while tp > 1 and inputs % (TILE * tp):
        tp //= 2
    return tp


def deterministic_reason(cell: Cell) -> str | None:
    """Why a cell cannot be computed so, with the nearest valid value; None if it can."""
    if not cell.deterministic:
        return None
    layout, config = cell.layout, cell.config
    if cell.kernel not in ("auto", FIXED):
        return f"deterministic attends with {FIXED}, not {cell.kernel}; the nearest valid value is kernel=auto"
    if cell.quant != "none":
        return f"deterministic has no products of quant={cell.quant}; the nearest valid value is quant=none"
    if config.indexer is not None:
        return f"deterministic attends to all keys, and queries of {config.name} select theirs; the nearest valid value is deterministic=false"
    if config.latent is not None and cell.mla != "expanded":
        return "deterministic makes K and V of latents; the nearest valid value is mla=expanded"
    if cell.strategy not in STRATEGIES:
        return f"deterministic brings all keys of a query to one call, and {cell.strategy} merges parts; the nearest strategy is allgather"
    if cell.strategy == "allgather" and (cell.partition == "interleave" or cell.head_groups > 1):
        what, near = ("interleave", "partition=zigzag") if cell.partition == "interleave" else (f"head_groups={cell.head_groups}", "head_groups=1")
        return f"deterministic puts gathered keys into the order of positions, which {what} does not allow; the nearest valid value is {near}"
    if (layout.sp and cell.chunks_of_rows > 1) or cell.sp_fused:
        what = "sp_fused=true" if cell.sp_fused else f"sp_chunks={cell.sp_chunks}"
        return f"deterministic adds rows in a tree, not as {what} does; the nearest valid value is {'sp_fused=false' if cell.sp_fused else 'sp_chunks=1'}"
    if cell.target == "attention":
        return None
    return _layout_reason(cell) or (_experts_reason(cell) if cell.has_experts else None)


def _layout_reason(cell: Cell) -> str | None:
    """Ranks that add up must be a power of two, and each must have whole tiles."""
    layout = cell.layout
    if layout.dp > 1:
        return f"deterministic adds in a tree over tp alone, and {layout} cuts feed-forward blocks over dp too; {_fitting(cell, layout.tp)}"
    if layout.tp & (layout.tp - 1):
        return f"deterministic adds in a binary tree, and tp={layout.tp} is no power of two; {_fitting(cell, 1 << (layout.tp.bit_length() - 1))}"
    for name, inputs in _summed_inputs(cell).items():
        near = _parts(inputs, layout.tp)
        if inputs % TILE:
            return f"{inputs} inputs of {name} are no multiple of {TILE}; the nearest valid value is deterministic=false"
        if near < layout.tp:
            return f"{inputs} inputs of {name} do not cut into tiles of {TILE} over tp={layout.tp}; {_fitting(cell, near)}"
    return None


def _experts_reason(cell: Cell) -> str | None:
    experts, layout = cell.config.experts, cell.layout
    assert experts is not None
    if experts.count & (experts.count - 1):
        near = 1 << (experts.count.bit_length() - 1)
        return f"deterministic adds experts in a binary tree, and {experts.count} are no power of two; the nearest valid value is experts={near}"
    if experts.intermediate % TILE:
        return f"{experts.intermediate} inputs of an expert's down_proj are no multiple of {TILE}; the nearest valid value is deterministic=false"
    whole = "deterministic adds all experts of a token on one rank"
    if layout.moe_tp > 1:
        return f"{whole}, and /tp={layout.moe_tp} cuts an expert; {_nearest(replace(layout, ep=layout.ep * layout.moe_tp, moe_tp=1))}"
    if layout.ep > 1 and dispatch_of(layout, cell.dispatch) != ALLTOALL:
        return f"{whole}, and dispatch=gather adds up those of several ranks; the nearest valid value is dispatch=alltoall"
    return None


def _summed_inputs(cell: Cell) -> dict[str, int]:
    """Inputs of the products whose inputs ranks share, by the name of the layer."""
    config, experts = cell.config, cell.config.experts
    value = config.latent.v_dim if config.latent else config.head_dim
    kinds = {config.is_sparse(layer) for layer in cell.layer_range}
    found = {"o_proj": config.heads * value}
    if False in kinds:
        found["down_proj"] = config.intermediate
    if experts and experts.shared and True in kinds:
        found["the shared experts' down_proj"] = experts.shared * experts.intermediate
    return found


def _fitting(cell: Cell, tp: int) -> str:
    """The layout without dp and with another tp, where every expert is whole: on the rank that has it, or on all of them."""
    layout, config = cell.layout, cell.config
    while config.heads % tp or (config.kv_heads % tp and tp % config.kv_heads):
        tp //= 2
    ranks, experts = layout.cp * tp, config.experts
    divided = {} if experts is None or not cell.has_experts else {"ep": ranks} if experts.count % ranks == 0 else {"moe_dp": ranks, "moe_tp": 1}
    return _nearest(Layout(layout.pp, 1, layout.cp, tp, layout.ulysses, sp=layout.sp and tp > 1, **divided))


def _nearest(layout: Layout) -> str:
    return f"the nearest valid layout is {layout}"
