"""What the ranks of a cell computed together in one pass: their rows put back into the order of the batch, and what each received.

Every rank calls `solve`, under process groups or as a thread on the local backend. Whether the answer is right is decided in numerics.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from cpbench.cell import Cell
from cpbench.distributed.collectives import Group
from cpbench.distributed.mesh import Groups
from cpbench.distributed.traffic import Traffic
from cpbench.kernels.base import Kernel
from cpbench.layout import AXES, INNER_AXES
from cpbench.program import Models, Program

OPERATIONS = ("all_gather", "all_reduce", "all_to_all", "send_recv")  # all that a Group can do
COUNTED = tuple(product((*AXES, *INNER_AXES, "world"), OPERATIONS))


@dataclass(frozen=True)
class Answer:
    """What the ranks computed for one cell.

    `copies`: the rows [N, M] in packed order, once for every set of ranks that together hold each token, by its first rank. `lost`: how
    many tokens are on no rank; their rows are NaN. `logits` [batch, V] and `first_tokens` are those of a prefill. `received`: what each
    rank counted.
    """

    cell: Cell
    copies: dict[int, Tensor]
    lost: int
    received: tuple[Traffic, ...]
    logits: Tensor | None = None
    first_tokens: tuple[int, ...] = ()


def solve(cell: Cell, groups: Groups, kernel: Kernel, device: torch.device, models: Models) -> list[Answer]:
    """Attention alone, and then the whole target if it is more than that."""
    attention = replace(cell, target="attention", layers=1)
    return [_answer(part, groups, kernel, device, models) for part in ([attention] if cell.target == "attention" else [attention, cell])]


def _answer(cell: Cell, groups: Groups, kernel: Kernel, device: torch.device, models: Models) -> Answer:
    program = Program(cell, groups, kernel, device, models)
    program.keeps_rows = True
    program.prepare()
    groups.recorder.reset()
    output = program.run()
    received = _share(groups.recorder.reset(), groups)
    copies, lost = _collect(output.rows.flatten(1), program.tokens, cell, groups)
    logits = None if output.first is None else _gather_columns(output.first.logits_BV, groups.tp)
    groups.recorder.reset()
    return Answer(cell, copies, lost, received, logits, () if output.first is None else tuple(output.first.tokens))


def _collect(rows_nM: Tensor, tokens: Tensor, cell: Cell, groups: Groups) -> tuple[dict[int, Tensor], int]:
    """The copies of the rows, and how many tokens no rank has.

    Of attention alone, the heads of the tensor-parallel ranks lie side by side; else each of these ranks has a copy. So has each
    context-parallel rank where tokens are replicated.
    """
    group = groups.world
    if cell.target == "attention":
        rows_nM, group = _gather_columns(rows_nM, groups.tp), groups.cp
    padded = rows_nM.new_zeros(cell.max_rows, rows_nM.shape[1])
    padded[: rows_nM.shape[0]] = rows_nM
    places = torch.full((cell.max_rows,), -1, dtype=torch.int64, device=rows_nM.device)
    places[: len(tokens)] = tokens
    gathered = padded.new_empty(group.size * cell.max_rows, rows_nM.shape[1])
    indices = places.new_empty(group.size * cell.max_rows)
    group.all_gather(gathered, padded).wait()
    group.all_gather(indices, places).wait()
    replicated = all(step.split.replicated for step in cell.steps)
    copies: dict[int, Tensor] = {}
    held = torch.zeros(cell.tokens, dtype=torch.bool, device=rows_nM.device)
    for rank, rows, index in zip(group.ranks, gathered.chunk(group.size), indices.chunk(group.size), strict=True):
        first = rank if replicated else cell.layout.rank_of(tp=cell.layout.coordinates(rank)["tp"])
        whole = copies.setdefault(first, rows.new_full((cell.tokens, rows.shape[1]), float("nan")))
        whole[index[index >= 0]] = rows[index >= 0]
        held[index[index >= 0]] = True
    return copies, int((~held).sum())


def _gather_columns(rows_nM: Tensor, group: Group) -> Tensor:
    """[n, M] of each rank side by side: [n, size * M]."""
    gathered = rows_nM.new_empty(group.size * rows_nM.shape[0], rows_nM.shape[1])
    group.all_gather(gathered, rows_nM.contiguous()).wait()
    return torch.cat(gathered.chunk(group.size), 1)


def _share(received: Traffic, groups: Groups) -> tuple[Traffic, ...]:
    """What every rank counted, in rank order."""
    mine = [float(number) for key in COUNTED for number in received.counts.get(key, (0, 0))]
    everyone = []
    for row in groups.world.share(mine):
        counts = {key: (int(row[2 * place]), int(row[2 * place + 1])) for place, key in enumerate(COUNTED)}
        everyone.append(Traffic({key: count for key, count in counts.items() if count[0]}))
    return tuple(everyone)
