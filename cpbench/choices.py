"""What a pass chose by comparing scores: experts of tokens, keys of queries. Noted while somebody watches, so that answers can be judged.

A score that is off in its last bit can flip a choice, and the answer with it. So a pass can be told what to choose: answers that then
differ by more than rounding are wrong, and the choices themselves are judged by their scores (numerics.py). How experts are chosen is
decided in models/router.py, how keys are in kernels/selection.py.

    n rows   K chosen ones   E scores of a row   L layers   N tokens of the batch
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from cpbench.distributed.collectives import Group


class Forced(NamedTuple):
    """What a pass uses in place of its own choices: experts [L, N, K], and the places of keys in their sequences [L, N, K]."""

    experts_LNK: Tensor | None = None
    keys_LNK: Tensor | None = None


@dataclass(frozen=True)
class Note:
    """What was chosen in one layer of one step: how many rows each expert got; in detail the tokens, what was used, what it would have
    chosen itself, the scores that it chose by, and by how much the last expert (or group) chosen leads the first one left out."""

    layer: int
    loads: list[int] = field(default_factory=list)
    tokens_n: Tensor | None = None
    used_nK: Tensor | None = None
    own_nK: Tensor | None = None
    scores_nE: Tensor | None = None
    margins_n: Tensor | None = None


@dataclass
class ChoiceLog:
    """The notes of a rank, in the order of steps and layers, taken only while somebody watches: timed passes pay nothing.

    `forced` [layers, tokens, K]: what to use in place of an own choice.
    """

    watching: bool = False
    detailed: bool = False
    forced_LNK: Tensor | None = None
    notes: list[Note] = field(default_factory=list)

    def watch(self, *, detailed: bool = False, forced_LNK: Tensor | None = None) -> None:
        """Note the choices of the next pass."""
        self.watching, self.detailed, self.forced_LNK, self.notes = True, detailed, forced_LNK, []

    def stop(self) -> list[Note]:
        """Note no more. Returns what was noted."""
        self.watching = False
        return self.notes


@dataclass(frozen=True)
class Used:
    """What each token got in each layer on any rank [L, N, K], -1 in layers without choices; and for how many tokens ranks disagree."""

    chosen_LNK: Tensor
    disagreed: int


@dataclass(frozen=True)
class Choices:
    """The choices of one device, by layer and token of the batch: what it would have used [L, N, K], the scores [L, N, E] that it chose by, and
    by how much the last one chosen leads [L, N] where that was noted. Layers without choices have -1, zeros and infinity."""

    chosen_LNK: Tensor
    scores_LNE: Tensor
    margins_LN: Tensor


def used_by_all(notes: Sequence[Note], shape: tuple[int, int, int], world: Group, device: torch.device) -> Used:
    """What all ranks noted together, in the shape (layers, tokens, chosen ones). Every rank calls."""
    mine = torch.full(shape, -1, dtype=torch.int64, device=device)
    seen = torch.zeros(shape[:2], dtype=torch.bool, device=device)
    for note in notes:
        assert note.tokens_n is not None and note.used_nK is not None
        mine[note.layer, note.tokens_n] = note.used_nK.to(mine)
        seen[note.layer, note.tokens_n] = True
    everyone = mine.new_empty(world.size * shape[0], *shape[1:])
    noted = mine.new_empty(world.size * shape[0], shape[1])
    world.all_gather(everyone, mine).wait()
    world.all_gather(noted, seen.to(mine)).wait()
    by_rank, by_rank_seen = everyone.unflatten(0, (world.size, shape[0])), noted.unflatten(0, (world.size, shape[0])).bool()
    used = by_rank.amax(0)
    differ = (by_rank != used).any(3) & by_rank_seen
    return Used(used, int(differ.any(0).any(0).sum()))


def choices_of(notes: Sequence[Note], layers: int, tokens: int) -> Choices | None:
    """What the ranks of one device noted in detail, together; None where nothing was chosen."""
    if not notes:
        return None
    detailed = [(note.layer, note.tokens_n, note.own_nK, note.scores_nE, note.margins_n) for note in notes]
    most = max(scores.shape[1] for _, _, _, scores, _ in detailed if scores is not None)
    first = notes[0].own_nK
    assert first is not None and notes[0].scores_nE is not None
    chosen = torch.full((layers, tokens, first.shape[1]), -1, dtype=torch.int64, device=first.device)
    scores_LNE = notes[0].scores_nE.new_zeros(layers, tokens, most)
    margins_LN = scores_LNE.new_full((layers, tokens), float("inf"))
    for layer, tokens_n, own_nK, scores_nE, margins_n in detailed:
        assert tokens_n is not None and own_nK is not None and scores_nE is not None
        chosen[layer, tokens_n] = own_nK.to(chosen)
        scores_LNE[layer, tokens_n, : scores_nE.shape[1]] = scores_nE
        if margins_n is not None:
            margins_LN[layer, tokens_n] = margins_n
    return Choices(chosen, scores_LNE, margins_LN)
