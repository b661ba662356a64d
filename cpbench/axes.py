"""From the axes of a scenario to cells: every combination of batch, layout and strategy, or the lists in pairs.

What comes out is what was asked for, a cell possibly more than once; a combination of degrees that is no layout, or none of the model, is
left out with its reason. Which of the cells can run, and in which order they do, is decided in plan.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice, product
from math import gcd, prod
from typing import Any

from cpbench.batch import Batch
from cpbench.cell import NOT_COMPILED, Cell
from cpbench.errors import CpbenchError
from cpbench.experts import TRAINED
from cpbench.fitting import has_experts
from cpbench.layout import MAX_RANKS, Layout, all_layouts, divisors, nearest_divisor
from cpbench.models.config import ModelConfig
from cpbench.scenario import Scenario
from cpbench.strategies import STRATEGIES
from cpbench.strategies.usp import default_degree, hybrid_degrees

BASELINE = "none"
HYBRID = "usp"
GROUPED = "allgather"  # the strategy that head_groups is for
COMPILED = "local-map"  # the one that compile is for
DEGREES = ("pp", "dp", "cp", "tp", "ep")  # as Layout has them
MAX_CELLS = 1 << 14  # of a scenario; planning so many takes seconds
MAX_STEPS = 1 << 12  # chunks of a sequence
MAX_WORK = 1 << 19  # cells, times the sequences of each, times its chunks


@dataclass(frozen=True)
class LeftOut:
    """What was asked for and is no layout of the model: its name, the reason, and the nearest valid layout."""

    name: str
    reason: str
    nearest: Layout


def cells_of(scenario: Scenario, config: ModelConfig, weights: str | None = None, prompt: str | None = None) -> Iterator[Cell]:
    """The cells of a resolved scenario; with cp=1 `none`, and what shards heads. Raises CpbenchError for a hybrid that no layout has room for.

    `weights` and `prompt` are the names of a checkpoint and of a text.
    """
    _require_room(scenario)
    _require_experts(scenario, config)
    cells = work = 0
    for batch, layout in _combinations(scenario, config):
        if isinstance(layout, LeftOut):
            continue
        steps = _steps(scenario.chunk, batch)
        for divided, strategy in _algorithms(scenario, config, layout):
            cells, work = cells + 1, work + len(batch.lengths) * steps
            if cells > MAX_CELLS or work > MAX_WORK:
                raise _too_many()
            preferred = STRATEGIES[strategy if divided.cp > 1 else BASELINE].partitions[0]
            partition = scenario.partition if scenario.partition and divided.cp > 1 else preferred
            yield Cell(
                target=scenario.target,
                config=config,
                layers=scenario.layers or 1,
                layout=divided,
                strategy=strategy,
                partition=partition,
                kernel=scenario.kernel,
                dtype=scenario.dtype or "float32",
                device=scenario.device,
                lengths=batch.lengths,
                seed=scenario.seed,
                kv_cache=scenario.kv_cache,
                prefixes=batch.prefixes,
                chunk=scenario.chunk,
                page_size=scenario.page_size,
                cache_tokens=scenario.cache_tokens,
                head_groups=scenario.head_groups if strategy == GROUPED else 1,
                compile=scenario.compile if strategy != BASELINE else NOT_COMPILED,
                router=scenario.router,
                dispatch=scenario.dispatch,
                quant=scenario.quant,
                sp_chunks=scenario.sp_chunks if layout.sp else 1,
                sp_gather=scenario.sp_gather if layout.sp else "hidden",
                sp_fused=scenario.sp_fused and layout.sp,
                deterministic=scenario.deterministic,
                mla=scenario.mla if config.latent and config.indexer is None else "expanded",
                weights=weights,
                prompt=prompt,
            )


def left_out(scenario: Scenario, config: ModelConfig) -> tuple[LeftOut, ...]:
    """Every combination of degrees, and every layout by name, that no cell is made of; each once."""
    if scenario.gpus:
        return ()
    return tuple(dict.fromkeys(layout for _, layout in _combinations(scenario, config) if isinstance(layout, LeftOut)))


def _steps(chunk: int | None, batch: Batch) -> int:
    """Chunks of the longest sequence. Raises CpbenchError where they are too many to be planned one by one."""
    longest = max(batch.lengths)
    steps = 1 if chunk is None else -(-longest // chunk)
    if steps > MAX_STEPS:
        hint = f"At most {MAX_STEPS:,} are planned: the nearest valid value is chunk={-(-longest // MAX_STEPS)}."
        raise CpbenchError(f"chunk={chunk} cuts {longest:,} tokens into {steps:,} steps.", hint)
    return steps


def _too_many() -> CpbenchError:
    what = f"more than {MAX_CELLS:,} combinations, or {MAX_WORK:,} sequences and chunks over all of them"
    return CpbenchError(f"The scenario has {what}.", "Shorten its longest list, or measure it in several sweeps.")


def runs_as(name: str, cell: Cell) -> bool:
    """Whether a cell is one of those that a strategy, as it was asked for, stands for: `u4r2` is usp on cp8u4."""
    degrees = hybrid_degrees(name)
    return cell.strategy == (HYBRID if degrees else name) and (degrees is None or (cell.layout.ulysses, cell.layout.ring) == degrees)


def _combinations(scenario: Scenario, config: ModelConfig) -> Iterator[tuple[Batch, Layout | LeftOut]]:
    """Batch and layout: crossed, or paired with every single value repeated. The baseline of a layout stands before it."""
    if scenario.batches:
        batches: list[Sequence[Any]] = [[fields.batch for fields in scenario.batches]]
    else:
        batches = [scenario.seq or [], scenario.batch or [1], scenario.prefix or [0]]
    named = scenario.layouts or scenario.gpus
    axes = [*batches, *([named] if named else [getattr(scenario, name) or [1] for name in DEGREES])]
    longest = max(map(len, axes))
    if not scenario.pair and prod(map(len, axes)) > MAX_CELLS:
        raise _too_many()
    rows = zip(*(list(axis) * (longest if len(axis) == 1 else 1) for axis in axes), strict=True) if scenario.pair else product(*axes)
    experts = has_experts(config)
    for row in rows:
        batch = row[0] if scenario.batches else _even(*row[: len(batches)])
        for layout in _layouts(scenario, row[len(batches) :], config.name, experts):
            yield batch, layout


def _even(seq: int, count: int, prefix: int) -> Batch:
    return Batch((seq,) * count, (prefix,) * count)


def _layouts(scenario: Scenario, asked: Sequence[Any], model: str, experts: bool) -> Sequence[Layout | LeftOut]:
    """What one name, one number of ranks, or one combination of degrees stands for."""
    if scenario.layouts:
        return (_named(asked[0], model, experts),)
    if scenario.gpus:
        return _every(asked[0], experts)
    layout = _of_degrees(*asked, model, experts)
    baseline = scenario.baseline and isinstance(layout, Layout) and layout.cp > 1
    return (_baseline(layout), layout) if baseline and isinstance(layout, Layout) else (layout,)


@lru_cache(maxsize=1 << 14)
def _of_degrees(pp: int, dp: int, cp: int, tp: int, ep: int, model: str, experts: bool) -> Layout | LeftOut:
    """The layout of these degrees; what expert parallelism leaves of a stage cuts the experts."""
    sizes = {"pp": pp, "dp": dp, "cp": cp, "tp": tp}
    stage, behind = dp * cp * tp, f"/ep{ep}" if ep > 1 else ""
    if pp * stage > MAX_RANKS:
        name = "".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1)
        return LeftOut(name + behind, f"more than {MAX_RANKS} ranks", _shrunk(sizes))
    attention = Layout(pp, dp, cp, tp)
    if stage % ep == 0:
        return _fitting(replace(attention, ep=ep, moe_tp=0), model, experts)
    lacking = "" if experts else f", and {model} has no experts to divide"
    nearest = replace(attention, ep=nearest_divisor(ep, stage), moe_tp=0) if experts else attention
    return LeftOut(f"{attention}{behind}", f"ep={ep} does not divide the ranks of a stage{lacking}", nearest)


@lru_cache(maxsize=1 << 14)
def _named(name: str, model: str, experts: bool) -> Layout | LeftOut:
    return _fitting(Layout.parse(name), model, experts)


@lru_cache(maxsize=1 << 10)
def _every(ranks: int, experts: bool) -> tuple[Layout, ...]:
    return tuple(islice(all_layouts(ranks, experts), MAX_CELLS + 1))


@lru_cache(maxsize=1 << 14)
def _baseline(layout: Layout) -> Layout:
    """One context-parallel rank, and of expert parallelism what still divides a stage."""
    return Layout(layout.pp, layout.dp, 1, layout.tp, ep=gcd(layout.ep, layout.dp * layout.tp))


def _fitting(layout: Layout, model: str, experts: bool) -> Layout | LeftOut:
    """The layout, unless it divides experts that the model does not have."""
    if experts or not layout.divides_experts:
        return layout
    return LeftOut(str(layout), f"{model} has no experts to divide", replace(layout, moe_dp=1, ep=1, moe_tp=0))


def _shrunk(sizes: dict[str, int]) -> Layout:
    """Halve the largest axis until there are not too many ranks."""
    sizes = dict(sizes)
    while prod(sizes.values()) > MAX_RANKS:
        largest = max(sizes, key=lambda axis: sizes[axis])
        sizes[largest] //= 2
    return Layout(sizes["pp"], sizes["dp"], sizes["cp"], sizes["tp"])


def _algorithms(scenario: Scenario, config: ModelConfig, layout: Layout) -> Iterator[tuple[Layout, str]]:
    """Strategies on a layout, with the layout as hybrids divide it. A layout that is divided already is one for the hybrid alone."""
    if layout.cp == 1:
        yield layout, BASELINE
        if layout.tp > 1 and (scenario.cp is None or 1 in scenario.cp):  # else it is the baseline of what was asked for
            yield from ((layout, name) for name in scenario.strategies or [] if name in STRATEGIES and STRATEGIES[name].shards_heads)
        return
    if layout.ulysses > 1:
        yield layout, HYBRID
        return
    for name in scenario.strategies or []:
        degrees = hybrid_degrees(name)
        if degrees is None and name != HYBRID:
            yield layout, name
        elif degrees is None:
            degree = default_degree(config.heads // layout.tp, max(1, config.kv_heads // layout.tp), layout.cp)
            yield replace(layout, ulysses=degree), HYBRID
        elif degrees[0] * degrees[1] == layout.cp:
            yield replace(layout, ulysses=degrees[0]), HYBRID


def _require_experts(scenario: Scenario, config: ModelConfig) -> None:
    """Raise for a router or a way to the experts where the model has none."""
    for name, value, default in (("router", scenario.router, TRAINED), ("dispatch", scenario.dispatch, None)):
        if value != default and not has_experts(config):
            raise CpbenchError(f"{name}={value} is for models with experts, which {config.name} is not.", f"Leave {name} out, or use --model qwen3-moe-tiny.")


def _require_room(scenario: Scenario) -> None:
    """Raise for a hybrid whose ranks are not among the context-parallel degrees."""
    field, rooms = _rooms(scenario)
    for name in scenario.strategies or []:
        ulysses, ring = hybrid_degrees(name) or (1, 1)
        ranks = ulysses * ring
        if hybrid_degrees(name) is None or (ranks > 1 and any(cp == ranks and inner in (1, ulysses) for cp, inner in rooms)):
            continue
        if ranks == 1:
            raise CpbenchError(f"strategy={name} is one rank, which has nobody to exchange with.", "The nearest hybrids are u2r1 and u1r2, on cp=2.")
        degrees = [cp for cp, inner in rooms if cp > 1 and inner == 1]
        if not degrees:
            hint = f"Add --{field.replace('=', ' ')}{ranks}."
        else:
            near = min(degrees, key=lambda cp: (abs(cp - ranks), cp))
            fitting = nearest_divisor(ulysses, near)
            hint = f"Add {field}{ranks}, or use u{fitting}r{near // fitting}, the nearest."
        there = f"the layouts {', '.join(scenario.layouts)}" if scenario.layouts else f"cp={', '.join(str(cp) for cp, _ in rooms)}"
        raise CpbenchError(f"strategy={name} needs cp={ranks}, which is not among {there}.", hint)


def _rooms(scenario: Scenario) -> tuple[str, list[tuple[int, int]]]:
    """The context-parallel degrees, each with the Ulysses degree that it is divided by already, and what to add another one with."""
    if scenario.gpus:
        return "gpus=", [(cp, 1) for cp in sorted({cp for ranks in set(scenario.gpus) for cp in divisors(ranks)})]
    if scenario.layouts:
        return "layouts=cp", [(layout.cp, layout.ulysses) for layout in map(Layout.parse, scenario.layouts)]
    return "cp=", [(cp, 1) for cp in scenario.cp or [1]]
