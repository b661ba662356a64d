"""What the scenarios that come with cpbench need, and whether this machine has it: from their plans, without running anything.

Which scenarios there are is in scenario_files.py, which cells come out of one is decided in plan.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cpbench.environment import Machine
from cpbench.errors import CpbenchError
from cpbench.plan import GROUP_SECONDS, Plan, PlannedCell, make_plan
from cpbench.scenario import load_scenario, resolve
from cpbench.scenario_files import question
from cpbench.units import format_bytes


@dataclass(frozen=True)
class Needs:
    """A scenario: its `ranks` are those of its largest layout, `tokens` those of its longest sequence, cached ones included; 0 where it has no plan here.

    `missing`: why nothing of it can run here, or what of it cannot; None where all of it can. `seconds`: about how long the cells take that
    can run here, None where none can. `threads_per_core` is above 1 where ranks share the cores of a CPU.
    """

    name: str
    question: str
    model: str
    layers: int
    ranks: int = 0
    tokens: int = 0
    missing: str | None = None
    seconds: float | None = None
    threads_per_core: float = 0.0


def needs(name: str, file: Path, machine: Machine) -> Needs:
    """What a scenario needs on this machine. Raises CpbenchError where the file is no scenario."""
    scenario, _ = resolve(load_scenario(file), machine)
    asked = (name, question(file), scenario.model or "", scenario.layers or 1)
    try:
        plan = make_plan(scenario, machine)
    except CpbenchError as error:  # something that was asked for by name cannot run on this kind of device
        return Needs(*asked, missing=error.message.rstrip("."))
    cells = [planned.cell for planned in plan.cells]
    fitting = [planned for planned in plan.runnable if _needed(planned) <= _there(plan, machine)]
    sizes = {planned.cell.world_size for planned in fitting}
    return Needs(
        *asked,
        ranks=max(cell.world_size for cell in cells),
        tokens=max(new + cached for cell in cells for new, cached in zip(cell.lengths, cell.prefixes, strict=True)),
        missing=_missing(plan, fitting, machine),
        seconds=plan.rounds * (sum(planned.seconds for planned in fitting) + GROUP_SECONDS * len(sizes)) if fitting else None,
        threads_per_core=max((size * plan.threads_per_rank(size) / plan.cores for size in sizes), default=0.0) if plan.device == "cpu" else 0.0,
    )


def _needed(planned: PlannedCell) -> int:
    """Bytes of live tensors that share a memory: those of one rank on a GPU, of all ranks on a CPU."""
    return planned.live_bytes * (1 if planned.cell.device == "cuda" else planned.cell.world_size)


def _there(plan: Plan, machine: Machine) -> int:
    return machine.gpu_memory_bytes if plan.device == "cuda" else machine.memory_bytes


def _missing(plan: Plan, fitting: Sequence[PlannedCell], machine: Machine) -> str | None:
    """Why some cells cannot run here, as it is for the first of them."""
    lacking = [planned for planned in plan.cells if planned not in fitting]
    if not lacking:
        return None
    first = lacking[0]
    reason = first.reason or f"{first.cell.layout} needs {format_bytes(_needed(first))}, here are {format_bytes(_there(plan, machine))}"
    return f"{len(lacking)} of {len(plan.cells)} cells: {reason}" if fitting else reason
