"""Hidden states from one pipeline stage to the next, one message for every step of a pass (a chunk is a micro-batch). Forward only.

A stage asks for the rows of its next step before it computes the one at hand, and sends while it goes on, so that stages work at the same
time on different steps. What travels are a rank's own rows, to the rank with the same place in the next stage: context-parallel ranks
never gather in between, and every stage knows positions, lengths and cache places from the plan. With one step, stages wait for each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpbench.distributed.collectives import Group
from cpbench.distributed.flight import Handle
from cpbench.tracing.spans import PIPELINE


class Pipeline:
    """One rank's place in the pipeline. `rows`: this rank's tokens in every step; `like`: a tensor [*, M] of the device and dtype that travel."""

    def __init__(self, group: Group, rows: Sequence[int], like: Tensor) -> None:
        self._group, self._rows, self._like = group, rows, like
        self.is_first, self.is_last = group.rank == 0, group.rank == group.size - 1
        self._coming: tuple[Tensor, Handle] | None = None
        self._going: tuple[Tensor, Handle] | None = None

    def receive(self, step: int) -> Tensor:
        """Hidden states [n, M] of a step from the stage before. Steps come in order."""
        with PIPELINE():
            hidden_nM, handle = self._coming or self._ask(step)
            handle.wait()
            self._coming = self._ask(step + 1) if step + 1 < len(self._rows) else None
            return hidden_nM

    def send(self, hidden_nM: Tensor) -> None:
        """Send the hidden states of a step to the stage behind; those of the step before have left when this returns."""
        self.finish()
        if len(hidden_nM):
            with PIPELINE():
                self._going = hidden_nM, self._group.send(hidden_nM, self._group.rank + 1)

    def finish(self) -> None:
        """Return when everything sent has left."""
        if self._going is not None:
            with PIPELINE():
                self._going[1].wait()
            self._going = None

    def _ask(self, step: int) -> tuple[Tensor, Handle]:
        hidden_nM = torch.empty(self._rows[step], self._like.shape[1], dtype=self._like.dtype, device=self._like.device)
        return hidden_nM, self._group.receive(hidden_nM, self._group.rank - 1) if len(hidden_nM) else Handle()
