"""One thing to measure: a cell of the sweep, with everything that changes the work written down.

A cell is plain data that travels as JSON from the driver to the workers and into the result file. Its `id` is canonical: two cells
with the same id do the same work. With attention data parallelism a cell falls into parts, one for each group, that differ in their
sequences and are cells too; strategies only ever see those. Whether a cell can run is decided in plan.py, and how it runs in worker.py.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

from cpbench.attention_shape import AttentionShape
from cpbench.batch import Batch, spread
from cpbench.experts import TRAINED
from cpbench.layout import Layout
from cpbench.models.config import ModelConfig
from cpbench.partition import Blocks, Split, cut, packed, split, switched_off
from cpbench.sharding import TokenRows
from cpbench.units import format_count

TARGETS = ("prefill", "layer", "attention")
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
NOT_COMPILED = "none"
PAGE_SIZE = 64  # tokens of a cache page where nothing else is asked for
VARIANTS = ("head_groups", "compile")  # options that only some strategies have
# every knob that changes the work, beside those that each cell names
DEFAULT_OPTIONS: dict[str, Any] = {
    "kv_cache": "keep",
    "chunk": None,
    "page_size": None,
    "cache_tokens": None,
    "head_groups": 1,
    "compile": NOT_COMPILED,
    "mla": "expanded",
    "weights": None,
    "prompt": None,
}
DEFAULT_OPTIONS |= {"router": TRAINED, "dispatch": None, "quant": "none", "sp_chunks": 1, "sp_gather": "hidden", "sp_fused": False, "deterministic": False}


@dataclass(frozen=True)
class Cell:
    """Target, model, layout, strategy and batch.

    `lengths` are the new tokens of each sequence, `prefixes` its cached ones; the batch is packed. With `chunk`, a pass runs in steps of
    at most so many new tokens of each sequence. `page_size` and `cache_tokens` (capacity per rank) describe the paged K/V cache.
    """

    target: str
    config: ModelConfig
    layers: int
    layout: Layout
    strategy: str
    partition: str
    kernel: str
    dtype: str
    device: str
    lengths: tuple[int, ...]
    seed: int = 0
    kv_cache: str = "keep"
    prefixes: tuple[int, ...] = ()
    chunk: int | None = None
    page_size: int | None = None
    cache_tokens: int | None = None
    head_groups: int = 1
    compile: str = NOT_COMPILED  # the attention across ranks by torch.compile: its backend, eager (capture alone) or inductor
    mla: str = "expanded"  # latent attention: K and V of every head, or absorbed: queries and outputs in the latent's width
    weights: str | None = None  # the name of a checkpoint, which says what and not where; None: random ones
    prompt: str | None = None  # the name of the text that the tokens are from; None: random tokens
    router: str = TRAINED  # experts.py: which experts tokens get
    dispatch: str | None = None  # how tokens reach them: alltoall or gather; None: what the layout allows (sharding.py)
    quant: str = "none"  # quantisation.py: how projections are held and computed
    sp_chunks: int = 1  # with sp in the layout: pieces in which rows are gathered and scattered
    sp_gather: str = "hidden"  # where rows come together: in front of a block, or behind its low-rank projections (`latent`)
    sp_fused: bool = False  # gathers and scattered sums inside the products next to them, by PyTorch's symmetric memory
    deterministic: bool = False  # deterministic.py: sums and products in an order that no layout changes
    earlier: tuple[tuple[int, ...], ...] = ()  # of a step: the lengths of the chunks before it; never part of a planned cell

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefixes", self.prefixes or (0,) * len(self.lengths))

    @property
    def world_size(self) -> int:
        return self.layout.world_size

    @property
    def tokens(self) -> int:
        """New tokens of the whole batch."""
        return sum(self.lengths)

    @property
    def element_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """What each attention-DP group runs: its sequences, the longest given away first, on the layout of one group of one stage."""
        whole = self.layout
        if whole.pp == whole.dp == 1 and not whole.divides_experts:
            return (Part(self, tuple(range(len(self.lengths)))),)
        layout = Layout(cp=whole.cp, tp=whole.tp, ulysses=whole.ulysses, sp=whole.sp)
        shares = spread(self.lengths, self.layout.dp)
        batches = [tuple(tuple(values[s] for s in sequences) for values in (self.lengths, self.prefixes)) for sequences in shares]
        cells = {batch: replace(self, layout=layout, lengths=batch[0], prefixes=batch[1]) for batch in dict.fromkeys(batches)}
        return tuple(Part(cells[batch], sequences) for batch, sequences in zip(batches, shares, strict=True))

    @cached_property
    def split(self) -> Split:
        """The blocks of every context-parallel rank, for a part that runs in one step."""
        return split(self.partition, self.lengths, self.layout.cp, self.prefixes, self.layout.ulysses)

    @property
    def cp_off(self) -> str | None:
        """Why context parallelism is off for (a part of) this batch, decided from its lengths; None where it is on or was not asked for."""
        if self.layout.dp > 1:
            return next((part.cell.cp_off for part in self.parts if part.cell.cp_off), None)
        return switched_off(self.partition, self.lengths, self.layout.cp) if self.lengths else None

    @cached_property
    def steps(self) -> tuple[Cell, ...]:
        """The steps of a pass of a part: the part itself, or one cell per chunk, whose prefixes hold the chunks before.

        A rest of fewer than 2*cp tokens is added to the chunk before it, so that a rest does not switch context parallelism off. Where it
        is off, every rank computes every token without communication. A part without sequences has no steps.
        """
        assert self.layout.dp == 1, "the parts of a cell have steps"
        if not self.lengths:
            return ()
        if self.cp_off:
            return replace(self, strategy="none", partition="replicated").steps
        if self.chunk is None:
            return (self,)
        chunks = [_chunks(length, self.chunk, 2 * self.layout.cp) for length in self.lengths]
        steps: list[Cell] = []
        prefixes, earlier = self.prefixes, tuple[tuple[int, ...], ...]()
        for index in range(max(map(len, chunks))):
            lengths = tuple(sizes[index] if index < len(sizes) else 0 for sizes in chunks)
            steps.append(replace(self, lengths=lengths, prefixes=prefixes, chunk=None, page_size=self.tokens_per_page, earlier=earlier))
            prefixes = tuple(p + n for p, n in zip(prefixes, lengths, strict=True))
            earlier = (*earlier, lengths)
        return tuple(steps)

    @cached_property
    def distinct_parts(self) -> tuple[tuple[Cell, int], ...]:
        """The different cells of the parts, and how many groups run each."""
        counts = Counter(id(part.cell) for part in self.parts)  # parts with one batch share their cell
        return tuple((cell, counts[key]) for key, cell in {id(part.cell): part.cell for part in self.parts}.items())

    @cached_property
    def step_count(self) -> int:
        """Steps of a pass: those of the part that has most."""
        return max(len(part.steps) for part, _ in self.distinct_parts)

    @cached_property
    def token_rows(self) -> tuple[TokenRows, ...]:
        """Of every step of a pass: how many tokens each rank of a stage holds. Groups that have fewer steps than others are idle at the end."""
        steps = [part.cell.steps for part in self.parts]
        found = []
        for index in range(self.step_count):
            splits = [mine[index].split if index < len(mine) else None for mine in steps]
            rows = tuple(tuple(split.rows(rank) if split else 0 for rank in range(self.layout.cp)) for split in splits)
            replicated = tuple(split is not None and split.replicated for split in splits)
            found.append(TokenRows(rows, replicated, self.layout.tp if self.layout.sp and self.target != "attention" else 1))
        return tuple(found)

    def stage_layers(self, stage: int) -> range:
        """The decoder layers of a pipeline stage. Where they do not divide, the first stages have one more."""
        first, last = cut(self.layers, self.layout.pp)[stage]
        return self.layer_range[first:last]

    @property
    def layer_range(self) -> range:
        """The decoder layers that run. Alone, a layer is of the kind that the model has most of: its first sparse one, if it has experts."""
        experts = self.config.experts
        first = experts.first if self.target == "layer" and experts else 0
        return range(first, first + self.layers)

    @property
    def has_experts(self) -> bool:
        """Whether a layer that runs is a mixture of experts."""
        return self.target != "attention" and self.config.is_sparse(self.layer_range[-1])

    @property
    def low_values(self) -> int:
        """Values of a token where rows come together behind low-rank projections: queries, the latent, and what the indexer has; 0: elsewhere."""
        latent, indexer = self.config.latent, self.config.indexer
        if not self.layout.sp or self.sp_gather != "latent" or latent is None:
            return 0
        return (latent.q_rank or 0) + latent.row_values + (indexer.dim + indexer.heads if indexer else 0)

    @property
    def chunks_of_rows(self) -> int:
        """In how many pieces rows are gathered before a block and scattered after it."""
        return self.sp_chunks if self.layout.sp else 1

    @property
    def paged(self) -> bool:
        """Whether K and V live in pages: where tokens are cached already, where chunks will be, or where it is asked for."""
        return any(self.prefixes) or self.chunk is not None or self.page_size is not None

    @property
    def tokens_per_page(self) -> int:
        return self.page_size or PAGE_SIZE

    @cached_property
    def max_rows(self) -> int:
        """The largest number of new tokens that a rank holds over all steps."""
        return max(sum(step.split.rows(rank) for step in part.cell.steps) for part in self.parts for rank in range(self.layout.cp))

    def blocks(self, cp_rank: int) -> Blocks:
        """What a context-parallel rank of a part holds, over all steps."""
        return tuple(block for step in self.steps for block in step.split.ranks[cp_rank])

    def tokens_of(self, dp_rank: int, cp_rank: int) -> list[range]:
        """Where a rank's rows, over all steps, lie in the packed batch of new tokens."""
        part = self.parts[dp_rank]
        starts = (0, *accumulate(self.lengths))
        origins = [starts[sequence] - prefix for sequence, prefix in zip(part.sequences, part.cell.prefixes, strict=True)]
        return [packed(block, origins[block.sequence]) for block in part.cell.blocks(cp_rank)]

    def cached_tokens_of(self, dp_rank: int, blocks: Blocks) -> list[range]:
        """A number for every token of cached blocks of a part: their place among all cached tokens of the batch."""
        starts = (0, *accumulate(self.prefixes))
        return [packed(block, starts[self.parts[dp_rank].sequences[block.sequence]]) for block in blocks]

    @property
    def heads(self) -> int:
        """Query heads of one tensor-parallel rank."""
        return self.config.heads // self.layout.tp

    @property
    def kv_heads(self) -> int:
        """Kv heads of one tensor-parallel rank: at least one, then held by several ranks; one where all heads share a latent row."""
        return self.shape.parts

    @property
    def absorbed(self) -> bool:
        """Whether latent attention works in the latent's width: selected rows are never opened."""
        return self.mla == "absorbed" or self.config.indexer is not None

    @cached_property
    def shape(self) -> AttentionShape:
        config, latent = self.config, self.config.latent
        if latent is None:
            dim = config.head_dim
            return AttentionShape(self.heads, max(1, config.kv_heads // self.layout.tp), dim, dim, 2 * dim)
        if self.config.indexer is not None:
            indexer = self.config.indexer
            return AttentionShape(self.heads, 1, latent.row_values, latent.kv_rank, latent.row_values + indexer.dim, top_k=indexer.top_k)
        if self.absorbed:
            return AttentionShape(self.heads, 1, latent.row_values, latent.kv_rank, latent.row_values)
        qk_dim = latent.nope_dim + latent.rope_dim
        return AttentionShape(self.heads, 1, qk_dim, latent.v_dim, latent.row_values, opened=qk_dim + latent.nope_dim + latent.v_dim)

    @property
    def key(self) -> dict[str, Any]:
        """What the result file stores and `compare` joins on: every knob that changes the work."""
        options = {name: getattr(self, name) for name, default in DEFAULT_OPTIONS.items() if getattr(self, name) != default}
        return {
            "target": self.target,
            "model": self.config.name,
            "layers": self.layers,
            "layout": str(self.layout),
            "strategy": self.strategy,
            "partition": self.partition,
            "kernel": self.kernel,
            "dtype": self.dtype,
            "device": self.device,
            "lengths": list(self.lengths),
            **({"prefixes": list(self.prefixes)} if any(self.prefixes) else {}),
            "seed": self.seed,
            "options": options,
        }

    @property
    def id(self) -> str:
        """The key as one line: the identity used by resume."""
        key = self.key
        options = [f"{name}={value}" for name, value in sorted(key["options"].items())]
        lengths = [format_count(n) + (f"@{format_count(p)}" if p else "") for n, p in zip(self.lengths, self.prefixes, strict=True)]
        lengths = [f"{lengths[0]}x{len(lengths)}"] if len(lengths) > 1 and len(set(lengths)) == 1 else lengths
        parts = [self.target, self.config.name, f"l{self.layers}", str(self.layout), self.strategy, self.partition, self.kernel, self.dtype, self.device]
        return "/".join([*parts, "+".join(lengths), f"seed{self.seed}", *options])

    @property
    def algorithm(self) -> str:
        """The strategy and how it is varied: `ring`, `allgather/2` in two groups of heads, `local-map/inductor` compiled."""
        return algorithm(self.strategy, self.key["options"])

    @property
    def label(self) -> str:
        """Short name for progress and warnings: `cp4 ring 36k`, `cp4 ring 36k@32k b3`."""
        return f"{self.layout} {self.strategy} {Batch(self.lengths, self.prefixes).name}"

    def to_dict(self) -> dict[str, Any]:
        """Everything a worker needs, as JSON."""
        return {**self.key, "config": self.config.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Cell:
        """The inverse of `to_dict`."""
        return cls(
            target=data["target"],
            config=ModelConfig.from_dict(data["config"]),
            layers=data["layers"],
            layout=Layout.parse(data["layout"]),
            strategy=data["strategy"],
            partition=data["partition"],
            kernel=data["kernel"],
            dtype=data["dtype"],
            device=data["device"],
            lengths=tuple(data["lengths"]),
            seed=data["seed"],
            prefixes=tuple(data.get("prefixes", ())),
            **data["options"],
        )


@dataclass(frozen=True)
class Part:
    """What one attention-DP group runs, and which sequences of the whole batch these are. A part may have none."""

    cell: Cell
    sequences: tuple[int, ...]


def algorithm(strategy: str, options: dict[str, Any]) -> str:
    """The name of a strategy with those options of a key that vary it."""
    return "/".join([strategy, *(str(options[name]) for name in VARIANTS if options.get(name))])


def _chunks(length: int, chunk: int, shortest: int) -> list[int]:
    """Sizes of the chunks of one sequence."""
    sizes = [chunk] * (length // chunk)
    rest = length % chunk
    if rest and (rest >= shortest or not sizes):
        return [*sizes, rest]
    return [*sizes[:-1], sizes[-1] + rest] if rest else sizes
