"""`cpbench.project`: projections from Python, as results that are printed, plotted and compared like those of files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from cpbench.environment import detect_machine
from cpbench.frame import Results
from cpbench.projecting_command import DEFAULT_HARDWARE, Asked, Devices, described
from cpbench.projection.running import run_projection


def project(hardware: str = DEFAULT_HARDWARE, *, gpus_per_node: int | None = None, link: str | None = None, **fields: Any) -> Results:
    """Project what fields of a scenario describe: `cpbench.project("h200", model="qwen3-8b", seq="128k", layouts="cp8,tp8sp")`.

    `hardware`: a device profile by name or file; `link` as for --link. All layers, unless `layers` says how many. Cells are shared out over
    processes, so a script needs `if __name__ == "__main__":` around the call. Raises CpbenchError for what a command would complain about.
    """
    devices = Devices(hardware, None, None if gpus_per_node is None else str(gpus_per_node), link, None)
    target = devices.target()
    job, plan = described(Asked(None, None, {"name": "project", **fields}, [], None, devices), target)
    with tempfile.TemporaryDirectory(prefix="cpbench-") as folder:
        file = Path(folder) / "project.json"
        found = run_projection(job.scenario, plan, detect_machine(), file, target, argv=["project"], notes=job.notes, tell=lambda result, done: None)
    return Results((found,), ("projected",))
