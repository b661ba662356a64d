"""From a scenario to the cells of a sweep: which ones, in which order, which of them cannot run and why, and roughly what they cost.

Cells come out by world size, smallest first, each once. A cell of the cross product that cannot run stays in the plan with the
status `unsupported` or `skipped` and a reason; a requested value with which *nothing* can run is the user's mistake and raises.
Nothing is started here and torch is imported only to ask a kernel that was named. Times are rough until the driver has measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from cpbench.cell import Cell
from cpbench.environment import Machine
from cpbench.errors import CpbenchError
from cpbench.formulas import flops, live_bytes
from cpbench.kernels import load_kernel
from cpbench.layout import Layout
from cpbench.models.config import ModelConfig
from cpbench.models.presets import load_config
from cpbench.scenario import COMMON_DEFAULTS, Scenario, Timing
from cpbench.strategies import STRATEGIES

BASELINE = "none"
# Operations per second that a core or a GPU reaches in a prefill, for estimates before anything was measured.
CPU_RATE = {"float32": 8e10, "bfloat16": 6e10, "float16": 4e10, "float64": 4e10}
CUDA_RATE = {"float32": 4e13, "bfloat16": 4e14, "float16": 4e14, "float64": 3e13}
GROUP_SECONDS = 7.0  # processes of a world size: start, process groups, end
CELL_SECONDS = 1.0  # numerics on the small input, model, records
UNTIMED_PASSES = 2  # memory, first call


@dataclass(frozen=True)
class PlannedCell:
    """A cell, why it will not run (status None: it will), its estimated seconds per round, and its peak of live bytes on a rank."""

    cell: Cell
    status: Literal["unsupported", "skipped"] | None
    reason: str | None
    seconds: float
    live_bytes: int


@dataclass(frozen=True)
class Plan:
    """All cells in the order of the first round."""

    cells: tuple[PlannedCell, ...]
    rounds: int
    cores: int
    threads: int | None
    device: str

    @cached_property
    def runnable(self) -> tuple[PlannedCell, ...]:
        return tuple(planned for planned in self.cells if planned.status is None)

    @cached_property
    def world_sizes(self) -> tuple[int, ...]:
        """Of the cells that will run, ascending."""
        return tuple(sorted({planned.cell.world_size for planned in self.runnable}))

    @property
    def seconds(self) -> float:
        """Estimated duration of the whole sweep."""
        return self.rounds * (sum(planned.seconds for planned in self.runnable) + GROUP_SECONDS * len(self.world_sizes))

    def threads_per_rank(self, world_size: int) -> int:
        """CPU threads of each rank: what was asked for, else its share of the cores, at least one."""
        return self.threads or max(1, self.cores // world_size)

    def oversubscribed(self, world_size: int) -> bool:
        """More threads than cores; on CUDA the ranks do not compute on cores."""
        return self.device == "cpu" and world_size * self.threads_per_rank(world_size) > self.cores


def make_plan(scenario: Scenario, machine: Machine) -> Plan:
    """The cells of a resolved scenario on a machine. Raises CpbenchError where a requested value cannot run at all."""
    config = load_config(scenario.model or "")
    device = scenario.device
    if scenario.kernel != "auto":
        _require_kernel(scenario, config)
    plan = Plan((), scenario.rounds, machine.cores, scenario.threads, device)
    unique = {cell.id: cell for cell in _cross_product(scenario, config)}
    ordered = sorted(unique.values(), key=lambda cell: (cell.world_size, cell.layout.cp))  # stable: else as asked
    planned = [_planned(cell, machine, plan, scenario.timing) for cell in ordered]
    _refuse_impossible(scenario, planned)
    return Plan(tuple(planned), plan.rounds, plan.cores, plan.threads, device)


def _cross_product(scenario: Scenario, config: ModelConfig) -> Iterator[Cell]:
    """seq x batch x cp x tp x strategies; with cp=1 there is one strategy, `none`."""
    degrees = scenario.cp or [1]
    degrees = [1, *degrees] if scenario.baseline else degrees
    for seq in scenario.seq or []:
        for batch in scenario.batch or [1]:
            for cp in degrees:
                for tp in scenario.tp or [1]:
                    for strategy in scenario.strategies or [] if cp > 1 else [BASELINE]:
                        partition = scenario.partition if scenario.partition and cp > 1 else STRATEGIES[strategy].partitions[0]
                        yield Cell(
                            target=scenario.target,
                            config=config,
                            layers=scenario.layers or 1,
                            layout=Layout(cp=cp, tp=tp),
                            strategy=strategy,
                            partition=partition,
                            kernel=scenario.kernel,
                            dtype=scenario.dtype or "float32",
                            device=scenario.device,
                            lengths=(seq,) * batch,
                            seed=scenario.seed,
                            kv_cache=scenario.kv_cache,
                        )


def _planned(cell: Cell, machine: Machine, plan: Plan, timing: Timing) -> PlannedCell:
    reason = _tensor_parallel_reason(cell) or STRATEGIES[cell.strategy].check(cell)
    if reason:
        return PlannedCell(cell, "unsupported", reason, 0.0, 0)
    seconds, memory = _seconds(cell, plan, timing), _live_bytes(cell)
    if cell.device == "cuda" and cell.world_size > machine.devices:
        return PlannedCell(cell, "skipped", f"needs {cell.world_size} GPUs, this machine has {machine.devices}", seconds, memory)
    return PlannedCell(cell, None, None, seconds, memory)


def _tensor_parallel_reason(cell: Cell) -> str | None:
    """Why the model does not divide over the tensor-parallel ranks, with the nearest degree that works."""

    def fits(tp: int) -> bool:
        return _undivided(cell, tp) is None

    tp = cell.layout.tp
    what = _undivided(cell, tp)
    if what is None:
        return None
    near = min(filter(fits, range(1, cell.config.heads + 1)), key=lambda degree: (abs(degree - tp), degree))
    return f"{what} of {cell.config.name} do not divide over tp={tp}; the nearest degree is tp={near}"


def _undivided(cell: Cell, tp: int) -> str | None:
    config = cell.config
    if config.heads % tp:
        return f"{config.heads} query heads"
    if config.kv_heads % tp and tp % config.kv_heads:
        return f"{config.kv_heads} kv heads"
    if cell.target != "attention" and config.intermediate % tp:
        return f"{config.intermediate} FFN columns"
    if cell.target == "prefill" and config.vocab % tp:
        return f"{config.vocab} vocabulary rows"
    return None


def pass_seconds(cell: Cell, plan: Plan) -> float:
    """Estimated seconds of one pass: the operations of all ranks over what the devices in use reach together."""
    if cell.device == "cuda":
        return flops(cell) / (CUDA_RATE[cell.dtype] * cell.world_size)
    cores = min(plan.cores, cell.world_size * plan.threads_per_rank(cell.world_size))
    return flops(cell) / (CPU_RATE[cell.dtype] * cores)


def timed_passes(seconds: float, timing: Timing) -> int:
    """How many passes a round will time at most, if one takes `seconds`."""
    fitting = int(timing.max_seconds / seconds) + 1 if seconds > 0 else timing.max_samples
    return max(timing.min_samples, min(timing.max_samples, fitting))


def _seconds(cell: Cell, plan: Plan, timing: Timing) -> float:
    once = pass_seconds(cell, plan)
    return CELL_SECONDS + once * (UNTIMED_PASSES + timed_passes(once, timing))


def _live_bytes(cell: Cell) -> int:
    """The largest peak of a rank. Tensor-parallel ranks hold the same; first, middle and last CP rank bound the others."""
    last = cell.layout.cp - 1
    return max(live_bytes(cell, cell.layout.rank_of(cp=rank)) for rank in {0, last // 2, last})


def _require_kernel(scenario: Scenario, config: ModelConfig) -> None:
    dtype = scenario.dtype or "float32"
    reason = load_kernel(scenario.kernel).available(scenario.device, dtype, config.head_dim, config.head_dim)
    if reason:
        raise CpbenchError(f"Kernel {scenario.kernel!r} cannot run here: {reason}.", "Use --set kernel=auto, or see cpbench list kernels.")


def _refuse_impossible(scenario: Scenario, planned: list[PlannedCell]) -> None:
    """Raise for a requested value of an axis with which every cell is unsupported; a baseline that was added counts for nothing."""
    cp = scenario.cp or [1]
    strategies = scenario.strategies if cp != [1] and scenario.strategies != COMMON_DEFAULTS["strategies"] else []
    asked = [p for p in planned if p.cell.layout.cp in cp]
    axes: list[tuple[str, list[int] | list[str], Callable[[Cell], object]]] = [
        ("strategy", strategies or [], lambda cell: cell.strategy),
        ("tp", [tp for tp in scenario.tp or [] if tp > 1], lambda cell: cell.layout.tp),
        ("cp", cp, lambda cell: cell.layout.cp),
        ("seq", scenario.seq or [], lambda cell: cell.lengths[0]),
    ]
    for axis, values, of in axes:
        for value in values:
            cells = [p for p in asked if of(p.cell) == value]
            if cells and all(p.status == "unsupported" for p in cells):
                what, _, nearest = (cells[0].reason or "").partition("; ")
                raise CpbenchError(f"{axis}={value} cannot run: {what}.", nearest[:1].upper() + nearest[1:] + "." if nearest else "")
