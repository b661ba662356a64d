"""Which linear layers of a cell are quantised, what that saves and needs in memory, and what a device demands of them. Pure data.

`fp8` is W8A8 in e4m3, as servers run it: weights with one scale per output channel, activations with one per token, made on the fly.
Quantised are the projections of attention (those of queries and of latents among them) and the gate, up and down projections of dense blocks,
shared experts and routed experts. The embedding, the head, norms, routers and the indexer stay as they are, and so does kv_b_proj, which latent
attention opens rows with or absorbs. How a quantised layer is computed is in models/linear.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from math import prod

from cpbench import deterministic
from cpbench.cell import Cell
from cpbench.sharding import DENSE_MLP

NONE, FP8 = "none", "fp8"
SCALE_BYTES = 4
MULTIPLE = 16  # what both sizes of a matrix must be multiples of, for scaled GEMMs on CUDA
BLOCK = 1 << 21  # values of a matrix that are widened at a time where FP8 is simulated
Matrix = tuple[int, int]  # outputs and inputs of a linear layer on one rank


def attention_matrices(cell: Cell) -> dict[str, Matrix]:
    """The quantised projections of an attention block on one rank; q, k and v are one."""
    config, latent, heads = cell.config, cell.config.latent, cell.heads
    if latent is None:
        return {"qkv": ((heads + 2 * cell.kv_heads) * config.head_dim, config.hidden), "o": (config.hidden, heads * config.head_dim)}
    queries = {"q": (heads * config.head_dim, latent.q_rank or config.hidden)} | ({"q_a": (latent.q_rank, config.hidden)} if latent.q_rank else {})
    return queries | {"kv_a": (latent.row_values, config.hidden), "o": (config.hidden, heads * latent.v_dim)}


def dense_matrices(cell: Cell, width: int) -> tuple[Matrix, Matrix]:
    """Gate and up together, and down, of a dense block or the shared experts of some width on one rank."""
    return _swiglu(cell, width // prod(cell.layout.size(axis) for axis in DENSE_MLP))


def expert_matrices(cell: Cell) -> tuple[Matrix, Matrix]:
    """Gate and up together, and down, of one expert on one rank."""
    assert cell.config.experts is not None
    return _swiglu(cell, cell.config.experts.intermediate // cell.layout.moe_tp)


def _swiglu(cell: Cell, columns: int) -> tuple[Matrix, Matrix]:
    return (2 * columns, cell.config.hidden), (cell.config.hidden, columns)


def layer_matrices(cell: Cell, layer: int) -> Counter[Matrix]:
    """Every quantised matrix of a layer on one rank, and how many there are of it."""
    experts, found = cell.config.experts, Counter(attention_matrices(cell).values())
    if experts is None or not cell.config.is_sparse(layer):
        return found + Counter(dense_matrices(cell, cell.config.intermediate))
    here = experts.count // cell.layout.ep
    found += Counter({matrix: here * count for matrix, count in Counter(expert_matrices(cell)).items()})
    return found + Counter(dense_matrices(cell, experts.shared * experts.intermediate)) if experts.shared else found


def saved_bytes(cell: Cell, layers: Iterable[int]) -> int:
    """By how much quantised weights of these layers are smaller than those of the cell's dtype, on one rank."""
    if cell.quant == NONE:
        return 0
    counts = sum((layer_matrices(cell, layer) for layer in layers), Counter[Matrix]())
    return sum(count * outputs * (inputs * (cell.element_bytes - 1) - SCALE_BYTES) for (outputs, inputs), count in counts.items())


def workspace(cell: Cell, rows: int, *matrices: Matrix) -> int:
    """Bytes that the most demanding of some linear layers holds for so many rows, beside its input and its output.

    That is the quantised input; where FP8 is simulated, also what is widened of it and of the weight, and their product.
    """
    if cell.deterministic:
        return max(deterministic.workspace(cell, rows, inputs) for _, inputs in matrices)
    if cell.quant == NONE:
        return 0
    needs = []
    for outputs, inputs in matrices:
        values = sum((r * inputs + c * inputs + r * c) for r, c in [blocks(rows, outputs, inputs)]) if cell.device == "cpu" else 0
        needs.append(rows * (inputs + SCALE_BYTES) + 4 * values)
    return max(needs)


def blocks(rows: int, outputs: int, inputs: int) -> Matrix:
    """Rows and outputs that are computed at a time where FP8 is simulated: as many as fit into a block, also their product."""
    columns = min(outputs, max(1, BLOCK // inputs))
    return max(1, min(rows, BLOCK // max(inputs, columns))), columns


def quant_reason(cell: Cell) -> str | None:
    """Why a cell cannot be quantised, with the nearest valid value; None if it can."""
    if cell.quant == NONE or cell.device == "cpu":
        return None
    if cell.dtype != "bfloat16":
        return f"scaled GEMMs on CUDA return bfloat16, not {cell.dtype}; the nearest valid value is dtype=bfloat16"
    for layer in cell.config.kinds(cell.layer_range):
        for outputs, inputs in layer_matrices(cell, layer):
            if outputs % MULTIPLE or inputs % MULTIPLE:
                what = f"quant={cell.quant} on CUDA takes matrices whose sizes are multiples of {MULTIPLE}, not {outputs} x {inputs} on a rank of {cell.layout}"
                return f"{what}; the nearest valid value is quant={NONE}"
    return None
