"""What a result file says of the run that made it. What it says of cells is in records.py."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

import cpbench
from cpbench.environment import git_state
from cpbench.results import Run, RunKind
from cpbench.scenario import Scenario


def new_run(scenario: Scenario, argv: list[str], notes: list[str], kind: RunKind = "sweep") -> Run:
    """What a result file says of a run that starts now."""
    return Run(
        kind=kind,
        id=uuid.uuid4().hex[:12],
        name=scenario.name,
        argv=argv,
        scenario=scenario.model_dump(mode="json"),
        defaults=notes,
        started=now(),
        cpbench_version=cpbench.__version__,
        git=git_state(),
    )


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
