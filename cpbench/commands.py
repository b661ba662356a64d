"""What the commands do between flags and exit codes: a sweep that is new or continued, its plan, and a grid to verify, run and printed.

Heavy modules are imported where they are used, because `--help` must not wait for them. Flags and their texts are in cli.py and options.py.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cpbench.errors import INTERRUPTED, CpbenchError

if TYPE_CHECKING:
    from cpbench.driver import Tracing
    from cpbench.environment import Machine
    from cpbench.launch import Launcher
    from cpbench.results import ResultFile
    from cpbench.scenario import Scenario


@dataclass(frozen=True)
class Job:
    """A sweep that is ready to start."""

    scenario: Scenario
    machine: Machine
    output: Path
    notes: list[str]
    resume: ResultFile | None = None
    retry: tuple[str, ...] = ("interrupted",)


def fresh(file: Path | None, fields: dict[str, Any], limits: dict[str, str], settings: list[str], output: Path | None, machine: Machine | None = None) -> Job:
    """What the flags say over what the file says over what the machine suggests: this one, or another one."""
    from datetime import UTC, datetime

    from cpbench.resume import RESULTS
    from cpbench.scenario import override, parse_scenario, read_yaml, resolve, without_replaced

    data: dict[str, Any] = {**without_replaced(read_yaml(file) if file else {}, fields), **fields}
    for setting in [*(f"limits.{name}={value}" for name, value in limits.items()), *settings]:
        data = override(data, setting)
    machine = machine or this_machine()
    scenario, notes = resolve(parse_scenario(data), machine)
    name = f"{scenario.name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    return Job(scenario, machine, output or RESULTS / name, notes)


def resumed(output: Path | None, limits: dict[str, str], retry: str | None, force: bool) -> Job:
    from cpbench import resume

    statuses = resume.retried("interrupted" if retry is None else retry)
    file, result = resume.find(output)
    scenario, machine = resume.scenario_of(result, file, limits), this_machine()
    if not force:
        resume.require_same_machine(result, machine)
    return Job(scenario, machine, file, result.run.defaults, result, statuses)


def this_machine() -> Machine:
    """The machine, with all nodes of the launch that this process is inside of. Raises CpbenchError where its ranks have too few GPUs."""
    from cpbench.environment import detect_machine
    from cpbench.launch import LAUNCH

    machine, launch = detect_machine(), LAUNCH.get()
    if launch is None:
        return machine
    if machine.device == "cuda" and launch.ranks_per_node > machine.devices > 1:
        hint = f"Start {machine.devices} on each node, one for each GPU."
        raise CpbenchError(f"The launch has {launch.ranks_per_node} ranks on a node of {machine.devices} GPUs.", hint)
    devices = launch.nodes * launch.ranks_per_node if machine.device == "cuda" else 0
    return replace(machine, devices=devices, nodes=launch.nodes, ranks_per_node=launch.ranks_per_node)


def refuse_with_resume(given: list[str]) -> None:
    from cpbench.flags import FLAG_OF

    if given:
        flag = f"--{FLAG_OF.get(given[0], given[0])}"
        raise CpbenchError(f"--resume reads what to measure from the file and cannot be combined with {flag}.", f"Leave {flag} out, or start a new sweep.")


def run_job(job: Job, as_json: bool, quiet: bool, tracing: Tracing | None = None, launcher: Launcher | None = None) -> int:
    """Run, print, and say how it went."""
    from cpbench import resume
    from cpbench.clocks import Watcher
    from cpbench.driver import exit_code, run_sweep
    from cpbench.plan import make_plan
    from cpbench.report import console
    from cpbench.report.listing import plan_echo
    from cpbench.report.progress import Silent, progress_on
    from cpbench.report.table import closing_lines

    plan = make_plan(job.scenario, job.machine)
    messages = console.messages()
    if not quiet:
        continued = job.resume and [resume.describe(job.resume, job.output, job.retry)]
        console.show(messages, continued or plan_echo(job.scenario, plan, job.notes, job.machine))
    result = run_sweep(
        job.scenario,
        plan,
        job.machine,
        job.output,
        argv=sys.argv[1:],
        notes=job.notes,
        progress=Silent() if quiet else progress_on(messages, job.machine.cores),
        clocks=Watcher(job.machine.cores),
        resume=job.resume,
        retry=job.retry,
        tracing=tracing,
        launcher=launcher,
    )
    print_result(result, as_json, job.output)
    console.show(messages if as_json else console.output(), [] if as_json and quiet else closing_lines(result, job.output))
    return exit_code(result)


def profile(job: Job, by_nsys: bool, as_json: bool, quiet: bool) -> int:
    """Run the one cell of a job with traces. Raises CpbenchError where it has several, or nsys is not here."""
    from cpbench.launch import LAUNCH
    from cpbench.plan import make_plan
    from cpbench.single import require_one
    from cpbench.tracing import nsys
    from cpbench.tracing.session import Session

    if (launch := LAUNCH.get()) and (launch.nodes > 1 or by_nsys):
        what = "nsys starts its own ranks" if by_nsys else "traces are read on the node that wrote them"
        raise CpbenchError(f"profile does not run in this launch: {what}.", "Run cpbench profile by itself on one node.")
    cell = require_one(make_plan(job.scenario, job.machine), job.scenario)
    session = Session(job.output, by_nsys, job.scenario.limits.memory)
    launcher = nsys.launcher(session.folder, cell.device, cell.world_size) if by_nsys else None
    with session.opened():
        return run_job(job, as_json, quiet, session, launcher)


def show_plan(job: Job, as_json: bool) -> int:
    import json

    from cpbench.plan import make_plan
    from cpbench.report import console
    from cpbench.report.listing import plan_echo, plan_json, plan_view

    plan = make_plan(job.scenario, job.machine)
    if as_json:
        console.show_json(json.dumps(plan_json(job.scenario, plan, job.notes), indent=1))
        return 0
    echo = plan_echo(job.scenario, plan, job.notes, job.machine)
    console.show(console.output(), [*echo[:-1], *plan_view(plan, job.machine), f"{echo[-1]}. Nothing was run."])
    return 0


def verify(fields: dict[str, Any], settings: list[str], deep: bool, as_json: bool, quiet: bool) -> int:
    """Run the grid and print it; what has run so far where it is interrupted."""
    import json

    from cpbench import verify as verification
    from cpbench.environment import detect_machine
    from cpbench.report import console
    from cpbench.report.verification import Progress, header, verification_json, verification_view

    asked, device = verification.asked_fields(fields, settings, detect_machine())
    entries = verification.grid(asked, device, deep=deep)
    messages, rows, interrupted = console.messages(), list[verification.Row](), False
    console.show(messages, [] if quiet else [header(entries, device)])
    try:
        with Progress(messages, len(entries), quiet=quiet) as progress:
            for row in verification.run(entries, device, progress.starting):
                rows.append(row)
                progress.done(row)
    except KeyboardInterrupt:
        interrupted = True
    if as_json:
        console.show_json(json.dumps(verification_json(rows), indent=1))
    else:
        out = console.output()
        console.show(out, verification_view(rows, out, interrupted))
    return INTERRUPTED if interrupted else int(any(row.verdict == "wrong" for row in rows))


def maxseq_job(fields: dict[str, Any], limits: dict[str, str], settings: list[str], output: Path | None) -> Job:
    """What the flags of `maxseq` say as a scenario. Raises CpbenchError for what is not one batch, or would change nothing."""
    from cpbench.maxseq import USELESS

    if "layouts" not in fields:
        raise CpbenchError("maxseq looks for the longest sequence of layouts, and none is named.", "Name them, for example --layouts cp2,tp2.")
    for setting in settings:
        name = setting.partition("=")[0].strip()
        if name.partition(".")[0] in USELESS or name == "limits.budget":
            raise CpbenchError(f"maxseq has no use for {name}: it times nothing and chooses lengths itself.", f"Leave --set {name} out.")
    job = fresh(None, {"name": "maxseq", "baseline": False, **fields}, limits, settings, output)
    for name in ("seq", "batch", "prefix"):
        values = getattr(job.scenario, name) or [0]
        if len(values) > 1:
            raise CpbenchError(f"maxseq starts from one {name}, and {len(values)} are given.", f"Give one, for example {name} {values[0]}.")
    return job


def maxseq(job: Job, precision: str | None, as_json: bool, quiet: bool) -> int:
    """Search, print, and say where the trials are."""
    import json
    import shlex

    from cpbench.maxseq import exit_code, require_limit, run_maxseq
    from cpbench.plan import make_plan
    from cpbench.report import console
    from cpbench.report.longest import Lines, longest_json
    from cpbench.units import parse_fraction

    plan = make_plan(job.scenario, job.machine)
    require_limit(job.scenario, plan, job.machine)
    for file in (job.output, job.output.with_suffix(".jsonl")):
        if file.exists():
            raise CpbenchError(f"{file} exists.", "Choose another file with -o.")
    messages, part = console.messages(), parse_fraction(precision or "1%")
    notes = [note for note in job.notes if "timed passes" not in note]
    console.show(messages, [] if quiet else [f"{job.scenario.model} on {job.scenario.device}", *(f"  {note}" for note in notes)])
    with Lines(messages, quiet=quiet) as progress:
        result = run_maxseq(job.scenario, plan, job.machine, job.output, precision=part, argv=sys.argv[1:], notes=notes, progress=progress)
    if as_json:
        console.show_json(json.dumps(longest_json(result), indent=1))
    else:
        print_result(result, as_json, job.output)
    lines = [f"Result: {job.output}", f"See it again with: cpbench show {shlex.quote(str(job.output))}"]
    console.show(messages if as_json else console.output(), [] if as_json and quiet else lines)
    return exit_code(result)


@dataclass(frozen=True)
class LogProbFlags:
    """The flags of `verify` that ask for log-probabilities instead of the grid."""

    file: Path | None
    against: str | None
    output: Path | None
    trace: bool
    temperature: str | None
    rounding: str | None

    @property
    def given(self) -> list[str]:
        """Those that were given, as they are written."""
        names: dict[str, object] = {"FILE": self.file, "--temperature": self.temperature, "--rounding": self.rounding}
        names |= {"--against": self.against, "-o": self.output, "--trace-divergence": self.trace or None}
        return [name for name, value in names.items() if value is not None]


def verify_log_probs(flags: LogProbFlags, fields: dict[str, Any], settings: list[str], deep: bool, as_json: bool, quiet: bool) -> int:
    """Run one layout, or read a file, compare with another one or a file, print, store. Exit code 1 where they are not identical."""
    import json

    from cpbench import against
    from cpbench.atomic import refuse_existing
    from cpbench.environment import detect_machine
    from cpbench.logprob_record import write_log_probs
    from cpbench.logprobs import Rule
    from cpbench.report import console
    from cpbench.report.agreement import agreement_json, agreement_view, record_line, running

    _refuse_useless(flags, fields, settings, deep)
    if flags.output:
        refuse_existing(flags.output)
    rule = Rule.parse(flags.temperature, flags.rounding)
    one, other = against.sides(flags.file, flags.against, fields, settings, rule, detect_machine())
    runners = [side for side in (other, one) if isinstance(side, against.Runner)]
    console.show(console.messages(), [] if quiet else [running(runner.cell) for runner in runners])
    result = against.compare(one, other, flags.trace) if one else None
    record = result.other if result else against.record_of(other)
    if flags.output:
        write_log_probs(record, flags.output)
    if as_json:
        console.show_json(json.dumps(agreement_json(result), indent=1) if result else record.model_dump_json(by_alias=True, indent=1))
    else:
        console.show(console.output(), agreement_view(result, flags.trace) if result else [record_line(record)])
    return int(result is not None and not result.agreement.identical)


def _refuse_useless(flags: LogProbFlags, fields: dict[str, Any], settings: list[str], deep: bool) -> None:
    """Raise for a flag that would change nothing."""
    from cpbench.against import LAYOUT_FIELDS, is_file
    from cpbench.flags import FLAG_OF

    first = flags.given[0]
    if flags.file and not flags.against:
        raise CpbenchError(f"{flags.file} is to be compared, and nothing says with what.", "Add --against LAYOUT or --against FILE.")
    if not (flags.against or flags.output):
        raise CpbenchError(f"{first} is for log-probabilities that are compared or stored.", "Add --against LAYOUT or FILE, or -o FILE.")
    if deep:
        raise CpbenchError(f"--deep is for the grid, and {first} is for one layout.", "Leave --deep out.")
    files = [name for name in (str(flags.file or ""), flags.against or "") if name and is_file(name)]
    if flags.trace and (files or not flags.against):
        hint = "Give two layouts: --layouts cp2 --against cp1 --trace-divergence."
        raise CpbenchError("--trace-divergence looks into two layouts while they run.", hint)
    if flags.file and flags.output:
        raise CpbenchError(f"-o stores what is run, and {flags.file} is stored.", "Leave -o out.")
    given = {name: f"--{FLAG_OF.get(name, name)}" for name in fields}
    given |= {name: f"--set {name}" for name in (text.partition("=")[0].strip() for text in settings)}
    given |= {name: name for name in ("--temperature", "--rounding") if name in flags.given}
    useless = [flag for name, flag in given.items() if len(files) > 1 or (flags.file and name in LAYOUT_FIELDS)]
    if useless:
        raise CpbenchError(f"{flags.file} says what was run, and {useless[0]} would change nothing.", f"Leave {useless[0]} out, or {flags.file}.")


def print_result(result: ResultFile, as_json: bool, file: Path) -> None:
    """A result as a table, with the profiles that it holds; `file` is where it is."""
    from cpbench.report import console
    from cpbench.report.whole import whole_view

    if as_json:
        console.show_json(result.model_dump_json(by_alias=True, indent=1))
        return
    out = console.output()
    console.show(out, whole_view(result, file.parent, out))
