"""From a scenario to the cells of a sweep: which ones, in which order, which of them cannot run and why, and roughly what they cost.

Cells come out by world size, smallest first, each once. A cell of the cross product that cannot run stays in the plan with the
status `unsupported` or `skipped` and a reason; a requested value with which *nothing* can run is the user's mistake and raises.
Nothing is started here and torch is imported only to ask a kernel that was named. Times are rough until the driver has measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from cpbench.axes import BASELINE, GROUPED, cells_of, runs_as
from cpbench.batch import Batch
from cpbench.cell import Cell
from cpbench.environment import Machine
from cpbench.errors import CpbenchError
from cpbench.formulas import cached_pages, flops, live_bytes
from cpbench.kernels import load_kernel
from cpbench.models.config import ModelConfig
from cpbench.models.presets import load_config
from cpbench.scenario import COMMON_DEFAULTS, Scenario, Timing
from cpbench.strategies import STRATEGIES
from cpbench.strategies.usp import hybrid_degrees

# Operations per second that a core or a GPU reaches in a prefill, for estimates before anything was measured.
CPU_RATE = {"float32": 8e10, "bfloat16": 6e10, "float16": 4e10, "float64": 4e10}
CUDA_RATE = {"float32": 4e13, "bfloat16": 4e14, "float16": 4e14, "float64": 3e13}
GROUP_SECONDS = 7.0  # processes of a world size: start, process groups, end
CELL_SECONDS = 1.0  # numerics on the small input, model, records
MAX_STEPS = 8  # chunks whose memory is estimated one by one
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
    _require_partition(scenario)
    unique = {cell.id: cell for cell in cells_of(scenario, config)}
    ordered = sorted(unique.values(), key=lambda cell: (cell.world_size, cell.layout.cp))  # stable: else as asked
    planned = [_planned(cell, machine, plan, scenario.timing) for cell in ordered]
    _refuse_impossible(scenario, planned)
    return Plan(tuple(planned), plan.rounds, plan.cores, plan.threads, device)


def _planned(cell: Cell, machine: Machine, plan: Plan, timing: Timing) -> PlannedCell:
    reason = unsupported(cell)
    if reason:
        return PlannedCell(cell, "unsupported", reason, 0.0, 0)
    seconds, memory = _seconds(cell, plan, timing), _live_bytes(cell)
    if cell.device == "cuda" and cell.world_size > machine.devices:
        return PlannedCell(cell, "skipped", f"needs {cell.world_size} GPUs, this machine has {machine.devices}", seconds, memory)
    return PlannedCell(cell, None, None, seconds, memory)


def unsupported(cell: Cell) -> str | None:
    """Why a cell can run on no machine, with the nearest valid value; None if it can."""
    return _tensor_parallel_reason(cell) or STRATEGIES[cell.strategy].check(cell) or _memory_reason(cell)


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


def _memory_reason(cell: Cell) -> str | None:
    """Why the batch cannot be prefilled as asked: chunks too short for the ranks, or a cache that is too small for it."""
    cp = cell.layout.cp
    if cell.chunk and cp > 1 and cell.chunk < 2 * cp:
        return f"a chunk of {cell.chunk} tokens is shorter than 2*cp = {2 * cp}; the nearest valid value is chunk={2 * cp}"
    if cell.cache_tokens is None:
        return None
    size = cell.tokens_per_page
    needed = size * max(cached_pages(cell, rank) for rank in range(cp))
    if needed <= -(-cell.cache_tokens // size) * size:
        return None
    near = f"the nearest valid value is cache_tokens={needed}"
    longest = max(cell.prefixes)
    if longest > cell.cache_tokens:
        return f"a prefix of {longest:,} tokens is longer than the cache of {cell.cache_tokens:,}: a rank needs {needed:,} in pages of {size}; {near}"
    return f"the batch needs {needed:,} tokens of cache on a rank, in pages of {size}, more than cache_tokens = {cell.cache_tokens:,}; {near}"


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
    last, steps = cell.layout.cp - 1, _largest_steps(cell)
    return max(live_bytes(cell, cell.layout.rank_of(cp=rank), steps) for rank in {0, last // 2, last})


def _largest_steps(cell: Cell) -> list[Cell]:
    """Of many chunks those that can need most: the first, and the last one of each sequence with the one before it, which may be longer."""
    if len(cell.steps) <= MAX_STEPS:
        return list(cell.steps)
    ends = [sum(1 for step in cell.steps if step.lengths[sequence]) for sequence in range(len(cell.lengths))]
    return [cell.steps[index] for index in sorted({0, *(max(0, end - back) for end in ends for back in (1, 2))})]


def _require_kernel(scenario: Scenario, config: ModelConfig) -> None:
    dtype = scenario.dtype or "float32"
    reason = load_kernel(scenario.kernel).available(scenario.device, dtype, config.head_dim, config.head_dim)
    if reason:
        raise CpbenchError(f"Kernel {scenario.kernel!r} cannot run here: {reason}.", "Use --set kernel=auto, or see cpbench list kernels.")


def _require_partition(scenario: Scenario) -> None:
    """Raise where no strategy can use the partition that was asked for; where some can, the others are rows without a result."""
    names = ["usp" if hybrid_degrees(name) else name for name in scenario.strategies or []]
    partition = scenario.partition
    if partition is None or scenario.cp == [1] or any(partition in STRATEGIES[name].partitions for name in names):
        return
    able = ", ".join(name for name, strategy in STRATEGIES.items() if partition in strategy.partitions and name != BASELINE)
    nearest = f"Use --partition {STRATEGIES[names[0]].partitions[0]}"
    raise CpbenchError(f"{', '.join(names)} cannot use the {partition} partition.", f"{nearest}, or a strategy that can: {able}." if able else f"{nearest}.")


def _refuse_impossible(scenario: Scenario, planned: list[PlannedCell]) -> None:
    """Raise for a requested value of an axis with which every cell is unsupported; a baseline that was added counts for nothing."""
    cp = scenario.cp or [1]
    asked = [p for p in planned if p.cell.layout.cp in cp]
    if scenario.head_groups > 1 and not any(p.cell.strategy == GROUPED for p in asked):
        raise CpbenchError(f"head_groups is for {GROUPED}, which is not among the strategies.", f"Add --strategy {GROUPED}, or leave head_groups out.")
    if all(_memory_reason(p.cell) for p in asked if p.status == "unsupported") and all(p.status == "unsupported" for p in asked):
        raise _impossible("", asked[0].reason or "")
    for name, cells in _requested(scenario, asked):
        if cells and all(p.status == "unsupported" for p in cells):
            raise _impossible(f"{name} cannot run: ", cells[0].reason or "")


def _requested(scenario: Scenario, planned: list[PlannedCell]) -> Iterator[tuple[str, list[PlannedCell]]]:
    """Every value that was asked for by name, and the cells that have it. Strategies that nobody named may fail to run."""
    cp, strategies = scenario.cp or [1], scenario.strategies or []
    every = {name for name in STRATEGIES if name != BASELINE}
    implied = set(COMMON_DEFAULTS["strategies"]) if strategies == COMMON_DEFAULTS["strategies"] else every if every <= set(strategies) else set()
    for name in strategies if cp != [1] else []:
        if name not in implied:
            able = [p for p in planned if p.cell.partition in STRATEGIES[p.cell.strategy].partitions]
            yield f"strategy={name}", [p for p in able if runs_as(name, p.cell)]
    for tp in scenario.tp or []:
        if tp > 1:
            yield f"tp={tp}", [p for p in planned if p.cell.layout.tp == tp]
    for degree in cp:
        yield f"cp={degree}", [p for p in planned if p.cell.layout.cp == degree]
    for batch in [fields.batch for fields in scenario.batches or []]:
        yield f"lengths={batch.label}", [p for p in planned if Batch(p.cell.lengths, p.cell.prefixes) == batch]
    for seq in scenario.seq or []:
        yield f"seq={seq}", [p for p in planned if p.cell.lengths[0] == seq]


def _impossible(what: str, reason: str) -> CpbenchError:
    """A reason with the nearest valid value behind a semicolon as the error of the whole sweep."""
    text, _, nearest = reason.partition("; ")
    text = what + text if what else text[:1].upper() + text[1:]
    return CpbenchError(f"{text}.", nearest[:1].upper() + nearest[1:] + "." if nearest else "")
