"""What one rank runs for one cell: its inputs, its shard of the model, its plan, and one pass.

The same program runs on CPU and CUDA, under process groups and on the local backend, for the small check and at full size. How often
it runs, and what is measured around it, is decided in worker.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cpbench.buffers import Buffers, KVCache
from cpbench.cell import Cell
from cpbench.communicator import Communicator
from cpbench.distributed.collectives import LocalWorld
from cpbench.distributed.mesh import Groups, local_groups
from cpbench.kernels.base import Kernel
from cpbench.layout import Layout
from cpbench.models.attention import HeadSlice
from cpbench.models.decoder import Decoder, FirstTokens, Shard
from cpbench.models.weights import RandomWeights, token_ids
from cpbench.strategies import STRATEGIES
from cpbench.strategies.base import Context, ParallelAttention, row_index, row_values


@dataclass(frozen=True)
class Output:
    """What a pass leaves: hidden states or attention output [n, ...] of this rank's tokens, and the first tokens of a prefill."""

    rows: Tensor
    first: FirstTokens | None = None


class Models:
    """The decoders of a process, so that cells that differ in strategy or length only make their weights once.

    At most two are held: the one that is measured and the small one that proves numerics.
    """

    def __init__(self) -> None:
        self._decoders: dict[tuple[object, ...], Decoder] = {}

    def get(self, cell: Cell, weights: RandomWeights, shard: Shard) -> Decoder:
        """The decoder of this cell, made if it is not at hand."""
        key = (cell.config, cell.layers, cell.target == "prefill", weights, shard)
        decoder = self._decoders.pop(key, None)
        if decoder is None:
            while len(self._decoders) > 1:
                del self._decoders[next(iter(self._decoders))]
            decoder = Decoder(cell.config, weights, cell.layers, shard, ends=cell.target == "prefill")
        self._decoders[key] = decoder
        return decoder


class Program:
    """One rank's part of a cell. `run()` is one pass; `prepare()` puts back what a pass changes and is not part of it."""

    def __init__(
        self,
        cell: Cell,
        groups: Groups,
        kernel: Kernel,
        device: torch.device,
        models: Models | None = None,
        rounded_to: torch.dtype | None = None,
    ) -> None:
        self.cell, self.groups, self.device = cell, groups, device
        self.dtype: torch.dtype = getattr(torch, cell.dtype)
        self.weights = RandomWeights(cell.seed, self.dtype, device, rounded_to)
        split, cp_rank = cell.split, groups.cp.rank
        self.tokens = row_index(split.tokens(cp_rank), device)
        self.last_rows = split.last_rows(cp_rank)
        self.buffers, self.cache = Buffers(), KVCache(cell.kv_cache == "keep")
        self.scale = cell.config.head_dim**-0.5
        context = Context(groups.cp, kernel, self.buffers, self.cache, self.scale)
        strategy = STRATEGIES[cell.strategy]
        self.attention = ParallelAttention(strategy, strategy.plan(cell, cp_rank), context)
        self.communicator = Communicator(groups)
        self.models = models or Models()
        self.inputs: list[Tensor] = []
        self.parameters: list[Tensor] = []
        self.run, self.prepare = self._build(row_index(split.positions(cp_rank), device))

    def _build(self, positions: Tensor) -> tuple[Callable[[], Output], Callable[[], object]]:
        cell = self.cell
        if cell.target == "attention":
            return self._attention(), lambda: None
        self.decoder = self.models.get(cell, self.weights, Shard(self.groups.tp.rank, self.groups.tp.size))
        self.parameters = self.decoder.parameters()
        if cell.target == "prefill":
            ids = token_ids(cell.seed, cell.lengths, cell.config.vocab).to(self.device)[self.tokens]
            self.inputs = [ids, positions]
            return lambda: self._prefill(ids, positions), lambda: None
        hidden = torch.empty(len(self.tokens), cell.config.hidden, dtype=self.dtype, device=self.device)
        self.inputs = [hidden, positions]
        run = self.decoder.run_layers
        return lambda: Output(run(hidden, positions, self.attention, self.communicator)), lambda: self._refill(hidden)

    def _refill(self, hidden: Tensor) -> None:
        """Put the input of a layer back: a pass adds to it in place."""
        hidden.copy_(self.weights.values("input", self.tokens, torch.arange(hidden.shape[1]), 1.0))

    def attention_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """q [n, H, D], k and v [n, G, D] of this rank: functions of the global token and head, so that every layout has the same."""
        dim = self.cell.config.head_dim
        heads = HeadSlice.of(self.cell.config, self.groups.tp.rank, self.groups.tp.size)
        q, k, v = (
            self.weights.values(name, self.tokens, torch.arange(part.start * dim, part.stop * dim), 1.0).unflatten(1, (len(part), dim))
            for name, part in (("q", heads.q), ("k", heads.kv), ("v", heads.kv))
        )
        return q, k, v

    def _attention(self) -> Callable[[], Output]:
        q, k, v = self.attention_inputs()
        rows = self.attention.rows(0, (len(self.tokens), row_values(self.cell)), q)
        rows.copy_(torch.cat([k.flatten(1), v.flatten(1)], 1))
        self.inputs = [q]

        def open_rows(rows_SW: Tensor) -> tuple[Tensor, Tensor]:
            k, v = rows_SW.chunk(2, 1)
            return k.unflatten(1, (-1, q.shape[2])), v.unflatten(1, (-1, q.shape[2]))

        return lambda: Output(self.attention.attend(q, rows, open_rows, 0))

    def _prefill(self, ids: Tensor, positions: Tensor) -> Output:
        x_nM = self.decoder.embed(ids, self.communicator)
        x_nM = self.decoder.run_layers(x_nM, positions, self.attention, self.communicator)
        return Output(x_nM, self.decoder.first_tokens(x_nM, self.last_rows, len(self.cell.lengths), self.communicator))

    def set_kernel(self, kernel: Kernel) -> None:
        """Attend with another kernel from the next pass on."""
        self.attention = replace(self.attention, context=replace(self.attention.context, kernel=kernel))

    def tensors(self) -> list[tuple[str, Tensor]]:
        """(category, tensor) of everything that is held between passes."""
        held = [*self.buffers.tensors(), *self.cache.tensors()]
        held += [("weights", tensor) for tensor in self.parameters]
        return held + [("activations", tensor) for tensor in self.inputs]


def alone() -> Groups:
    """The groups of a single rank, without a process group."""
    return local_groups(Layout(), LocalWorld(1), 0)


def run_locally(cell: Cell, kernel: Kernel, device: torch.device, rounded_to: torch.dtype | None = None) -> list[tuple[Tensor, Output]]:
    """Every rank's (token indices, output), all ranks as threads of this process."""
    world = LocalWorld(cell.world_size)

    def rank_program(rank: int) -> Any:
        program = Program(cell, local_groups(cell.layout, world, rank), kernel, device, rounded_to=rounded_to)
        program.prepare()
        return program.tokens, program.run()

    return world.run(rank_program)
