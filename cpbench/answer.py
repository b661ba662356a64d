"""What the ranks of a cell computed together in one pass: their rows put back into the order of the batch, and what each received.

Every rank calls `solve`, under process groups or as a thread on the local backend. Whether the answer is right is decided in numerics.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from cpbench.cell import Cell
from cpbench.choices import Used, used_by_all
from cpbench.distributed.collectives import Group
from cpbench.distributed.mesh import Groups
from cpbench.distributed.traffic import Traffic
from cpbench.formulas import Sent
from cpbench.kernels.base import Kernel
from cpbench.layout import AXES, INNER_AXES
from cpbench.models.held import Models
from cpbench.program import Output, Program
from cpbench.routed import sent_rows, shared_loads

OPERATIONS = ("all_gather", "all_reduce", "all_to_all", "reduce_scatter", "send_recv")  # all that a Group can do
COUNTED = tuple(product((*AXES, *INNER_AXES, "ep", "world"), OPERATIONS))


@dataclass(frozen=True)
class Answer:
    """What the ranks computed for one cell.

    `copies`: the rows [N, M] in packed order, once for every set of ranks that together hold each token, by its first rank. `lost`: how
    many tokens are on no rank; their rows are NaN. `logits` [batch, V] and `first_tokens` are those of a prefill. `received`: what each
    rank counted. `experts` of tokens and `keys` of queries, in their places in sequences, are what was chosen; `sent`: rows sent to experts.
    """

    cell: Cell
    copies: dict[int, Tensor]
    lost: int
    received: tuple[Traffic, ...]
    logits: Tensor | None = None
    first_tokens: tuple[int, ...] = ()
    experts: Used | None = None
    sent: Sent | None = None
    keys: Used | None = None


def solve(cell: Cell, groups: Groups, kernel: Kernel, device: torch.device, models: Models) -> list[Answer]:
    """Attention alone, and then the whole target if it is more than that."""
    attention = replace(cell, target="attention", layers=1)
    return [_answer(part, groups, kernel, device, models) for part in ([attention] if cell.target == "attention" else [attention, cell])]


def _answer(cell: Cell, groups: Groups, kernel: Kernel, device: torch.device, models: Models) -> Answer:
    program = Program(cell, groups, kernel, device, models)
    program.keeps_rows = True
    program.prepare()
    groups.recorder.reset()
    program.log.watch(detailed=True)
    program.selections.watch(detailed=True)
    output = program.run()
    received = _share(groups.recorder.reset(), groups)
    notes, selections = program.log.stop(), program.selections.stop()
    experts = sent = keys = None
    if cell.config.experts and cell.has_experts:
        experts = used_by_all(notes, (cell.layer_range.stop, cell.tokens, cell.config.experts.top_k), groups.world, device)
        sent = sent_rows(cell, shared_loads(cell, notes, groups))
    if cell.shape.top_k:
        keys = used_by_all(selections, (cell.layer_range.stop, cell.tokens, cell.shape.top_k), groups.world, device)
    copies, lost = _collect(output.rows.flatten(1), program.tokens, cell, groups)
    prefill = cell.target == "prefill"
    logits, first = (_collect_logits(output, cell, groups), first_tokens(output, cell, groups)) if prefill else (None, [])
    groups.recorder.reset()
    return Answer(cell, copies, lost, received, logits, tuple(token for token, _ in first), experts, sent, keys)


def first_tokens(output: Output, cell: Cell, groups: Groups) -> list[tuple[int, float]]:
    """(token, margin) of every sequence of the batch, on every rank: those that the last pipeline stage has, of all DP groups."""
    found = [(0.0, 0.0)] * len(cell.lengths)
    mine = [] if output.first is None else [float(value) for pair in zip(output.first.tokens, output.first.margins, strict=True) for value in pair]
    width = 2 * max(len(part.sequences) for part in cell.parts)
    everyone = groups.world.share(mine + [0.0] * (width - len(mine)))
    for dp, part in enumerate(cell.parts):
        values = everyone[cell.layout.rank_of(pp=cell.layout.pp - 1, dp=dp)]
        for place, sequence in enumerate(part.sequences):
            found[sequence] = values[2 * place], values[2 * place + 1]
    return [(int(token), margin) for token, margin in found]


def _collect_logits(output: Output, cell: Cell, groups: Groups) -> Tensor:
    """Logits [batch, V] of the whole batch, on every rank: each DP group's rows from one rank of its last stage, and zeros from all others."""
    logits_BV = torch.zeros(len(cell.lengths), cell.config.vocab, device=output.rows.device)
    if output.first is not None:
        whole = _gather_columns(output.first.logits_BV, groups.tp)
        if groups.cp.rank == groups.tp.rank == 0:
            logits_BV[list(cell.parts[groups.place.dp].sequences)] = whole
    groups.world.all_reduce(logits_BV)
    return logits_BV


def _collect(rows_nM: Tensor, tokens: Tensor, cell: Cell, groups: Groups) -> tuple[dict[int, Tensor], int]:
    """The copies of the rows, and how many tokens no rank has.

    Of attention alone, the heads of the tensor-parallel ranks lie side by side, and every pipeline stage has a copy; else the last stage
    has the rows, and each tensor-parallel rank a copy, or with sp a part of one. So has each context-parallel rank of a group in which tokens
    are replicated.
    """
    layout, world = cell.layout, groups.world
    if cell.target == "attention":
        rows_nM = _gather_columns(rows_nM, groups.tp)
    padded = rows_nM.new_zeros(cell.max_rows, rows_nM.shape[1])
    padded[: rows_nM.shape[0]] = rows_nM
    places = torch.full((cell.max_rows,), -1, dtype=torch.int64, device=rows_nM.device)
    places[: len(rows_nM)] = tokens[: len(rows_nM)]
    gathered = padded.new_empty(world.size * cell.max_rows, rows_nM.shape[1])
    indices = places.new_empty(world.size * cell.max_rows)
    world.all_gather(gathered, padded).wait()
    world.all_gather(indices, places).wait()
    rows_of, places_of = gathered.chunk(world.size), indices.chunk(world.size)
    replicated = [bool(part.cell.steps) and all(step.split.replicated for step in part.cell.steps) for part in cell.parts]
    attention = cell.target == "attention"
    copies: dict[int, Tensor] = {}
    held = torch.zeros(cell.tokens, dtype=torch.bool, device=rows_nM.device)
    stages, parts = range(layout.pp) if attention else [layout.pp - 1], cell.token_rows[0].tp if cell.token_rows else 1
    for pp, copy, tp in product(stages, range(layout.cp if any(replicated) else 1), [0] if attention else range(layout.tp // parts)):
        whole = copies.setdefault(layout.rank_of(pp=pp, cp=copy, tp=tp), rows_nM.new_full((cell.tokens, rows_nM.shape[1]), float("nan")))
        for dp in range(layout.dp):
            for cp, part in product([copy] if replicated[dp] else range(layout.cp), range(parts)):
                rank = layout.rank_of(pp, dp, cp, tp + part)
                index = places_of[rank][places_of[rank] >= 0]
                whole[index] = rows_of[rank][: len(index)]
                held[index] = True
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
