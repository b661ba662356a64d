"""Real sweeps for tests: a scenario through the real driver, torchrun and workers, with gloo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cpbench.driver import run_sweep
from cpbench.environment import detect_machine
from cpbench.launch import Torchrun
from cpbench.plan import Plan, make_plan
from cpbench.results import ResultFile
from cpbench.scenario import Scenario, parse_scenario, resolve
from tests.unit.fakes import Notes

QUICK = {"timing": {"min_samples": 1, "max_samples": 1}, "device": "cpu"}


def planned(**fields: Any) -> tuple[Scenario, Plan]:
    """A scenario with one timed pass per cell, and its plan."""
    machine = detect_machine()
    scenario, _ = resolve(parse_scenario({**QUICK, **fields}), machine)
    return scenario, make_plan(scenario, machine)


def sweep(output: Path, module: str = "cpbench.worker", environment: dict[str, str] | None = None, **fields: Any) -> ResultFile:
    """Run a scenario; the ranks run `module`."""
    scenario, plan = planned(**fields)
    launcher = Torchrun(module, environment)
    return run_sweep(scenario, plan, detect_machine(), output, argv=[], notes=[], progress=Notes(), launcher=launcher)
