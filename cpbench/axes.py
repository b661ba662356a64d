"""From the axes of a scenario to cells: every combination of batch, degrees and strategy, or the lists in pairs.

What comes out is what was asked for, a cell possibly more than once. Which of the cells can run, and in which order they do, is decided
in plan.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

from cpbench.batch import Batch
from cpbench.cell import Cell
from cpbench.errors import CpbenchError
from cpbench.layout import Layout, nearest_divisor
from cpbench.models.config import ModelConfig
from cpbench.scenario import Scenario
from cpbench.strategies import STRATEGIES
from cpbench.strategies.usp import default_degree, hybrid_degrees

BASELINE = "none"
HYBRID = "usp"
GROUPED = "allgather"  # the strategy that head_groups is for


def cells_of(scenario: Scenario, config: ModelConfig) -> Iterator[Cell]:
    """The cells of a resolved scenario; with cp=1 there is one strategy, `none`. Raises CpbenchError for a hybrid that no cp value has room for."""
    _require_room(scenario)
    for batch, degree, tp in _combinations(scenario):
        for cp in (1, degree) if scenario.baseline else (degree,):
            for strategy, ulysses in _algorithms(scenario, config, cp, tp):
                partition = scenario.partition if scenario.partition and cp > 1 else STRATEGIES[strategy].partitions[0]
                yield Cell(
                    target=scenario.target,
                    config=config,
                    layers=scenario.layers or 1,
                    layout=Layout(cp=cp, tp=tp, ulysses=ulysses),
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
                )


def runs_as(name: str, cell: Cell) -> bool:
    """Whether a cell is one of those that a strategy, as it was asked for, stands for: `u4r2` is usp on cp8u4."""
    degrees = hybrid_degrees(name)
    return cell.strategy == (HYBRID if degrees else name) and (degrees is None or (cell.layout.ulysses, cell.layout.ring) == degrees)


def _combinations(scenario: Scenario) -> Iterator[tuple[Batch, int, int]]:
    """Batch, cp and tp: crossed, or paired with every single value repeated."""
    degrees: list[Sequence[Any]] = [scenario.cp or [1], scenario.tp or [1]]
    if scenario.batches:
        axes: list[Sequence[Any]] = [[fields.batch for fields in scenario.batches], *degrees]
    else:
        axes = [scenario.seq or [], scenario.batch or [1], scenario.prefix or [0], *degrees]
    longest = max(map(len, axes))
    rows = zip(*(list(axis) * (longest if len(axis) == 1 else 1) for axis in axes), strict=True) if scenario.pair else product(*axes)
    for *batch, cp, tp in rows:
        yield (batch[0] if scenario.batches else _even(*batch)), cp, tp


def _even(seq: int, count: int, prefix: int) -> Batch:
    return Batch((seq,) * count, (prefix,) * count)


def _algorithms(scenario: Scenario, config: ModelConfig, cp: int, tp: int) -> Iterator[tuple[str, int]]:
    """Strategies at a degree, each with its Ulysses degree, which is 1 for all but hybrids."""
    if cp == 1:
        yield BASELINE, 1
        return
    for name in scenario.strategies or []:
        degrees = hybrid_degrees(name)
        if degrees is None:
            yield name, default_degree(config.heads // tp, max(1, config.kv_heads // tp), cp) if name == HYBRID else 1
        elif degrees[0] * degrees[1] == cp:
            yield HYBRID, degrees[0]


def _require_room(scenario: Scenario) -> None:
    """Raise for a hybrid whose ranks are not among the context-parallel degrees."""
    degrees = [cp for cp in scenario.cp or [] if cp > 1]
    for name in scenario.strategies or []:
        ulysses, ring = hybrid_degrees(name) or (1, 1)
        if hybrid_degrees(name) is None or ulysses * ring in degrees:
            continue
        ranks = ulysses * ring
        if ranks == 1:
            raise CpbenchError(f"strategy={name} is one rank, which has nobody to exchange with.", "The nearest hybrids are u2r1 and u1r2, on cp=2.")
        if not degrees:
            hint = f"Add --cp {ranks}."
        else:
            near = min(degrees, key=lambda cp: (abs(cp - ranks), cp))
            fitting = nearest_divisor(ulysses, near)
            hint = f"Add cp={ranks}, or use u{fitting}r{near // fitting}, the nearest."
        raise CpbenchError(f"strategy={name} needs cp={ranks}, which is not among cp={', '.join(map(str, scenario.cp or [1]))}.", hint)
