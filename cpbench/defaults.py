"""What a scenario gets where nothing was said and another field decides, and every size of it as an exact number.

The names of models, strategies, partitions and kernels are checked here too, because what they decide hangs on them. Which fields there are,
and what the device decides alone, is in scenario.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cpbench.batch import Batch
from cpbench.cell import PAGE_SIZE
from cpbench.errors import CpbenchError, unknown
from cpbench.layout import Layout
from cpbench.units import format_count

if TYPE_CHECKING:
    from cpbench.models.config import ModelConfig
    from cpbench.scenario import Scenario

EVERY_STRATEGY = "all"


def echo_sizes(scenario: Scenario, *, default: bool) -> list[str]:
    """Every length as an exact number."""
    notes = [f"seq {Batch((length,)).exact}{' (default)' if default else ''}" for length in scenario.seq or []]
    if scenario.batch and scenario.batch != [1]:
        notes.append(f"batch {', '.join(map(str, scenario.batch))} sequences")
    notes += [f"prefix {format_count(prefix)} = {prefix:,} cached tokens per sequence" for prefix in scenario.prefix or [] if prefix]
    for batch in [fields.batch for fields in scenario.batches or []]:
        notes.append(f"batch of {len(batch.lengths)}: {batch.exact}")
    return notes + ([f"chunk {Batch((scenario.chunk,)).exact} of each sequence"] if scenario.chunk else [])


def model_of(scenario: Scenario) -> ModelConfig:
    """The model of a scenario. Raises CpbenchError where there is no such model."""
    from cpbench.models.presets import load_config

    config = load_config(scenario.model or "")
    return config.with_experts(scenario.experts) if scenario.experts else config


def check_names(scenario: Scenario) -> None:
    from cpbench.kernels import KERNELS
    from cpbench.partition import PARTITIONS
    from cpbench.strategies import STRATEGIES
    from cpbench.strategies.usp import hybrid_degrees

    model_of(scenario)
    for name in scenario.strategies or []:
        if name not in (*STRATEGIES, EVERY_STRATEGY) and hybrid_degrees(name) is None:
            raise unknown("strategy", name, [*STRATEGIES, EVERY_STRATEGY, "u4r2"])
    if scenario.partition is not None and scenario.partition not in PARTITIONS:
        raise unknown("partition", scenario.partition, PARTITIONS)
    if scenario.kernel != "auto" and scenario.kernel not in KERNELS:
        raise unknown("kernel", scenario.kernel, [*KERNELS, "auto"])


def expand_strategies(scenario: Scenario, notes: list[str]) -> None:
    """`all` is every algorithm. Changes `scenario.strategies` and `notes`."""
    from cpbench.strategies import STRATEGIES

    asked = scenario.strategies or []
    if EVERY_STRATEGY in asked:
        every = [name for name in STRATEGIES if name != "none"]
        scenario.strategies = list(dict.fromkeys(name for entry in asked for name in (every if entry == EVERY_STRATEGY else [entry])))
        notes.append(f"strategies {', '.join(scenario.strategies)}")


def fit_pages(scenario: Scenario, notes: list[str]) -> None:
    """A cache with a capacity is one of pages. Changes `scenario.page_size` and `notes`."""
    if scenario.cache_tokens and scenario.page_size is None:
        scenario.page_size = PAGE_SIZE
        notes.append(f"page_size {PAGE_SIZE} (default of a cache with cache_tokens)")


def fit_layers(scenario: Scenario, asked: int | None, notes: list[str]) -> None:
    """Only a prefill has several layers, and no more than its model. Changes `scenario.layers` and `notes`."""
    config = model_of(scenario)
    if scenario.target != "prefill":
        if asked not in (None, 1):
            raise CpbenchError(f"Target {scenario.target!r} runs one layer, not {asked}.", "Leave --layers out, or use --target prefill.")
        scenario.layers = 1
        return
    stages = _most_stages(scenario)
    if asked is None:
        default = config.layers if scenario.weights else scenario.layers or 1
        sparse = config.experts.first + 1 if config.experts else 1
        scenario.layers = min(max(default, stages, sparse), config.layers)
        why = "default: one per pipeline stage" if scenario.layers > max(default, sparse) else f"default on {scenario.device}"
        why = "default: up to the first with experts" if scenario.layers == sparse > default else why
        why = "all of the checkpoint" if scenario.weights else why
        notes.append(f"layers {scenario.layers} of {config.layers} ({why})")
    elif asked > config.layers:
        raise CpbenchError(f"{config.name} has {config.layers} layers, not {asked}.", f"The nearest valid value is --layers {config.layers}.")
    if stages > 1 and scenario.chunk is None:
        notes.append("pp without --chunk: the batch is one micro-batch, so that the stages of a pipeline work one after the other")


def _most_stages(scenario: Scenario) -> int:
    """Of the pipelines that are asked for: where every layout of so many ranks is, one stage for each rank is among them."""
    return max([*(scenario.pp or []), *(scenario.gpus or []), *(Layout.parse(name).pp for name in scenario.layouts or [])], default=1)
