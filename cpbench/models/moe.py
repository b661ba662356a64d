"""The sparse feed-forward block: routed experts (Qwen3-MoE, DeepSeek V2 and V3), and shared ones that see every token.

A rank has some experts, and of each some columns (expert axes of the layout). Rows come to it in one of two ways (sharding.py). *Gather*: it
sees the rows of its unit and computes its experts for those that chose them. *All-to-all*: a row travels once for each of its experts to
the rank that has it, and the result travels back (as Megatron-Core's dispatcher does; DeepEP sends a row once to a rank). Either way rows
are sorted by expert, so that there is one GEMM per expert, or one grouped GEMM, and what came out is summed per token in fp32 (fp64 for
fp64 rows) in the order of the experts, then rounded once. Shared experts are a dense block, cut as the dense block is: over dp and tp.

Shapes: n rows of a rank, u of its unit, K experts of a row, P = pairs of a row and one of its experts, M hidden, I columns of an expert here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from cpbench.communicator import Communicator, Dispatch
from cpbench.models.config import ModelConfig
from cpbench.models.invariant import InvariantWeight, sum_of_experts
from cpbench.models.linear import Weight, fill, grouped_linear, has_grouped, linear, room_for
from cpbench.models.mlp import DenseMLP, activated
from cpbench.models.router import Choice, Router
from cpbench.models.weights import Weights
from cpbench.sharding import Shard
from cpbench.tracing.spans import EXPERTS, ROUTE, SHARED


class SparseMLP:
    """The routed and shared experts of one layer that a rank has. `experts` and `columns` are its parts of them, `shared` that of the shared ones."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, layer: int, experts: Shard, columns: Shard, shared: Shard) -> None:
        assert config.experts is not None
        self.count = config.experts.count
        here = self.count // experts.size
        self.mine = range(experts.rank * here, (experts.rank + 1) * here)
        self.router = Router(config, weights, f"{prefix}.gate", layer)
        width = config.experts.intermediate
        part = width // columns.size
        cut, shape = range(columns.rank * part, (columns.rank + 1) * part), (width, config.hidden)
        for index, expert in enumerate(self.mine):
            name = f"{prefix}.experts.{expert}"
            gate_up = weights.hold(torch.cat([weights.linear(f"{name}.{which}.weight", shape, cut) for which in ("gate_proj", "up_proj")]))
            down = weights.hold(weights.linear(f"{name}.down_proj.weight", shape[::-1], columns=cut), is_summed=True)
            if index == 0:
                self.gate_up_weight, self.down_weight = room_for(here, gate_up), room_for(here, down)
            fill(self.gate_up_weight, index, gate_up)
            fill(self.down_weight, index, down)
        self.is_deterministic = isinstance(self.down_weight, InvariantWeight)
        shared_width = config.experts.shared * width
        self.shared = DenseMLP(config, weights, f"{prefix}.shared_experts", shared, shared_width) if shared_width else None

    def forward(self, normed: Callable[[], Tensor], communicator: Communicator) -> Tensor:
        """The block's output [n, M] for this rank's rows. `normed` makes the input."""
        x_nM = communicator.enter_experts(normed())
        rows, shared = len(x_nM), None
        if self.shared is not None:
            with SHARED():
                shared = communicator.scatter_shared(self.shared.partial(communicator.incoming_shared(x_nM, self.shared.axes)))
        x_uM = communicator.gather_unit(x_nM)
        del x_nM
        with ROUTE():
            choice = self.router.forward(x_uM, communicator.routing)
        with EXPERTS():
            routed = self._exchanged(x_uM, choice, communicator) if communicator.unit.alltoall else self._local(x_uM, choice)
        del x_uM
        return communicator.combine_unit(routed, rows, shared)

    def _local(self, x_uM: Tensor, choice: Choice) -> Tensor:
        """Sums [u, M] over the experts here: rows are sorted by expert, and those of experts elsewhere left out."""
        here = len(self.mine)
        local_uK = choice.experts_nK - self.mine.start
        absent_uK = (local_uK < 0) | (local_uK >= here)
        sorted_P, loads = _by_expert(local_uK.masked_fill_(absent_uK, here), here + 1)
        counts: list[int] = loads[:here].tolist()
        pairs = sum(counts)
        out_PM = self._compute(x_uM[sorted_P[:pairs] // local_uK.shape[1]], counts)
        places_uK = _places(sorted_P, local_uK)
        if self.is_deterministic:  # all experts are here
            return _summed_in_tree(out_PM, places_uK, choice, self.count)
        return _summed(out_PM, places_uK, choice.weights_nK.masked_fill(absent_uK.to(choice.weights_nK.device), 0), x_uM)

    def _exchanged(self, x_uM: Tensor, choice: Choice, communicator: Communicator) -> Tensor:
        """Sums [u, M] over all experts, each computed where it is."""
        sorted_P, loads = _by_expert(choice.experts_nK, self.count)
        dispatch = communicator.dispatch(loads)
        out_PM = dispatch.back(self._visited(dispatch.to_experts(x_uM[sorted_P // choice.experts_nK.shape[1]]), dispatch))
        places_uK = _places(sorted_P, choice.experts_nK)
        if self.is_deterministic:
            return _summed_in_tree(out_PM, places_uK, choice, self.count)
        return _summed(out_PM, places_uK, choice.weights_nK, x_uM)

    def _visited(self, x_RM: Tensor, dispatch: Dispatch) -> Tensor:
        """The experts here on rows [R, M] that came by sender and expert; in the same order."""
        experts_R = torch.arange(len(self.mine), device=x_RM.device).repeat(len(dispatch.received)).repeat_interleave(dispatch.counts.flatten())
        order_R = experts_R.argsort(stable=True)
        x_RM = x_RM[order_R]
        out_RM = self._compute(x_RM, dispatch.counts.sum(0).tolist())
        del x_RM
        back_RM = torch.empty_like(out_RM)
        back_RM[order_R] = out_RM
        return back_RM

    def _compute(self, x_PM: Tensor, counts: list[int]) -> Tensor:
        """Every expert on its rows, which lie one after the other; may overwrite them."""
        if has_grouped(x_PM, self.gate_up_weight):
            return _grouped(x_PM, counts, self.gate_up_weight, self.down_weight)
        for index, rows_pM in enumerate(x_PM.split(counts)):
            if len(rows_pM):
                rows_pM.copy_(activated(linear(rows_pM, self.gate_up_weight[index]), self.down_weight[index]))
        return x_PM


def _grouped(x_PM: Tensor, counts: list[int], gate_up_EIM: Weight, down_EMI: Weight) -> Tensor:
    """The experts on their rows, by grouped GEMMs."""
    ends_E = torch.tensor(counts, device=x_PM.device).cumsum(0, dtype=torch.int32)
    gate, up = grouped_linear(x_PM, gate_up_EIM, ends_E).chunk(2, 1)
    F.silu(gate, inplace=True).mul_(up)
    return grouped_linear(gate, down_EMI, ends_E)


def _by_expert(experts_uK: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Pairs (row * K + slot) in the order of their experts, and of those in the order of the rows; and how many each expert has."""
    flat = experts_uK.flatten()
    return flat.argsort(stable=True), torch.bincount(flat, minlength=count)


def _places(sorted_P: Tensor, experts_uK: Tensor) -> Tensor:
    """Where the pairs of each row are [u, K] after sorting."""
    places_P = torch.empty_like(sorted_P)
    places_P[sorted_P] = torch.arange(len(sorted_P), device=sorted_P.device)
    return places_P.view_as(experts_uK)


def _summed_in_tree(out_PM: Tensor, places_uK: Tensor, choice: Choice, count: int) -> Tensor:
    """The same in a binary tree over all `count` experts, whose nodes have the dtype of `out_PM`."""
    values_uKM = out_PM.new_empty(*places_uK.shape, out_PM.shape[1])
    for slot in range(places_uK.shape[1]):
        values_uKM[:, slot] = out_PM[places_uK[:, slot]] * choice.weights_nK[:, slot, None]
    return sum_of_experts(values_uKM.flatten(0, 1), choice.experts_nK, count)


def _summed(out_PM: Tensor, places_uK: Tensor, weights_uK: Tensor, like_uM: Tensor) -> Tensor:
    """Weighted sums [u, M] over the experts of each row, in their order. Pairs without a row in `out_PM` have the weight zero."""
    sums_uM = torch.zeros_like(like_uM, dtype=weights_uK.dtype)
    if len(out_PM):
        for slot in range(places_uK.shape[1]):
            sums_uM.addcmul_(out_PM[places_uK[:, slot].clamp(max=len(out_PM) - 1)], weights_uK[:, slot, None])
    return sums_uM.to(like_uM.dtype)
