"""From a scenario to the cells of a sweep: which ones, in which order, which of them cannot run and why, and roughly what they cost.

Cells come out by world size, smallest first, each once. A cell of the cross product that cannot run stays in the plan with the
status `unsupported` or `skipped` and a reason, and so does a combination of degrees that is no layout; a requested value with which
*nothing* can run is the user's mistake and raises.
Nothing is started here and torch is imported only to ask a kernel that was named. Times are rough until the driver has measured.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Literal

from cpbench.axes import BASELINE, COMPILED, GROUPED, LeftOut, cells_of, left_out, runs_as
from cpbench.batch import Batch
from cpbench.cell import NOT_COMPILED, Cell
from cpbench.defaults import model_of
from cpbench.deterministic import deterministic_reason
from cpbench.environment import Machine
from cpbench.errors import CpbenchError
from cpbench.fitting import layout_reason, strategy_reason
from cpbench.formulas import cached_pages, flops, live_bytes
from cpbench.kernels import load_kernel
from cpbench.layout import Layout
from cpbench.models.checkpoint import Checkpoint
from cpbench.models.config import ModelConfig
from cpbench.pairing import Pair, pair_up, sides
from cpbench.prompt import prompt_name, read_prompt
from cpbench.quantisation import quant_reason
from cpbench.scenario import COMMON_DEFAULTS, Scenario, Timing
from cpbench.strategies import STRATEGIES

# Operations per second that a core or a GPU reaches in a prefill, for estimates before anything was measured.
CPU_RATE = {"float32": 8e10, "bfloat16": 6e10, "float16": 4e10, "float64": 4e10}
CUDA_RATE = {"float32": 4e13, "bfloat16": 4e14, "float16": 4e14, "float64": 3e13}
GROUP_SECONDS = 7.0  # processes of a world size: start, process groups, end
CELL_SECONDS = 1.0  # numerics on the small input, model, records
MAX_STEPS = 8  # chunks whose memory is estimated one by one
UNTIMED_PASSES = 2  # memory, first call


@dataclass(frozen=True)
class PlannedCell:
    """A cell, why it will not run (status None: it will), and its estimated seconds per round."""

    cell: Cell
    status: Literal["unsupported", "skipped"] | None
    reason: str | None
    seconds: float

    @cached_property
    def live_bytes(self) -> int:
        """Estimated peak of live bytes on a rank; made when it is asked for, because it needs the plans of ranks."""
        return 0 if self.status == "unsupported" else _live_bytes(self.cell)


@dataclass(frozen=True)
class Plan:
    """All cells in the order of the first round, and what was asked for and is no layout of the model."""

    cells: tuple[PlannedCell, ...]
    rounds: int
    cores: int
    threads: int | None
    device: str
    left_out: tuple[LeftOut, ...] = ()
    pairs: tuple[Pair, ...] = ()
    ranks_per_node: int | None = None  # None: all are on this machine

    @cached_property
    def runnable(self) -> tuple[PlannedCell, ...]:
        return tuple(planned for planned in self.cells if planned.status is None)

    @cached_property
    def world_sizes(self) -> tuple[int, ...]:
        """Of the cells that will run, ascending."""
        return tuple(sorted({planned.cell.world_size for planned in self.runnable}))

    def together(self, cells: Sequence[PlannedCell]) -> list[tuple[PlannedCell, ...]]:
        """What is measured at a time: a cell, or both cells of a pair if both are there, A before B."""
        place = {cell.id: (number, side) for number, pair in enumerate(self.pairs) for side, cell in enumerate((pair.a, pair.b))}
        groups: dict[object, list[PlannedCell]] = {}
        for planned in cells:
            groups.setdefault(place.get(planned.cell.id, (planned.cell.id,))[0], []).append(planned)
        return [tuple(sorted(group, key=lambda planned: place.get(planned.cell.id, (0, 0))[1])) for group in groups.values()]

    @property
    def seconds(self) -> float:
        """Estimated duration of the whole sweep."""
        return self.rounds * (sum(planned.seconds for planned in self.runnable) + GROUP_SECONDS * len(self.world_sizes))

    def threads_per_rank(self, world_size: int) -> int:
        """CPU threads of each rank: what was asked for, else its share of the cores, at least one."""
        return self.threads or max(1, self.cores // self.on_a_node(world_size))

    def oversubscribed(self, world_size: int) -> bool:
        """More threads than cores; on CUDA the ranks do not compute on cores."""
        return self.device == "cpu" and self.on_a_node(world_size) * self.threads_per_rank(world_size) > self.cores

    def cores_of(self, world_size: int) -> int:
        """The cores of all nodes that so many ranks are on."""
        return self.cores * -(-world_size // self.on_a_node(world_size))

    def on_a_node(self, world_size: int) -> int:
        """Ranks of the node that has most; a smaller world is on the first nodes."""
        return min(world_size, self.ranks_per_node or world_size)


def make_plan(scenario: Scenario, machine: Machine) -> Plan:
    """The cells of a resolved scenario on a machine, of both variants if it has two. Raises CpbenchError where a requested value cannot run at all."""
    if scenario.ab is None:
        return _one_plan(scenario, machine)
    a, b = (_one_plan(side, machine) for side in sides(scenario, machine))
    pairs = pair_up([planned.cell for planned in a.cells], [planned.cell for planned in b.cells], scenario.ab)
    distinct = {planned.cell.id: planned for planned in (*a.cells, *b.cells)}
    cells = tuple(sorted(distinct.values(), key=_by_ranks))
    return replace(a, cells=cells, left_out=tuple(dict.fromkeys((*a.left_out, *b.left_out))), pairs=pairs)


def _by_ranks(planned: PlannedCell) -> tuple[int, int]:
    return planned.cell.world_size, planned.cell.layout.cp


def _one_plan(scenario: Scenario, machine: Machine) -> Plan:
    """The cells of a scenario with one variant."""
    config = model_of(scenario)
    device = scenario.device
    if scenario.kernel != "auto":
        _require_kernel(scenario, config)
    plan = Plan((), scenario.rounds, machine.cores, scenario.threads, device, left_out(scenario, config), ranks_per_node=machine.ranks_per_node)
    weights, prompt = checkpoint_name(scenario, config), text_name(scenario, config)
    cells = _distinct(cells_of(scenario, config, weights, prompt))
    _refuse_left_out(scenario, cells, plan.left_out)
    _require_partition(scenario, cells)
    planned = sorted((_planned(cell, machine, plan, scenario.timing) for cell in cells), key=_by_ranks)  # stable: else as asked
    _refuse_impossible(scenario, planned)
    return replace(plan, cells=tuple(planned))


def checkpoint_name(scenario: Scenario, config: ModelConfig) -> str | None:
    """The name of the checkpoint, if there is one. Raises CpbenchError where it is not one of the model."""
    if not scenario.weights:
        return None
    checkpoint = Checkpoint.open(scenario.weights)
    checkpoint.require(config, scenario.layers or 1)
    return checkpoint.name


def text_name(scenario: Scenario, config: ModelConfig) -> str | None:
    """The name of the prompt, if there is one. Raises CpbenchError where its tokens are not those of the model."""
    if not scenario.prompt or not scenario.weights:
        return None
    ids = read_prompt(scenario.weights, scenario.prompt)
    if max(ids) >= config.vocab:
        hint = "Give the tokenizer.json that belongs to these weights."
        raise CpbenchError(f"tokenizer.json makes token {max(ids)} of the prompt; {config.name} has {config.vocab:,}.", hint)
    return prompt_name(ids)


def _distinct(cells: Iterable[Cell]) -> list[Cell]:
    """Each cell once, told apart by what differs between the cells of one scenario."""
    unique = {(cell.layout, cell.strategy, cell.lengths, cell.prefixes): cell for cell in cells}
    return list(unique.values())


def _planned(cell: Cell, machine: Machine, plan: Plan, timing: Timing) -> PlannedCell:
    reason = unsupported(cell)
    if reason:
        return PlannedCell(cell, "unsupported", reason, 0.0)
    seconds = _seconds(cell, plan, timing)
    if cell.device == "cuda" and cell.world_size > machine.devices:
        return PlannedCell(cell, "skipped", f"needs {cell.world_size} GPUs, this machine has {machine.devices}", seconds)
    if machine.ranks and cell.world_size > machine.ranks:
        return PlannedCell(cell, "skipped", f"needs {cell.world_size} ranks, this launch has {machine.ranks}", seconds)
    return PlannedCell(cell, None, None, seconds)


def only_cell(scenario: Scenario) -> Cell:
    """The first cell of a resolved scenario that can run. Raises CpbenchError with the reason where none can."""
    cells = list(cells_of(scenario, model_of(scenario)))
    if not cells:
        left = left_out(scenario, model_of(scenario))[0]
        raise CpbenchError(f"{left.name} cannot run: {left.reason}.", f"The nearest valid layout is {left.nearest}.")
    reasons = [unsupported(cell) for cell in cells]
    if None not in reasons:
        raise impossible(str(cells[0].layout), reasons[0] or "")
    return cells[reasons.index(None)]


def unsupported(cell: Cell) -> str | None:
    """Why a cell can run on no machine, with the nearest valid value; None if it can."""
    return layout_reason(cell) or quant_reason(cell) or strategy_reason(cell) or _kernel_reason(cell) or deterministic_reason(cell) or _memory_reason(cell)


def _kernel_reason(cell: Cell) -> str | None:
    """Why a kernel that was named does not attend in this model."""
    if cell.shape.top_k and cell.kernel != "auto":
        return f"{cell.kernel} attends to ranges of keys, and queries of {cell.config.name} select theirs; the nearest valid value is kernel=auto"
    return None


def _memory_reason(cell: Cell) -> str | None:
    """Why the batch cannot be prefilled as asked: chunks too short for the ranks, or a cache that is too small for it."""
    cp = cell.layout.cp
    if cell.chunk and cp > 1 and cell.chunk < 2 * cp:
        return f"a chunk of {cell.chunk} tokens is shorter than 2*cp = {2 * cp}; the nearest valid value is chunk={2 * cp}"
    if cell.cache_tokens is None:
        return None
    size = cell.tokens_per_page
    needed = size * max(cached_pages(part.cell, rank) for part in cell.parts if part.sequences for rank in range(cp))
    if needed <= -(-cell.cache_tokens // size) * size:
        return None
    near = f"the nearest valid value is cache_tokens={needed}"
    longest = max(cell.prefixes)
    if longest > cell.cache_tokens:
        return f"a prefix of {longest:,} tokens is longer than the cache of {cell.cache_tokens:,}: a rank needs {needed:,} in pages of {size}; {near}"
    return f"the batch needs {needed:,} tokens of cache on a rank, in pages of {size}, more than cache_tokens = {cell.cache_tokens:,}; {near}"


def pass_seconds(cell: Cell, plan: Plan) -> float:
    """Estimated seconds of one pass: the operations of all ranks over what the devices in use reach together.

    Pipeline stages wait for the first step to arrive and for the last one to leave: with m steps, pp stages take (m + pp - 1) / m times
    as long as if all worked all the time. On oversubscribed cores others use what a waiting rank leaves.
    """
    steps, stages = cell.step_count, cell.layout.pp
    waiting = (steps + stages - 1) / steps
    if cell.device == "cuda":
        return flops(cell) * waiting / (CUDA_RATE[cell.dtype] * cell.world_size)
    threads = cell.world_size * plan.threads_per_rank(cell.world_size)
    return flops(cell) / (CPU_RATE[cell.dtype] * min(plan.cores_of(cell.world_size), threads / waiting))


def timed_passes(seconds: float, timing: Timing) -> int:
    """How many passes a round will time at most, if one takes `seconds`."""
    fitting = int(timing.max_seconds / seconds) + 1 if seconds > 0 else timing.max_samples
    return max(timing.min_samples, min(timing.max_samples, fitting))


def _seconds(cell: Cell, plan: Plan, timing: Timing) -> float:
    once = pass_seconds(cell, plan)
    return CELL_SECONDS + once * (UNTIMED_PASSES + timed_passes(once, timing))


def _live_bytes(cell: Cell) -> int:
    """The largest peak of a rank. Tensor-parallel ranks hold the same, stages in the middle no more than the first or the last one; first,
    middle and last CP rank bound the others."""
    layout, steps = cell.layout, _largest_steps(cell)
    places = product({0, layout.pp - 1}, _different_parts(cell), {0, (layout.cp - 1) // 2, layout.cp - 1})
    return max(live_bytes(cell, layout.rank_of(pp, dp, cp), steps) for pp, dp, cp in places)


def _different_parts(cell: Cell) -> list[int]:
    """One DP group for every batch that one has."""
    first = {(part.cell.lengths, part.cell.prefixes): dp for dp, part in reversed(list(enumerate(cell.parts)))}
    return list(first.values())


def _largest_steps(cell: Cell) -> list[int]:
    """Of many chunks those that can need most: the first, and the last one of each sequence with the one before it, which may be longer."""
    count = cell.step_count
    if count <= MAX_STEPS:
        return list(range(count))
    steps = [part.cell.steps for part in cell.parts]
    ends = [sum(1 for step in mine if step.lengths[sequence]) for mine in steps for sequence in range(len(mine[0].lengths) if mine else 0)]
    return sorted({0, *(max(0, end - back) for end in ends for back in (1, 2))})


def _require_kernel(scenario: Scenario, config: ModelConfig) -> None:
    dtype = scenario.dtype or "float32"
    reason = load_kernel(scenario.kernel).available(scenario.device, dtype, config.head_dim, config.head_dim)
    if reason:
        raise CpbenchError(f"Kernel {scenario.kernel!r} cannot run here: {reason}.", "Use --set kernel=auto, or see cpbench list kernels.")


def _require_partition(scenario: Scenario, cells: Sequence[Cell]) -> None:
    """Raise where no strategy can use the partition that was asked for; where some can, the others are rows without a result."""
    names = list(dict.fromkeys(cell.strategy for cell in cells if cell.layout.cp > 1))
    partition = scenario.partition
    if partition is None or not names or any(partition in STRATEGIES[name].partitions for name in names):
        return
    able = ", ".join(name for name, strategy in STRATEGIES.items() if partition in strategy.partitions and name != BASELINE)
    nearest = f"Use --partition {STRATEGIES[names[0]].partitions[0]}"
    raise CpbenchError(f"{', '.join(names)} cannot use the {partition} partition.", f"{nearest}, or a strategy that can: {able}." if able else f"{nearest}.")


def _refuse_left_out(scenario: Scenario, cells: Sequence[Cell], left: Sequence[LeftOut]) -> None:
    """Raise for a layout that was asked for by name, and where nothing of what was asked for is left."""
    if left and (scenario.layouts or not any(_asked(scenario, cell) for cell in cells)):
        raise impossible(left[0].name, f"{left[0].reason}; the nearest valid layout is {left[0].nearest}")


def _asked(scenario: Scenario, cell: Cell) -> bool:
    """Whether a cell is more than a baseline that was added."""
    return scenario.cp is None or cell.layout.cp in scenario.cp


def _refuse_impossible(scenario: Scenario, planned: list[PlannedCell]) -> None:
    """Raise for a requested value of an axis with which every cell is unsupported; a baseline that was added counts for nothing."""
    asked = [p for p in planned if _asked(scenario, p.cell)]
    for option, used, only in (("head_groups", scenario.head_groups > 1, GROUPED), ("compile", scenario.compile != NOT_COMPILED, COMPILED)):
        if used and not any(p.cell.strategy == only for p in asked):
            raise CpbenchError(f"{option} is for {only}, which is not among the strategies.", f"Add --strategy {only}, or leave {option} out.")
    if all(p.status == "unsupported" for p in asked) and all(_memory_reason(p.cell) == p.reason for p in asked):
        raise impossible("", asked[0].reason or "")
    for name, cells in _requested(scenario, asked):
        if cells and all(p.status == "unsupported" for p in cells):
            raise impossible(name, cells[0].reason or "")


def _requested(scenario: Scenario, planned: list[PlannedCell]) -> Iterator[tuple[str, list[PlannedCell]]]:
    """Every value that was asked for by name, and the cells that have it. Strategies that nobody named may fail to run."""
    strategies = scenario.strategies or []
    every = {name for name in STRATEGIES if name != BASELINE}
    implied = set(COMMON_DEFAULTS["strategies"]) if strategies == COMMON_DEFAULTS["strategies"] else every if every <= set(strategies) else set()
    for name in dict.fromkeys(strategies) if any(p.cell.layout.cp > 1 for p in planned) else ():
        if name not in implied:
            able = [p for p in planned if p.cell.partition in STRATEGIES[p.cell.strategy].partitions]
            yield f"strategy={name}", [p for p in able if runs_as(name, p.cell)]
    sizes = [(axis, size) for axis in ("tp", "pp", "cp", "dp") for size in getattr(scenario, axis) or [] if size > 1]
    for axis, size in dict.fromkeys([*sizes, *([("cp", 1)] if 1 in (scenario.cp or []) else [])]):
        yield f"{axis}={size}", [p for p in planned if p.cell.layout.size(axis) == size]
    named: dict[Layout, list[PlannedCell]] = {Layout.parse(name): [] for name in scenario.layouts or []}
    for p in planned if named else []:  # a hybrid has divided a layout that left it open
        (named[p.cell.layout] if p.cell.layout in named else named[replace(p.cell.layout, ulysses=1)]).append(p)
    yield from ((str(layout), cells) for layout, cells in named.items())
    of_batch: defaultdict[Batch, list[PlannedCell]] = defaultdict(list)
    of_seq: defaultdict[int, list[PlannedCell]] = defaultdict(list)
    for p in planned:
        of_batch[Batch(p.cell.lengths, p.cell.prefixes)].append(p)
        of_seq[p.cell.lengths[0]].append(p)
    yield from ((f"lengths={batch.label}", of_batch[batch]) for batch in [fields.batch for fields in scenario.batches or []])
    yield from ((f"seq={seq}", of_seq[seq]) for seq in scenario.seq or [])


def impossible(asked: str, reason: str) -> CpbenchError:
    """A reason with the nearest valid value behind a semicolon as the error of the whole sweep. `asked`: the value that it is about, if one is."""
    text, _, nearest = reason.partition("; ")
    if not asked:
        text = text[:1].upper() + text[1:]
    elif not text.startswith(f"{asked} "):
        text = f"{asked} cannot run: {text}"
    return CpbenchError(f"{text}.", nearest[:1].upper() + nearest[1:] + "." if nearest else "")
