"""The dense feed-forward block: down(silu(gate(x)) * up(x)), column- then row-parallel over the ranks that share its weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cpbench.models.config import ModelConfig
from cpbench.models.weights import RandomWeights
from cpbench.sharding import DENSE_MLP, Shard


class DenseMLP:
    """Gate and up are one matrix, so that the input is read once."""

    axes = DENSE_MLP

    def __init__(self, config: ModelConfig, weights: RandomWeights, prefix: str, shard: Shard) -> None:
        width = config.intermediate // shard.size
        mine = range(shard.rank * width, (shard.rank + 1) * width)
        shape = (config.intermediate, config.hidden)
        self.gate_up_weight = torch.cat([weights.linear(f"{prefix}.{name}.weight", shape, mine) for name in ("gate_proj", "up_proj")])
        self.down_weight = weights.linear(f"{prefix}.down_proj.weight", shape[::-1], columns=mine)

    def forward(self, x_nM: Tensor) -> Tensor:
        """Partial sums of the block's output [n, M]."""
        gate, up = F.linear(x_nM, self.gate_up_weight).chunk(2, 1)
        del x_nM
        F.silu(gate, inplace=True).mul_(up)
        return F.linear(gate, self.down_weight)
