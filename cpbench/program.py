"""What one rank runs for one cell: its inputs, its shard of the model, its plan, and one pass.

The same program runs on CPU and CUDA, under process groups and on the local backend, for the small check and at full size. How often
it runs, and what is measured around it, is decided in worker.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from cpbench.buffers import Buffers
from cpbench.cache import KVCache, StepCache
from cpbench.cell import Cell
from cpbench.communicator import Communicator
from cpbench.distributed.collectives import LocalWorld
from cpbench.distributed.mesh import Groups, local_groups
from cpbench.formulas import cached_tokens
from cpbench.kernels.base import Kernel
from cpbench.layout import Layout
from cpbench.models.attention import HeadSlice
from cpbench.models.decoder import Decoder, FirstTokens, Shard
from cpbench.models.weights import RandomWeights, token_ids
from cpbench.paging import BlockTable, plan_cache
from cpbench.partition import packed
from cpbench.strategies import STRATEGIES
from cpbench.strategies.base import Context, ParallelAttention, Strategy, cached_rows, row_index, row_values


@dataclass(frozen=True)
class Output:
    """What a pass leaves: hidden states or attention output [n, ...] of this rank's tokens, and the first tokens of a prefill.

    A pass in chunks leaves no rows unless its program was told to keep them.
    """

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


@dataclass(frozen=True)
class Stage:
    """One step of a pass on one rank: its tokens, where they lie among the rank's rows of all steps, and the attention planned for it."""

    positions: Tensor
    rows: slice
    last_rows: dict[int, int]
    attention: ParallelAttention


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
        self.heads = HeadSlice.of(cell.config, groups.tp.rank, groups.tp.size)
        self.buffers, self.scale = Buffers(), cell.config.head_dim**-0.5
        self.tokens = row_index(cell.packed_tokens(cell.blocks(groups.cp.rank)), device)
        self.cache, caches = self._cache()
        self.stages = self._stages(kernel, caches)
        self.communicator = Communicator(groups)
        self.models = models or Models()
        self.inputs: list[Tensor] = []
        self.parameters: list[Tensor] = []
        self.keeps_rows = len(self.stages) == 1  # of chunks, a server keeps the rows of the one at hand
        self.run, self.prepare = self._build()

    def _cache(self) -> tuple[KVCache, list[StepCache]]:
        """The K/V cache with its prefixes, and what each step sees of it."""
        cell, cp_rank, steps = self.cell, self.groups.cp.rank, self.cell.steps
        keep, strategy = cell.kv_cache == "keep", STRATEGIES[cell.steps[0].strategy]
        lanes = strategy.cache_heads(steps[0], cp_rank)
        if not cell.paged:
            cache = KVCache(keep, None, len(lanes))
            return cache, [StepCache(cache, None, self.device)]
        table = BlockTable.allocate(cached_tokens(cell, cp_rank), cell.tokens_per_page, cell.cache_tokens)
        cache = KVCache(keep, table, len(lanes))
        plans = [plan_cache(table, strategy.cached(step, cp_rank), strategy.stored(step, cp_rank) if keep else []) for step in steps]
        views = [StepCache(cache, plan, self.device) for plan in plans]
        if any(cell.prefixes):
            self._fill(views[0], row_index(_prefix_tokens(steps[0], strategy, cp_rank), self.device), lanes)
        return cache, views

    def _fill(self, view: StepCache, tokens: Tensor, lanes: Sequence[Sequence[int]]) -> None:
        """Put the cached prefixes into their pages, for every layer that keeps its own."""
        for layer in range(self.cell.layers if view.cache.keep else 1):
            for lane, local in enumerate(lanes):
                rows = [x.flatten(1) for x in self.cached_inputs(layer, tokens, [self.heads.kv[head] for head in local])]
                view.fill(layer * len(lanes) + lane, torch.cat(rows, 1))

    def cached_inputs(self, layer: int, tokens: Tensor | None = None, heads: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Cached K and V [tokens, heads, D]: random values of the layer, token and head, so that every layout has the same prefix.

        `tokens` number all cached tokens of the batch; without it all, for all heads of this rank.
        """
        dim, heads = self.cell.config.head_dim, self.heads.kv if heads is None else heads
        tokens = torch.arange(sum(self.cell.prefixes)) if tokens is None else tokens
        columns = torch.cat([torch.arange(head * dim, (head + 1) * dim) for head in heads])
        k, v = (self.weights.values(f"cache.{layer}.{name}", tokens, columns, 1.0).unflatten(1, (len(heads), dim)) for name in ("k", "v"))
        return k, v

    def _stages(self, kernel: Kernel, caches: Sequence[StepCache]) -> list[Stage]:
        cp_rank, first, stages = self.groups.cp.rank, 0, []
        totals = [prefix + length for prefix, length in zip(self.cell.prefixes, self.cell.lengths, strict=True)]
        for step, cache in zip(self.cell.steps, caches, strict=True):
            strategy, split = STRATEGIES[step.strategy], step.split
            done = [prefix + length for prefix, length in zip(step.prefixes, step.lengths, strict=True)]
            last_rows = {sequence: row for sequence, row in split.last_rows(cp_rank).items() if done[sequence] == totals[sequence]}
            context = Context(self.groups, kernel, self.buffers, cache, self.scale)
            attention = ParallelAttention(strategy, strategy.plan(step, cp_rank), context)
            stages.append(Stage(row_index(split.positions(cp_rank), self.device), slice(first, first + split.rows(cp_rank)), last_rows, attention))
            first += split.rows(cp_rank)
        return stages

    def _build(self) -> tuple[Callable[[], Output], Callable[[], object]]:
        cell = self.cell
        if cell.target == "attention":
            return self._attention(), lambda: None
        self.decoder = self.models.get(cell, self.weights, Shard(self.groups.tp.rank, self.groups.tp.size))
        self.parameters = self.decoder.parameters()
        positions = [stage.positions for stage in self.stages]
        if cell.target == "prefill":
            ids = token_ids(cell.seed, cell.lengths, cell.config.vocab).to(self.device)[self.tokens]
            self.inputs = [ids, *positions]
            return lambda: self._prefill(ids), lambda: None
        hidden = torch.empty(len(self.tokens), cell.config.hidden, dtype=self.dtype, device=self.device)
        self.inputs = [hidden, *positions]
        return lambda: self._layers(hidden), lambda: self._refill(hidden)

    def _refill(self, hidden: Tensor) -> None:
        """Put the input of a layer back: a pass adds to it in place."""
        hidden.copy_(self.weights.values("input", self.tokens, torch.arange(hidden.shape[1]), 1.0))

    def attention_inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """q [n, H, D], k and v [n, G, D] of this rank: functions of the global token and head, so that every layout has the same."""
        dim = self.cell.config.head_dim
        q, k, v = (
            self.weights.values(name, self.tokens, torch.arange(part.start * dim, part.stop * dim), 1.0).unflatten(1, (len(part), dim))
            for name, part in (("q", self.heads.q), ("k", self.heads.kv), ("v", self.heads.kv))
        )
        return q, k, v

    def _attention(self) -> Callable[[], Output]:
        """Attention alone: K and V lie where a model would have written them. Chunks share that place, so theirs are put there in the pass."""
        q, k, v = self.attention_inputs()
        new_rows = torch.cat([k.flatten(1), v.flatten(1)], 1)
        self.inputs = [q]
        if len(self.stages) > 1:
            self.inputs.append(new_rows)
        else:
            self.stages[0].attention.rows(0, (len(self.tokens), row_values(self.cell)), q).copy_(new_rows)
            del new_rows

        def open_rows(rows_SW: Tensor) -> tuple[Tensor, Tensor]:
            k, v = rows_SW.chunk(2, 1)
            return k.unflatten(1, (-1, q.shape[2])), v.unflatten(1, (-1, q.shape[2]))

        def run() -> Output:
            outputs = []
            for stage in self.stages:
                n = stage.rows.stop - stage.rows.start
                rows = stage.attention.rows(0, (n, row_values(self.cell)), q)
                if len(self.stages) > 1:
                    rows.copy_(self.inputs[1][stage.rows])
                outputs.append(stage.attention.attend(q[stage.rows], rows, open_rows, 0))
                self._settle(outputs)
            return Output(_joined(outputs))

        return run

    def _layers(self, hidden: Tensor) -> Output:
        for stage in self.stages:
            self.decoder.run_layers(hidden[stage.rows], stage.positions, stage.attention, self.communicator)
        return Output(hidden)

    def _prefill(self, ids: Tensor) -> Output:
        last_BM = torch.zeros(len(self.cell.lengths), self.cell.config.hidden, dtype=self.dtype, device=self.device)
        outputs: list[Tensor] = []
        for stage in self.stages:
            x_nM = self.decoder.embed(ids[stage.rows], self.communicator)
            outputs.append(self.decoder.run_layers(x_nM, stage.positions, stage.attention, self.communicator))
            for sequence, row in stage.last_rows.items():
                last_BM[sequence] = x_nM[row]
            del x_nM
            self._settle(outputs)
        last_BM = self.communicator.share_last(last_BM, not self.cell.steps[-1].split.replicated)
        return Output(_joined(outputs), self.decoder.first_tokens(last_BM, self.communicator))

    def _settle(self, outputs: list[Tensor]) -> None:
        """After a step: its rows are dropped unless they are wanted, and copied out of reused buffers where more steps follow."""
        if not self.keeps_rows:
            outputs.clear()
        elif len(self.stages) > 1:
            outputs[-1] = outputs[-1].clone()

    def set_kernel(self, kernel: Kernel) -> None:
        """Attend with another kernel from the next pass on."""
        for index, stage in enumerate(self.stages):
            context = replace(stage.attention.context, kernel=kernel)
            self.stages[index] = replace(stage, attention=replace(stage.attention, context=context))

    def tensors(self) -> list[tuple[str, Tensor]]:
        """(category, tensor) of everything that is held between passes."""
        held = [*self.buffers.tensors(), *self.cache.tensors()]
        held += [("weights", tensor) for tensor in self.parameters]
        return held + [("activations", tensor) for tensor in self.inputs]


def _prefix_tokens(step: Cell, strategy: Strategy, cp_rank: int) -> list[range]:
    """A number for every cached token of the batch: those that a rank has, in the order of its cache."""
    starts = [0, *accumulate(step.prefixes)]
    return [packed(block, starts[block.sequence]) for block, _ in cached_rows(strategy.cached(step, cp_rank))]


def _joined(outputs: list[Tensor]) -> Tensor:
    """The rows of all steps that were kept."""
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0] if outputs else torch.empty(0)


def alone() -> Groups:
    """The groups of a single rank, without a process group."""
    return local_groups(Layout(), LocalWorld(1), 0)


def run_locally(cell: Cell, kernel: Kernel, device: torch.device, rounded_to: torch.dtype | None = None) -> list[tuple[Tensor, Output]]:
    """Every rank's (token indices, output), all ranks as threads of this process."""
    world = LocalWorld(cell.world_size)

    def rank_program(rank: int) -> Any:
        program = Program(cell, local_groups(cell.layout, world, rank), kernel, device, rounded_to=rounded_to)
        program.keeps_rows = True
        program.prepare()
        return program.tokens, program.run()

    return world.run(rank_program)
