"""What `cpbench project` does between flags and exit code: which devices, which cells, the projections printed.

How a cell is projected is decided in projection/; what the flags are called is in options.py.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cpbench import commands
from cpbench.environment import detect_machine
from cpbench.errors import UNREADABLE, CpbenchError, unknown
from cpbench.plan import Plan, PlannedCell, make_plan
from cpbench.projection.explained import Explanation, explain, require_layers
from cpbench.projection.profile import load_profile
from cpbench.projection.projecting import Compute, Target
from cpbench.projection.running import exit_code, imagined, require_device, run_projection
from cpbench.reading import read
from cpbench.report import console
from cpbench.report.listing import plan_view
from cpbench.report.projection import projection_view, seconds_of
from cpbench.report.timeline import timeline_json, timeline_view
from cpbench.single import require_one
from cpbench.units import format_seconds

if TYPE_CHECKING:
    from cpbench.results import CellResult, ResultFile

DEFAULT_HARDWARE = "h200"
COMPUTES = ("lookup", "measured")
DEGREES = ("cp", "tp", "dp", "pp", "ep", "layouts", "gpus")
MAX_NODES = 1 << 16


@dataclass(frozen=True)
class Devices:
    """The flags that say which devices."""

    hardware: str | None
    nodes: str | None
    gpus_per_node: str | None
    link: str | None
    compute: str | None

    def target(self) -> Target:
        """What is projected to. Raises CpbenchError."""
        compute = self.compute or COMPUTES[0]
        if compute not in COMPUTES:
            raise unknown("compute", compute, COMPUTES)
        here = detect_machine().device
        default = DEFAULT_HARDWARE if compute == COMPUTES[0] or here == "cuda" else "cpu"
        target = Target(self.hardware or default, _count("--gpus-per-node", self.gpus_per_node) or 0, self.link, cast(Compute, compute))
        target.links(load_profile(target.hardware), 1)  # a link that does not parse
        return target

    def ranks(self, target: Target) -> int | None:
        """How many devices there are, where that is said."""
        nodes = _count("--nodes", self.nodes)
        return nodes and nodes * target.per_node(load_profile(target.hardware))


def _count(flag: str, text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdecimal() or not 0 < int(text) <= MAX_NODES:
        raise CpbenchError(f"{flag} {text[:20]} is no number from 1 to {MAX_NODES:,}.", f"For example {flag} {'8' if 'gpus' in flag else '2'}.")
    return int(text)


@dataclass(frozen=True)
class Asked:
    """The flags that say what is projected: a file whose skipped cells are, or a scenario and what flags change of it."""

    file: Path | None
    scenario: Path | None
    fields: dict[str, Any]
    settings: list[str]
    output: Path | None
    devices: Devices


@dataclass(frozen=True)
class Shown:
    """The flags that say what is printed."""

    top: int | None
    explained: bool
    dry_run: bool
    as_json: bool
    quiet: bool


def run(asked: Asked, shown: Shown) -> int:
    """Project, print, and say where the result is."""
    if shown.top is not None and shown.top < 1:
        raise CpbenchError(f"--top {shown.top} shows nothing.", "For example --top 10.")
    target, here = asked.devices.target(), detect_machine()
    ranks = asked.devices.ranks(target)
    if ranks and not asked.file and not asked.scenario and not any(name in asked.fields for name in DEGREES):
        asked = replace(asked, fields=asked.fields | {"gpus": str(ranks)})
    if shown.explained:
        asked = _of_one(asked)
    job, plan = _skipped(asked, asked.file, target) if asked.file else described(asked, target)
    _require_room(plan, ranks, target)
    if shown.explained:
        require_layers(require_one(plan, job.scenario, "--explain", "project"), target)
    require_device(job.scenario, here, target)
    lines = [f"{job.scenario.target} of {job.scenario.model} on {load_profile(target.hardware).title}", *(f"  {note}" for note in job.notes)]
    if shown.dry_run:
        console.show(console.output(), [*lines, *plan_view(plan, job.machine, timed=False), "Nothing was projected."])
        return 0
    messages, total = console.messages(), len(plan.cells)
    console.show(messages, [] if shown.quiet else lines)

    def tell(result: CellResult, done: int) -> None:
        if not shown.quiet and result.projection is not None:
            text = f"{done}/{total} {result.key['layout']} {result.key['strategy']}: projected {format_seconds(seconds_of(result))}"
            console.show(messages, [text])

    result = run_projection(job.scenario, plan, here, job.output, target, argv=sys.argv[1:], notes=job.notes, tell=tell)
    explained = explain(plan.cells[0].cell, target) if shown.explained and result.cells[:1] and result.cells[0].projection else None
    files = [*(_drawn(explained, job.output) if explained else []), f"Result: {job.output}"]
    _print(result, shown, explained)
    console.show(messages if shown.as_json else console.output(), [] if shown.as_json and shown.quiet else files)
    return exit_code(result)


def _of_one(asked: Asked) -> Asked:
    """What is asked, without what would make several cells of it. Raises CpbenchError for a file."""
    if asked.file:
        raise CpbenchError(f"--explain is of one cell that flags describe, and {asked.file} is a file.", "Leave the file out, or --explain.")
    return replace(asked, fields=asked.fields | {"baseline": False, "rounds": 1})


def _drawn(explained: Explanation, output: Path) -> list[str]:
    """Draw a layer beside the result, and say where."""
    from cpbench.plot.files import write_charts
    from cpbench.plot.timeline import draw

    chart = draw(explained.stretches, f"{explained.title}\n{explained.subject}")
    return [f"Figure: {file}" for file in write_charts({"timeline": chart} if chart else {}, output.parent, output.stem, ["svg"])]


def described(asked: Asked, target: Target) -> tuple[commands.Job, Plan]:
    """The cells that flags describe."""
    job = _job(asked, target)
    return job, make_plan(job.scenario, job.machine)


def _job(asked: Asked, target: Target) -> commands.Job:
    """What flags describe, on the machine that is projected to; of a prefill all layers, unless it is said how many."""
    job = commands.fresh(asked.scenario, asked.fields, {}, asked.settings, asked.output, imagined(detect_machine(), target))
    said = any(name.startswith("layers") for name in asked.settings) or "layers" in asked.fields
    notes = [note for note in job.notes if "timed passes" not in note]
    if job.scenario.target == "prefill" and not said and not asked.scenario:
        from cpbench.defaults import model_of

        layers = model_of(job.scenario).layers
        notes = [note for note in notes if not note.startswith("layers ")] + [f"layers {layers} (default: all)"]
        return replace(job, scenario=job.scenario.model_copy(update={"layers": layers}), notes=notes)
    return replace(job, notes=notes)


def _skipped(asked: Asked, file: Path, target: Target) -> tuple[commands.Job, Plan]:
    """The cells of a sweep that were skipped for lack of ranks. Raises CpbenchError where there are none, or flags describe others."""
    from cpbench.cell import Cell
    from cpbench.defaults import model_of
    from cpbench.resume import scenario_of

    if asked.scenario or asked.settings or set(asked.fields) - {"name"}:
        raise CpbenchError(f"{file} says what is projected, and so do flags.", "Leave the flags out, or the file.")
    result = read(file)
    swept = scenario_of(result, file, {})
    job = commands.fresh(None, {"name": "project"}, {}, [], asked.output, imagined(detect_machine(), target))
    skipped = [cell for cell in result.cells if cell.status == "skipped"]
    if not skipped:
        raise CpbenchError(f"{file} has no cell that was skipped.", "Describe what to project by flags: cpbench project --seq 36k --cp 8.")
    config = model_of(swept)
    try:
        cells = [Cell.from_dict({**cell.key, "config": config.to_dict()}) for cell in skipped]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CpbenchError(f"{file} does not say what its skipped cells are.", "It was edited; describe them by flags.", UNREADABLE) from error
    device = job.machine.device
    planned = tuple(PlannedCell(replace(cell, device=device), None, None, 0.0) for cell in cells)
    plan = Plan(planned, 1, job.machine.cores, swept.threads, device)
    return replace(job, scenario=swept, notes=[f"{len(cells)} cells that {file} skipped"]), plan


def _require_room(plan: Plan, ranks: int | None, target: Target) -> None:
    """Raise CpbenchError for a layout of more ranks than there are devices."""
    largest = max((planned.cell for planned in plan.cells), key=lambda cell: cell.world_size)
    if ranks and largest.world_size > ranks:
        per_node = target.per_node(load_profile(target.hardware))
        nodes = -(-largest.world_size // per_node)
        raise CpbenchError(f"{largest.layout} has {largest.world_size} ranks, and there are {ranks} devices.", f"The nearest valid value is --nodes {nodes}.")


def _print(result: ResultFile, shown: Shown, explained: Explanation | None) -> None:
    if shown.as_json:
        made = result.model_dump(mode="json", by_alias=True)
        console.show_json(json.dumps(made | {"explained": explained.to_dict() | timeline_json(explained.stretches)} if explained else made, indent=1))
        return
    out = console.output()
    console.show(out, projection_view(result, out, top=shown.top))
    if explained:
        console.show(out, ["", console.plain(f"{explained.title}: {explained.subject}", "bold"), *timeline_view(explained.stretches, out), *explained.notes()])
