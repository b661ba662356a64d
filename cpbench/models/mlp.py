"""The dense feed-forward block: down(silu(gate(x)) * up(x)), column- then row-parallel over the ranks that share its weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cpbench.communicator import Communicator, Incoming, Partial
from cpbench.device_kind import kind_of
from cpbench.models.config import ModelConfig
from cpbench.models.invariant import rows_at_a_time
from cpbench.models.linear import Projection, Weight, linear
from cpbench.models.weights import Weights
from cpbench.sharding import DENSE_MLP, Shard


class DenseMLP:
    """Gate and up are one matrix, so that the input is read once. Shared experts are such a block of another width."""

    axes = DENSE_MLP

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, shard: Shard, width: int | None = None) -> None:
        whole = width or config.intermediate
        part = whole // shard.size
        mine = range(shard.rank * part, (shard.rank + 1) * part)
        shape = (whole, config.hidden)
        self.gate_up_weight = weights.hold(torch.cat([weights.linear(f"{prefix}.{name}.weight", shape, mine) for name in ("gate_proj", "up_proj")]))
        self.down_weight = weights.hold(weights.linear(f"{prefix}.down_proj.weight", shape[::-1], columns=mine), is_summed=True)

    def forward(self, normed: Callable[[], Tensor], communicator: Communicator) -> Tensor:
        """The block's output for this rank's rows. `normed` makes the input; calls are nested so that no name keeps it alive once it is read."""
        return communicator.complete(self.partial(communicator.incoming(normed(), self.axes)))

    def partial(self, x: Incoming) -> Partial:
        """Partial sums of the block's output."""
        (gated_nI,) = x.cut(Projection(self.gate_up_weight, then=gated))
        return Partial(gated_nI, self.axes, self.down_weight)


def gated(gate_up_nI: Tensor) -> Tensor:
    """silu(gate) * up [n, I] of gate and up side by side, in the place of gate."""
    gate, up = gate_up_nI.chunk(2, 1)
    step = len(gate) if kind_of(gate) == "cuda" else rows_at_a_time(gate.shape[1])  # on CPU a few rows stay in cache, and each is computed alike (invariant.py)
    for first in range(0, len(gate), max(1, step)):
        rows = slice(first, first + step)
        F.silu(gate[rows], inplace=True).mul_(up[rows])
    return gate


def activated(gate_up_nI: Tensor, down_weight: Weight) -> Tensor:
    """down(silu(gate) * up) [n, M] of gate and up side by side, which are overwritten."""
    return linear(gated(gate_up_nI), down_weight)
