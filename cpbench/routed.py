"""What the routers of all ranks chose in one pass, put together: how many rows each expert got, and which experts each token got.

Every rank calls, under process groups or as a thread on the local backend. What follows for traffic is in formulas.py, whether the choices are
right is decided in numerics.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cpbench.cell import Cell
from cpbench.distributed.mesh import Groups
from cpbench.formulas import Sent, sparse_layers
from cpbench.models.router import Note

Loads = tuple[tuple[tuple[int, ...], ...], ...]  # by rank, by step and sparse layer of its stage: rows that its router gave to each expert


@dataclass(frozen=True)
class Choices:
    """The choices of one device, by layer and token of the batch: the experts [L, N, K] it would have used, the scores [L, N, E] that it chose
    by, and by how much the last expert chosen leads [L, N]. Layers without experts have -1, zeros and infinity."""

    experts_LNK: Tensor
    scores_LNE: Tensor
    margins_LN: Tensor


def shared_loads(cell: Cell, notes: Sequence[Note], groups: Groups) -> Loads:
    """The loads that every rank noted."""
    assert cell.config.experts is not None
    count, layout = cell.config.experts.count, cell.layout
    most = max(len(sparse_layers(cell, layout.coordinates(layout.rank_of(pp=pp)))) for pp in range(layout.pp)) * len(cell.token_rows)
    mine = [float(rows) for note in notes for rows in note.loads]
    everyone = groups.world.share(mine + [-1.0] * (most * count - len(mine)))
    return tuple(tuple(_whole(row[first : first + count]) for first in range(0, len(row), count) if row[first] >= 0) for row in everyone)


def sent_rows(cell: Cell, loads: Loads) -> Sent:
    """How many rows go to each expert-parallel rank."""
    assert cell.config.experts is not None
    here = cell.config.experts.count // cell.layout.ep
    return tuple(tuple(_whole(sum(one[first : first + here]) for first in range(0, len(one), here)) for one in rank) for rank in loads)


def used_experts(cell: Cell, notes: Sequence[Note], groups: Groups, device: torch.device) -> tuple[Tensor, int]:
    """The experts [L, N, K] that each token got on any rank, -1 in layers without experts; and for how many tokens ranks disagree."""
    assert cell.config.experts is not None
    mine = torch.full((cell.layers, cell.tokens, cell.config.experts.top_k), -1, dtype=torch.int64, device=device)
    for note in notes:
        assert note.tokens_n is not None and note.used_nK is not None
        mine[note.layer, note.tokens_n] = note.used_nK
    everyone = mine.new_empty(groups.world.size * cell.layers, *mine.shape[1:])
    groups.world.all_gather(everyone, mine).wait()
    by_rank = everyone.unflatten(0, (groups.world.size, cell.layers))
    used = by_rank.amax(0)
    differ = ((by_rank != used) & (by_rank >= 0)).any(3).any(0)
    return used, int(differ.sum())


def choices_of(cell: Cell, notes: Sequence[Note]) -> Choices | None:
    """What the ranks of one device noted in detail, together; None without experts."""
    experts = cell.config.experts
    if experts is None or not notes:
        return None
    first = notes[0].scores_nE
    assert first is not None
    chosen = torch.full((cell.layers, cell.tokens, experts.top_k), -1, dtype=torch.int64, device=first.device)
    scores = first.new_zeros(cell.layers, cell.tokens, experts.count)
    margins = first.new_full((cell.layers, cell.tokens), float("inf"))
    for note in notes:
        assert note.tokens_n is not None and note.own_nK is not None and note.scores_nE is not None and note.margins_n is not None
        place = note.layer, note.tokens_n
        chosen[place], scores[place], margins[place] = note.own_nK, note.scores_nE, note.margins_n
    return Choices(chosen, scores, margins)


def _whole(values: object) -> tuple[int, ...]:
    return tuple(int(value) for value in values)  # type: ignore[attr-defined]
