"""How `cpbench layout` shows a layout: which rank sits where, which ranks talk on which axis and about what; the same as JSON.

Pure: a layout and a width become renderables. Which ranks those are is decided in layout.py. A picture that does not fit is cut in the
middle, with the count of what is left out.

    cp2tp2/ep4    Attention       tp0  tp1    Experts        ep0  ep1  ep2  ep3
                              cp0    0    1                rank    0    1    2    3
                              cp1    2    3
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

from rich import box
from rich.console import ConsoleRenderable
from rich.table import Table

from cpbench.layout import AXES, INNER_AXES, MOE_AXES, Layout, engine_notes
from cpbench.report.console import plain

FEW_RANKS = 16  # so many are shown with all their stages, more with stage 0 only
MAX_ROWS = 16  # of a grid
GAP = 2  # spaces between columns, one of them made by the box
MAX_LISTS = 48  # characters of the rank lists of one axis, unless they are cut
EXCHANGED = {
    "pp": "hidden states, to the next stage",
    "dp": "tokens, gathered for blocks whose weights are cut over it",
    "cp": "attention across the tokens of a sequence",
    "ring": "part of cp: keys and values, passed around",
    "ulysses": "part of cp: tokens exchanged for heads",
    "tp": "partial sums of attention and feed-forward",
    "moe_dp": "nothing in a block: replicas of the experts",
    "ep": "tokens, to their experts and back",
    "moe_tp": "partial sums of an expert",
}
SCATTERED = "rows, gathered before blocks, and their sums, scattered after them"


def layout_view(layout: Layout, width: int) -> list[ConsoleRenderable]:
    """The picture of one layout, as wide as `width` columns."""
    axes = _attention_axes(layout)
    view: list[ConsoleRenderable] = [plain(_title(layout), "bold"), plain("")]
    if layout.world_size > 1:
        view += [*_grid("Attention", layout, axes, width), plain("")]
        view += [*_grid("Experts", layout, ("pp", *MOE_AXES), width), plain("")] if layout.divides_experts else []
        view += [_axes_table(layout, (*axes[:2], "cp", *axes[2:]) if layout.ulysses > 1 else axes), plain("")]
    return [*view, *(plain(line) for line in _remarks(layout))]


def layout_json(layout: Layout) -> dict[str, Any]:
    """The same as data, whole: every rank's coordinates and every rank list, those of one rank too."""
    axes = (*AXES, *INNER_AXES, *MOE_AXES)
    return {
        "name": str(layout),
        "ranks": layout.world_size,
        "ranks_per_stage": layout.stage_size,
        "sizes": {axis: layout.size(axis) for axis in axes},
        "strides": {axis: layout.stride(axis) for axis in axes},
        "coordinates": [{axis: rank // layout.stride(axis) % layout.size(axis) for axis in axes} for rank in range(layout.world_size)],
        "groups": {axis: layout.groups(axis) for axis in (*axes, "stage")},
        "notes": engine_notes(layout),
    }


def _attention_axes(layout: Layout) -> tuple[str, ...]:
    """Outermost first; the two parts of cp in its place where it is a hybrid."""
    return ("pp", "dp", *INNER_AXES, "tp") if layout.ulysses > 1 else AXES


def _title(layout: Layout) -> str:
    stages = f" in {layout.pp} pipeline stages of {layout.stage_size}" if layout.pp > 1 else ""
    return f"{layout}: {layout.world_size} {'rank' if layout.world_size == 1 else 'ranks'}{stages}"


def _grid(name: str, layout: Layout, axes: Sequence[str], width: int) -> list[ConsoleRenderable]:
    """Ranks by coordinates: the innermost divided axis across, the others down."""
    one_stage = layout.pp > 1 and layout.stage_size > 1 and layout.world_size > FEW_RANKS
    *down, across = [axis for axis in axes if layout.size(axis) > 1 and not (one_stage and axis == "pp")]
    rows = list(product(*(range(layout.size(axis)) for axis in down)))
    labels = [" ".join(f"{axis}{place}" for axis, place in zip(down, row, strict=True)) or "rank" for row in rows]
    firsts = [sum(layout.stride(axis) * place for axis, place in zip(down, row, strict=True)) for row in rows]
    shown_rows, more_rows = _shown(len(rows), MAX_ROWS)
    label = max([*map(len, labels), len(f"... +{more_rows} rows") if more_rows else 0])
    cell = max(len(f"{across}{layout.size(across) - 1}"), len(str(layout.world_size)))
    shown, more = _shown(layout.size(across), max(3, (width - label) // (cell + GAP)))
    table = _table("", *(f"+{more}" if place is None else f"{across}{place}" for place in shown), numbers_from=1)
    for row in shown_rows:
        if row is None:
            table.add_row(f"... +{more_rows} rows")
        else:
            table.add_row(labels[row], *("..." if place is None else str(firsts[row] + place * layout.stride(across)) for place in shown))
    by = " and ".join([", ".join(down), across] if down else [across])
    view: list[ConsoleRenderable] = [plain(f"{name}{', stage 0' if one_stage else ''}: ranks by {by}", "bold"), table]
    size = layout.stage_size
    return [*view, plain(f"The other stages are alike: add {size}*k for stage k, up to {layout.pp - 1}.")] if one_stage else view


def _axes_table(layout: Layout, axes: Sequence[str]) -> Table:
    """The divided axes, innermost last, and those of the experts where they differ from the default."""
    table = _table("axis", "size", "stride", "groups", "ranks that talk", "about what", numbers_from=1, numbers_to=4)
    for axis in (*axes, *(MOE_AXES if layout.divides_experts else ())):
        if layout.size(axis) > 1:
            groups = layout.groups(axis)
            table.add_row(
                axis,
                str(layout.size(axis)),
                str(layout.stride(axis)),
                str(len(groups)),
                rank_lists(groups),
                SCATTERED if axis == "tp" and layout.sp else EXCHANGED[axis],
            )
    return table


def rank_lists(groups: Sequence[Sequence[int]]) -> str:
    """`[0,4] [1,5] [2,6] [3,7]`; many or long ones are cut: `[0,8,...,120] [1,9,...,121] ... [7,15,...,127]`."""
    text = " ".join(_rank_list(group, 8) for group in groups)
    if len(text) <= MAX_LISTS:
        return text
    short = [_rank_list(group, 4) for group in groups]
    return " ".join(short if len(short) <= 3 else [*short[:2], "...", short[-1]])


def _rank_list(group: Sequence[int], most: int) -> str:
    """Ranks at equal distances, the middle left out where there are more than `most`."""
    if len(group) <= most:
        return f"[{','.join(map(str, group))}]"
    if group[-1] - group[0] == len(group) - 1:
        return f"[{group[0]}-{group[-1]}]"
    return f"[{group[0]},{group[1]},...,{group[-1]}]"


def _remarks(layout: Layout) -> list[str]:
    """What the picture leaves out, and what serving engines would not do."""
    undivided = [axis for axis in (*AXES, *(MOE_AXES if layout.divides_experts else ())) if layout.size(axis) == 1]
    lines = [f"Axes of size 1: {', '.join(undivided)}."] if undivided else []
    if not layout.divides_experts and layout.stage_size > 1:
        stage = " of a stage" if layout.pp > 1 else ""
        lines.append(f"Experts would be cut over all {layout.stage_size} ranks{stage}: moe_tp={layout.moe_tp}.")
    return [*lines, *(f"Note: {note}" for note in engine_notes(layout))]


def _shown(count: int, room: int) -> tuple[list[int | None], int]:
    """Which of so many fit: all, or the first ones, None for the gap, and the last; and how many are in the gap."""
    if count <= room:
        return list(range(count)), 0
    return [*range(room - 2), None, count - 1], count - room + 1


def _table(*columns: str, numbers_from: int, numbers_to: int | None = None) -> Table:
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, padding=(0, GAP - 1, 0, 0), pad_edge=False, show_edge=False, header_style="bold")
    numbers = range(len(columns))[numbers_from:numbers_to]
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index in numbers else "left", overflow="fold")
    return table
