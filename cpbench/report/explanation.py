"""How `cpbench explain` shows what one rank exchanges with others: a line for each collective of a step, in order, and their sum.

Pure: a cell becomes renderables or data. What is exchanged is decided in sharding.py and the strategies.
"""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import ConsoleRenderable
from rich.table import Table

from cpbench.cell import Cell
from cpbench.errors import CpbenchError
from cpbench.report.console import plain
from cpbench.transitions import Transition, transitions
from cpbench.units import format_bytes

COLUMNS = ("where", "operation", "axis", "shape before", "shape after", "received")


def chosen(cell: Cell, rank: int, layer: int | None) -> range | None:
    """The layer asked for, as a range; None for the whole pass. Raises CpbenchError for a rank or a layer that there is not."""
    if not 0 <= rank < cell.world_size:
        raise CpbenchError(
            f"{cell.layout} has no rank {rank}.", f"Its ranks are 0 to {cell.world_size - 1}; the nearest is {min(max(rank, 0), cell.world_size - 1)}."
        )
    if layer is None:
        return None
    there = cell.stage_layers(cell.layout.coordinates(rank).pp)
    if layer not in there:
        near = min(max(layer, there[0]), there[-1])
        raise CpbenchError(
            f"Rank {rank} of {cell.layout} runs no layer {layer} of {cell.config.name}.", f"The nearest it runs is --layer {near}; --set layers=N runs more."
        )
    return range(layer, layer + 1)


def explanation(cell: Cell, rank: int, layers: range | None) -> list[ConsoleRenderable]:
    """The exchanges of a rank, of some layers or of the whole pass."""
    found = transitions(cell, rank, layers)
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column == "received" else "left", overflow="fold")
    for one in found:
        table.add_row(one.where, one.operation + (f" x{one.calls}" if one.calls > 1 else ""), one.axis, *_shapes(one), format_bytes(one.received))
    steps = f", step 1 of {cell.step_count}" if cell.step_count > 1 else ""
    title = f"{cell.layout}: what rank {rank} of {cell.world_size} exchanges in {_what(cell, layers)} of {cell.config.name}{steps}"
    if not found:
        return [plain(title, "bold"), plain("Nothing: no block of it is cut over other ranks.")]
    total = sum(one.received for one in found)
    return [plain(title, "bold"), table, plain(f"{len(found)} exchanges, {format_bytes(total)} received")]


def explanation_json(cell: Cell, rank: int, layers: range | None) -> dict[str, Any]:
    """The same as data."""
    return {
        "cell": cell.key,
        "rank": rank,
        "layers": list(layers) if layers is not None else None,
        "transitions": [t.to_dict() for t in transitions(cell, rank, layers)],
    }


def _what(cell: Cell, layers: range | None) -> str:
    if layers is not None:
        return f"layer {layers[0]}"
    return {"prefill": f"a prefill of {cell.layers} {'layer' if cell.layers == 1 else 'layers'}", "layer": "a layer", "attention": "attention"}[cell.target]


def _shapes(one: Transition) -> tuple[str, str]:
    """Rows x values on either side; nothing where a strategy has its own."""
    return tuple("" if rows is None else f"{rows:,} x {one.values:,}" for rows in (one.rows_before, one.rows_after))  # type: ignore[return-value]
