"""A scenario of exactly one cell that can run, for a profile or an explained projection, and the flags that narrow down one of several."""

from __future__ import annotations

from cpbench.axes import BASELINE
from cpbench.cell import Cell
from cpbench.errors import CpbenchError
from cpbench.flags import FLAG_OF
from cpbench.plan import Plan
from cpbench.scenario import AXES, Scenario

SHOWN = 4


def require_one(plan: Plan, scenario: Scenario, what: str = "A profile", command: str = "sweep") -> Cell:
    """The one cell of a plan. Raises CpbenchError where there are several, or where it cannot run. `what` needs one, and `command` lists plans."""
    cells = [planned.cell for planned in plan.cells]
    if len(cells) > 1:
        labels = ", ".join(dict.fromkeys(cell.label for cell in cells[:SHOWN])) + (", ..." if len(cells) > SHOWN else "")
        raise CpbenchError(f"{what} is of one cell, and this describes {len(cells)}: {labels}.", f"Narrow it down: {_narrowed(scenario, cells[0])}.")
    if scenario.rounds > 1:
        raise CpbenchError(f"{what} is of one round.", "Leave rounds out.")
    if plan.cells[0].status:
        raise CpbenchError(f"{cells[0].label} cannot run: {plan.cells[0].reason}.", f"cpbench {command} --dry-run shows what can.")
    return cells[0]


def _narrowed(scenario: Scenario, first: Cell) -> str:
    """The flags of the first cell, for every axis that has several values."""
    first_of = {"strategies": first.strategy, "batches": _lengths(first), "gpus": None}
    several = {name: values for name in (*AXES, "strategies") if (values := getattr(scenario, name)) and len(values) > 1}
    said = [f"--{FLAG_OF.get(name, name)} {value}" for name, values in several.items() if (value := first_of.get(name, values[0])) not in (None, BASELINE)]
    return " ".join([*([f"--layouts {first.layout}"] if scenario.gpus else []), *said])


def _lengths(cell: Cell) -> str:
    return ",".join(map(str, cell.lengths)) + (f" --prefix {','.join(map(str, cell.prefixes))}" if any(cell.prefixes) else "")
