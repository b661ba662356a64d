"""The decoders that a process holds, and where their weights and tokens come from: random ones, or a checkpoint and a text.

What a cell names is looked up here; what it may name is decided in the driver's process (checkpoint.py, prompt.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cpbench.cell import Cell
from cpbench.models.checkpoint import Checkpoint
from cpbench.models.decoder import Decoder, Slice
from cpbench.models.weights import CheckpointWeights, RandomWeights, Weights, token_ids


class Models:
    """The decoders of a process, so that cells that differ in strategy or length only make their weights once.

    At most two are held: the one that is measured and the small one that proves numerics. `folder`: of the checkpoint that cells name, `prompt`:
    the tokens of the text that they name.
    """

    def __init__(self, folder: str | None = None, prompt: Sequence[int] | None = None) -> None:
        self.folder, self.prompt = folder, prompt
        self._opened: Checkpoint | None = None
        self._decoders: dict[tuple[object, ...], Decoder] = {}

    def get(self, cell: Cell, random: RandomWeights, part: Slice) -> Decoder:
        """The decoder of this cell, made if it is not at hand."""
        weights: Weights = random if cell.weights is None else self._checkpoint(cell.weights, random)
        key = (cell.config, part, weights)
        decoder = self._decoders.pop(key, None)
        if decoder is None:
            while len(self._decoders) > 1:
                del self._decoders[next(iter(self._decoders))]
            decoder = Decoder(cell.config, weights, part)
        self._decoders[key] = decoder
        return decoder

    def token_ids(self, cell: Cell) -> Tensor:
        """Of the packed batch [N], the same on every rank."""
        return token_ids(cell.seed, cell.lengths, cell.config.vocab) if cell.prompt is None else torch.tensor(self.prompt)

    def _checkpoint(self, name: str, random: RandomWeights) -> CheckpointWeights:
        """The weights of a checkpoint, in the dtype and on the device of random ones. Raises RuntimeError where it has changed since the start."""
        if self._opened is None:
            self._opened = Checkpoint.open(self.folder or "")
        if self._opened.name != name:
            raise RuntimeError(f"the checkpoint is {self._opened.name} by now, not {name}")
        return CheckpointWeights(self._opened, random.dtype, random.device, random.rounded_to, random.quant, random.deterministic)
