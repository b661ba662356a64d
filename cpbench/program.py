"""What one rank runs for one cell: its inputs, its shard of the model, its plan, and one pass.

The same program runs on CPU and CUDA, under process groups and on the local backend, for the small check and at full size. How often
it runs, and what is measured around it, is decided in worker.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from cpbench.buffers import Buffers
from cpbench.cache import KVCache, StepCache
from cpbench.cell import Cell
from cpbench.choices import ChoiceLog
from cpbench.communicator import Communicator
from cpbench.distributed.local import LocalWorld
from cpbench.distributed.mesh import Groups, local_groups
from cpbench.experts import RouterRule
from cpbench.formulas import cached_tokens
from cpbench.kernels.base import Kernel
from cpbench.layout import Layout
from cpbench.models.attention import HeadSlice
from cpbench.models.decoder import FirstTokens, Slice, Watch, shown
from cpbench.models.held import Models
from cpbench.models.latent import absorb_queries, kv_b_weight, latent_rows, release_outputs
from cpbench.models.rope import softmax_scale
from cpbench.models.router import Routing
from cpbench.models.weights import RandomWeights
from cpbench.paging import BlockTable, plan_cache
from cpbench.pipeline import Pipeline
from cpbench.segments import place
from cpbench.selective_attention import IndexQueries, SelectiveAttention
from cpbench.sharding import Unit, dispatch_of, unit_of, unit_pieces
from cpbench.strategies import STRATEGIES
from cpbench.strategies.base import Context, OpenRows, ParallelAttention, cached_rows, keys_and_values, row_index, row_values
from cpbench.tracing.spans import ATTENTION, EMBED, HEAD
from cpbench.visible import in_order


@dataclass(frozen=True)
class Output:
    """What a pass leaves: hidden states or attention output [n, ...] of this rank's tokens, and the first tokens of a prefill.

    A pass in chunks leaves no rows unless its program was told to keep them.
    """

    rows: Tensor
    first: FirstTokens | None = None


@dataclass(frozen=True)
class Step:
    """One step of a pass on one rank: its tokens, where they lie among the rank's rows of all steps, and what is planned for it.

    `rows`: those that it attends with, among all that it attends with; `held`: those that it has between blocks, among all of these.
    `last_rows`: where the last token of each sequence of the part that ends here is, among the rows held in this step. Without attention
    the rank has no rows in this step.
    """

    positions: Tensor
    rows: slice
    held: slice
    last_rows: dict[int, int]
    attention: ParallelAttention | None
    communicator: Communicator


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
        self.place = groups.place
        self.part = cell.parts[self.place.dp].cell
        self.dtype: torch.dtype = getattr(torch, cell.dtype)
        self.weights = RandomWeights(cell.seed, self.dtype, device, rounded_to, cell.quant, cell.deterministic)
        self.slice = Slice.of(cell, groups.rank)
        self.heads = HeadSlice.of(cell.config, self.slice.attention)
        self.buffers, self.scale = Buffers(), softmax_scale(cell.config.head_dim, cell.config.yarn)
        self.attended = row_index(cell.tokens_of(self.place.dp, self.place.cp), device)
        self.cache, caches = self._cache()
        self.log, self.selections = ChoiceLog(), ChoiceLog()
        self.steps = self._steps(kernel, caches)
        held = [step.rows.start + row for step, rows in zip(self.steps, cell.token_rows, strict=True) for row in rows.held(self.place)]
        self.tokens = self.attended[held]  # those that this rank has between blocks, and in its output
        self.models = models or Models()
        self.inputs: list[Tensor] = []
        self.parameters: list[Tensor] = []
        self.keeps_rows = len(self.steps) == 1  # of chunks, a server keeps the rows of the one at hand
        self.watch: Callable[[Tensor, str, Tensor], None] | None = None  # of a prefill: tokens [n], a module, and its output [n, M] for them
        self.run, self.prepare = self._build()

    def _cache(self) -> tuple[KVCache, list[StepCache]]:
        """The K/V cache with its prefixes, and what each step sees of it."""
        part, cp_rank, steps = self.part, self.place.cp, self.part.steps
        keep = part.kv_cache == "keep"
        if not steps or not part.paged:
            lanes = STRATEGIES[steps[0].strategy].cache_heads(steps[0], cp_rank) if steps else ((),)
            cache = KVCache(keep, None, len(lanes))
            return cache, [StepCache(cache, None, self.device) for _ in steps]
        strategy = STRATEGIES[steps[0].strategy]
        lanes = strategy.cache_heads(steps[0], cp_rank)
        table = BlockTable.allocate(cached_tokens(part, cp_rank), part.tokens_per_page, part.cache_tokens)
        cache = KVCache(keep, table, len(lanes))
        plans = [plan_cache(table, strategy.cached(step, cp_rank), strategy.stored(step, cp_rank) if keep else []) for step in steps]
        views = [StepCache(cache, plan, self.device) for plan in plans]
        if any(part.prefixes):
            cached = tuple(block for block, _ in cached_rows(strategy.cached(steps[0], cp_rank)))
            self._fill(views[0], row_index(self.cell.cached_tokens_of(self.place.dp, cached), self.device), lanes)
        return cache, views

    def _fill(self, view: StepCache, tokens: Tensor, lanes: Sequence[Sequence[int]]) -> None:
        """Put the cached prefixes into their pages, for every layer that keeps its own."""
        for layer in self.slice.layers if view.cache.keep and self.cell.target != "attention" else range(1):
            for lane, parts in enumerate(lanes):
                view.fill(layer * len(lanes) + lane, self.cached_inputs(layer, tokens, parts))

    def cached_inputs(self, layer: int, tokens: Tensor | None = None, parts: Sequence[int] | None = None) -> Tensor:
        """Cached rows [tokens, W]: random values of the layer, token and head, so that every layout has the same prefix.

        `tokens` number all cached tokens of the batch; without it all, with all parts of this rank.
        """
        tokens = torch.arange(sum(self.cell.prefixes)) if tokens is None else tokens
        return self._random_rows(f"cache.{layer}.", tokens, range(self.cell.shape.parts) if parts is None else parts)

    def _random_rows(self, name: str, tokens: Tensor, parts: Sequence[int]) -> Tensor:
        """Rows of tokens: K and V of kv heads, or the latent that all heads share."""
        if self.cell.config.latent is not None:
            return self.weights.values(f"{name}latent", tokens, torch.arange(self.cell.shape.row_values), 1.0)
        dim = self.cell.config.head_dim
        columns = torch.cat([torch.arange(self.heads.kv[part] * dim, (self.heads.kv[part] + 1) * dim) for part in parts])
        return torch.cat([self.weights.values(f"{name}{which}", tokens, columns, 1.0) for which in ("k", "v")], 1)

    def _steps(self, kernel: Kernel, caches: Sequence[StepCache]) -> list[Step]:
        cp_rank, first, kept, steps = self.place.cp, 0, 0, []
        totals = [prefix + length for prefix, length in zip(self.part.prefixes, self.part.lengths, strict=True)]
        for index, rows in enumerate(self.cell.token_rows):
            cell, experts = self.cell, self._to_experts(index)
            communicator = Communicator(
                self.groups,
                rows,
                *experts,
                chunks=cell.sp_chunks,
                gathers_low=cell.sp_gather == "latent",
                fused=cell.sp_fused,
                deterministic=cell.deterministic,
            )
            if index >= len(self.part.steps):  # other groups have tokens left
                steps.append(Step(row_index([], self.device), slice(first, first), slice(kept, kept), {}, None, communicator))
                continue
            step, held = self.part.steps[index], rows.held(self.place)
            split = step.split
            done = [prefix + length for prefix, length in zip(step.prefixes, step.lengths, strict=True)]
            ends = {sequence: row for sequence, row in split.last_rows(cp_rank).items() if done[sequence] == totals[sequence]}
            last_rows = {sequence: row - held.start for sequence, row in ends.items() if row in held}
            context = Context(self.groups, kernel, self.buffers, caches[index], self.scale, self.cell.shape)
            attended, mine = slice(first, first + split.rows(cp_rank)), slice(kept, kept + len(held))
            attention = self._attention_of(step, context, self.attended[attended])
            steps.append(Step(row_index(split.positions(cp_rank), self.device), attended, mine, last_rows, attention, communicator))
            first, kept = attended.stop, mine.stop
        return steps

    def _attention_of(self, step: Cell, context: Context, tokens_n: Tensor) -> ParallelAttention:
        """The strategy of a step with its plan; where keys are selected, with the order of those that it brings."""
        strategy, cp_rank = STRATEGIES[step.strategy], self.place.cp
        plan = strategy.plan(step, cp_rank)
        if not step.shape.top_k:
            return ParallelAttention(strategy, plan, context)
        order = in_order(place(step.split.ranks[cp_rank]), strategy.collected(step, cp_rank))
        return SelectiveAttention(strategy, plan, context, order, tokens_n, self.selections)

    def _to_experts(self, index: int) -> tuple[Unit | None, Routing | None]:
        """Which ranks see the same tokens at the experts in a step, and what the routers need there; nothing where there are no experts."""
        cell, steps = self.cell, self.cell.token_rows
        if not cell.has_experts:
            return None, None
        unit, seen = unit_of(cell.layout, self.place, dispatch_of(cell.layout, cell.dispatch)), []
        for dp, cp, rows in unit_pieces(unit, self.place, steps[index]):
            first = sum(before.rows[dp][cp] for before in steps[:index])
            seen.append(row_index(cell.tokens_of(dp, cp), self.device)[first + rows.start : first + rows.stop])
        tokens = torch.cat(seen)
        mine = unit.rows(len(tokens))
        return unit, Routing(RouterRule.parse(cell.router), cell.seed, tokens[mine.start : mine.stop].clone(), self.log)

    def _build(self) -> tuple[Callable[[], Output], Callable[[], object]]:
        cell = self.cell
        if cell.target == "attention":
            return self._attention(), lambda: None
        self.decoder = self.models.get(cell, self.weights, self.slice)
        self.parameters = self.decoder.parameters()
        positions = [step.positions for step in self.steps]
        if cell.target == "prefill":
            ids = self.models.token_ids(cell).to(self.device)[self.attended]
            self.inputs = [ids, *positions]
            return lambda: self._prefill(ids), lambda: None
        hidden = torch.empty(len(self.tokens), cell.config.hidden, dtype=self.dtype, device=self.device)
        self.inputs = [hidden, *positions]
        return lambda: self._layers(hidden), lambda: self._refill(hidden)

    def _refill(self, hidden: Tensor) -> None:
        """Put the input of a layer back: a pass adds to it in place."""
        hidden.copy_(self.weights.values("input", self.tokens, torch.arange(hidden.shape[1]), 1.0))

    def attention_inputs(self) -> tuple[Tensor, Tensor]:
        """q [n, H, D] and rows [n, W] of this rank: functions of the global token and head, so that every layout has the same."""
        config, heads = self.cell.config, self.heads.q
        columns = torch.arange(heads.start * config.head_dim, heads.stop * config.head_dim)
        q_nHD = self.weights.values("q", self.tokens, columns, 1.0).unflatten(1, (len(heads), config.head_dim))
        return q_nHD, self._random_rows("", self.tokens, range(self.cell.shape.parts))

    @cached_property
    def latent_weight(self) -> Tensor:
        """What makes K and V from latents in the first layer."""
        return kv_b_weight(self.cell.config, self.weights, "model.layers.0.self_attn", self.slice.attention)

    def index_queries(self) -> IndexQueries:
        """What the tokens of this rank select keys by, where attention runs alone."""
        indexer = self.cell.config.indexer
        assert indexer is not None, "a model with an indexer"
        q_nX = self.weights.values("index_q", self.tokens, torch.arange(indexer.heads * indexer.dim), 1.0)
        gates_nH = self.weights.values("index_gates", self.tokens, torch.arange(indexer.heads), 1.0)
        return IndexQueries(q_nX.unflatten(1, (indexer.heads, indexer.dim)), gates_nH.to(torch.promote_types(self.dtype, torch.float32)))

    def open_rows(self, absorbed: bool = False) -> OpenRows:
        """What opens the rows of `attention_inputs`: for its queries as they are, or as they are absorbed."""
        config = self.cell.config
        return keys_and_values(config.head_dim) if config.latent is None else latent_rows(self.latent_weight, config.latent, absorbed, self.weights.plain)

    def _attention(self) -> Callable[[], Output]:
        """Attention alone: rows lie where a model would have written them. Chunks share that place, so theirs are put there in the pass."""
        q, new_rows = self.attention_inputs()
        open_rows, latent = self.open_rows(self.slice.absorbed), self.cell.config.latent if self.slice.absorbed else None
        self.parameters = [self.latent_weight] if self.cell.config.latent else []
        if latent is not None:
            q = absorb_queries(q, self.latent_weight, latent)
        self.inputs = [q]
        config = self.cell.config
        index = self.index_queries() if config.indexer else None
        if index is not None:
            self.inputs += [index.q_nHD, index.gates_nH]
        nothing = q.new_empty(0, q.shape[1], config.head_dim if config.latent is None else config.latent.v_dim)  # the output of no rows
        steps = [(step.rows, step.attention) for step in self.steps if step.attention is not None]
        if len(steps) > 1:
            self.inputs.append(new_rows)
        elif steps:
            steps[0][1].rows(0, (len(self.tokens), row_values(self.cell)), q).copy_(new_rows)
            del new_rows

        def run() -> Output:
            outputs = []
            for part, attention in steps:
                n = part.stop - part.start
                rows = attention.rows(0, (n, row_values(self.cell)), q)
                if len(steps) > 1:
                    rows.copy_(self.inputs[-1][part])
                with ATTENTION():
                    if index is not None and isinstance(attention, SelectiveAttention):
                        outputs.append(attention.collect(rows, 0)().answer(IndexQueries(index.q_nHD[part], index.gates_nH[part]), q[part]))
                    else:
                        outputs.append(attention.attend(q[part], rows, open_rows, 0))
                    if latent is not None:
                        outputs[-1] = release_outputs(outputs[-1], self.latent_weight, latent)
                self._settle(outputs)
            return Output(_joined(outputs, nothing))

        return run

    def _layers(self, hidden: Tensor) -> Output:
        for step in self.steps:
            self.decoder.run_layers(hidden[step.held], step.positions, step.attention, step.communicator)
        return Output(hidden)

    def _prefill(self, ids: Tensor) -> Output:
        """Stages pass on the hidden states of every step; the last one keeps those of the last tokens, and has the first tokens."""
        last_BM = torch.zeros(len(self.part.lengths), self.cell.config.hidden, dtype=self.dtype, device=self.device)
        pipeline = Pipeline(self.groups.pp, [step.held.stop - step.held.start for step in self.steps], last_BM)
        outputs: list[Tensor] = []
        for index, step in enumerate(self.steps):
            x_nM = self._embed(ids, step) if pipeline.is_first else pipeline.receive(index)
            x_nM = self.decoder.run_layers(x_nM, step.positions, step.attention, step.communicator, self.watching(step))
            if pipeline.is_last:
                outputs.append(x_nM)
                for sequence, row in step.last_rows.items():
                    last_BM[sequence] = x_nM[row]
            else:
                pipeline.send(x_nM)
            del x_nM
            self._settle(outputs)
        pipeline.finish()
        return Output(_joined(outputs, last_BM), self._first_tokens(last_BM) if pipeline.is_last and self.part.lengths else None)

    def _embed(self, ids: Tensor, step: Step) -> Tensor:
        if step.attention is None:
            return torch.empty(0, self.cell.config.hidden, dtype=self.dtype, device=self.device)
        with EMBED():
            return shown(self.watching(step), self.decoder.embed(ids[step.rows], step.communicator), "embedding")

    def watching(self, step: Step) -> Watch | None:
        """Who watches, told of which tokens the rows are that are held in a step."""
        return None if self.watch is None else partial(self.watch, self.tokens[step.held])

    def _first_tokens(self, last_BM: Tensor) -> FirstTokens:
        """Of this part's sequences, on the last stage."""
        communicator = self.steps[0].communicator
        with HEAD():
            return self.decoder.first_tokens(communicator.share_last(last_BM, not self.part.steps[-1].split.replicated), communicator)

    def _settle(self, outputs: list[Tensor]) -> None:
        """After a step: its rows are dropped unless they are wanted, and copied out of reused buffers where more steps follow."""
        if not self.keeps_rows:
            outputs.clear()
        elif len(self.steps) > 1 and outputs:
            outputs[-1] = outputs[-1].clone()

    def set_kernel(self, kernel: Kernel) -> None:
        """Attend with another kernel from the next pass on."""
        for index, step in enumerate(self.steps):
            if step.attention is not None:
                context = replace(step.attention.context, kernel=kernel)
                self.steps[index] = replace(step, attention=replace(step.attention, context=context))

    def watch_routers(self) -> None:
        """Note how many rows each expert gets in the next pass."""
        if self.cell.has_experts:
            self.log.watch()

    def tensors(self) -> list[tuple[str, Tensor]]:
        """(category, tensor) of everything that is held between passes."""
        held = [*self.buffers.tensors(), *self.cache.tensors()]
        held += [("weights", tensor) for tensor in self.parameters]
        return held + [("activations", tensor) for tensor in self.inputs]


def _joined(outputs: list[Tensor], like: Tensor) -> Tensor:
    """The rows of all steps that were kept."""
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0] if outputs else like[:0]


def alone() -> Groups:
    """The groups of a single rank, without a process group."""
    return local_groups(Layout(), LocalWorld(1), 0)


def run_locally(
    cell: Cell,
    kernel: Kernel,
    device: torch.device,
    rounded_to: torch.dtype | None = None,
    routers: ChoiceLog | None = None,
    selections: ChoiceLog | None = None,
) -> list[tuple[Tensor, Output]]:
    """Every rank's (token indices, output), all ranks as threads of this process. A log forces choices, and gets what was noted of them."""
    world = LocalWorld(cell.world_size)

    def rank_program(rank: int) -> Any:
        program = Program(cell, local_groups(cell.layout, world, rank), kernel, device, rounded_to=rounded_to)
        program.keeps_rows = True
        program.prepare()
        logs = [(own, given) for own, given in ((program.log, routers), (program.selections, selections)) if given is not None]
        for own, given in logs:
            own.watch(detailed=True, forced_LNK=given.forced_LNK)
        output = program.run()
        for own, given in logs:
            given.notes += own.stop()
        return program.tokens, output

    return world.run(rank_program)
