"""The command line: parse, call, print, exit code. What is measured, decided and printed is in other modules.

Nothing heavy is imported at the top, so that `cpbench --help` answers at once. Commands return their exit code. A CpbenchError becomes
two lines on stderr; so does a flag that does not parse. A bug keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from cpbench import __version__, options
from cpbench.errors import INTERRUPTED, CpbenchError, unknown

if TYPE_CHECKING:
    from cpbench.environment import Machine
    from cpbench.results import ResultFile
    from cpbench.scenario import Scenario

BROKEN_PIPE = 141  # 128 + SIGPIPE, as a shell reports it

app = typer.Typer(
    name="cpbench",
    help="Benchmark context parallelism of LLM decoder layers. Lengths are binary: 36k = 36,864 tokens.",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The entry point. Ends the process with the exit code."""
    try:
        sys.exit(run(sys.argv[1:]))
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)


def run(arguments: list[str]) -> int:
    """One command in this process. Returns its exit code; errors have been printed."""
    try:
        code = app(arguments, standalone_mode=False, prog_name="cpbench")
        sys.stdout.flush()
    except CpbenchError as error:
        return _complain(error)
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's own complaints have it
            raise
        return _complain(_usage(error))
    return int(code or 0)


def _complain(error: CpbenchError) -> int:
    from cpbench.report.console import show_error

    show_error(error)
    return error.exit_code


def _usage(error: Any) -> CpbenchError:
    """What typer says about the arguments, in our shape."""
    where = getattr(getattr(error, "ctx", None), "command_path", None) or "cpbench"
    message, _, near = str(error.format_message()).partition(" Did you mean ")
    if possible := getattr(error, "possibilities", None):
        message, near = f"No such option: {error.option_name}.", f"{possible[0]}?"
    hint = f"Did you mean {near} See {where} --help." if near else f"See {where} --help."
    return CpbenchError(f"{message.rstrip('.')}.", hint)


@app.callback(invoke_without_command=True)
def _root(context: typer.Context, version: options.VERSION = False) -> None:
    from cpbench.report.console import output, show

    if version:
        show(output(), [f"cpbench {__version__}"])
        raise typer.Exit
    if context.invoked_subcommand is None:
        raise CpbenchError("A command is missing.", "The main one is cpbench sweep; all are in cpbench --help.")


@app.command(epilog=options.MORE)
def sweep(
    scenario: options.SCENARIO = None,
    seq: options.SEQ = None,
    batch: options.BATCH = None,
    lengths: options.LENGTHS = None,
    prefix: options.PREFIX = None,
    pair: options.PAIR = False,
    cp: options.CP = None,
    tp: options.TP = None,
    dp: options.DP = None,
    pp: options.PP = None,
    ep: options.EP = None,
    layouts: options.LAYOUTS = None,
    gpus: options.GPUS = None,
    strategy: options.STRATEGY = None,
    partition: options.PARTITION = None,
    model: options.MODEL = None,
    target: options.TARGET = None,
    chunk: options.CHUNK = None,
    layers: options.LAYERS = None,
    experts: options.EXPERTS = None,
    weights: options.WEIGHTS = None,
    prompt: options.PROMPT = None,
    dtype: options.DTYPE = None,
    quant: options.QUANT = None,
    router: options.ROUTER = None,
    seed: options.SEED = None,
    threads: options.THREADS = None,
    setting: options.SET = None,
    rounds: options.ROUNDS = None,
    budget: options.BUDGET = None,
    cell_timeout: options.CELL_TIMEOUT = None,
    resume: options.RESUME = False,
    retry: options.RETRY = None,
    force: options.FORCE = False,
    output: options.OUTPUT = None,
    dry_run: options.DRY_RUN = False,
    as_json: options.JSON = False,
    quiet: options.QUIET = False,
) -> int:
    """Measure layouts: time to first token and peak memory of every combination of lengths, degrees and strategies."""
    from cpbench.batch import flag_batches

    axes = {"seq": seq, "batch": batch, "prefix": None if lengths else prefix, "strategies": strategy}
    axes |= {"cp": cp, "tp": tp, "dp": dp, "pp": pp, "ep": ep, "layouts": layouts, "gpus": gpus}
    fields: dict[str, Any] = {
        "partition": partition,
        "model": model,
        "target": target,
        "chunk": chunk,
        "layers": layers,
        "dtype": dtype,
        "quant": quant,
        "router": router,
        "seed": seed,
        "experts": experts,
    }
    fields |= {"weights": weights, "prompt": prompt, "threads": threads, "rounds": rounds, "pair": pair or None}
    fields |= {"batches": flag_batches(lengths, prefix or [])} if lengths else {}
    limits = {name: value for name, value in (("budget", budget), ("cell_timeout", cell_timeout)) if value is not None}
    given = {name: ",".join(values) for name, values in axes.items() if values} | {name: value for name, value in fields.items() if value is not None}
    if resume:
        _refuse_with_resume([*given, *(["scenario"] if scenario else []), *(["set"] if setting else []), *(["dry-run"] if dry_run else [])])
        return _run_job(_resumed(output, limits, retry, force), as_json, quiet)
    for name in (["--retry"] if retry is not None else []) + (["--force"] if force else []):
        raise CpbenchError(f"{name} is for sweeps that are continued.", "Add --resume, or leave it out.")
    job = _fresh(scenario, given, limits, setting or [], output)
    return _dry_run(job, as_json) if dry_run else _run_job(job, as_json, quiet)


@app.command()
def verify(
    strategy: options.VERIFY_STRATEGY = None,
    cp: options.VERIFY_CP = None,
    tp: options.VERIFY_TP = None,
    layouts: options.VERIFY_LAYOUTS = None,
    lengths: options.VERIFY_LENGTHS = None,
    prefix: options.VERIFY_PREFIX = None,
    chunk: options.VERIFY_CHUNK = None,
    model: options.VERIFY_MODEL = None,
    dtype: options.VERIFY_DTYPE = None,
    seed: options.VERIFY_SEED = None,
    setting: options.VERIFY_SET = None,
    deep: options.DEEP = False,
    as_json: options.JSON = False,
    quiet: options.QUIET = False,
) -> int:
    """Verify strategies, partitions and layouts against one device in fp64. Exit code 1 if one is wrong."""
    from cpbench.batch import flag_batches

    if prefix and not lengths:
        raise CpbenchError("--prefix describes the batch of --lengths, which is missing.", "Add --lengths, for example --lengths 101,67,130.")
    axes = {"cp": cp, "tp": tp, "layouts": layouts, "strategies": strategy}
    fields: dict[str, Any] = {name: ",".join(values) for name, values in axes.items() if values}
    fields |= {"batches": flag_batches(lengths, prefix or [])} if lengths else {}
    fields |= {name: value for name, value in (("chunk", chunk), ("model", model), ("dtype", dtype), ("seed", seed)) if value is not None}
    return _verify(fields, setting or [], deep, as_json, quiet)


@app.command()
def show(file: options.FILE, as_json: options.JSON = False) -> int:
    """Show a result as a table."""
    from cpbench.results import read

    _print_result(read(file), as_json)
    return 0


@app.command("list")
def list_(what: options.LIST = None) -> int:
    """List what there is, and why something cannot be used here."""
    from cpbench.environment import detect_machine
    from cpbench.report import console
    from cpbench.report.listing import LISTS

    if what is not None and what not in LISTS:
        raise unknown("list", what, LISTS)
    machine = detect_machine()
    out = console.output()
    for number, name in enumerate([what] if what else LISTS):
        console.show(out, [*([""] if number else []), LISTS[name](machine)])
    return 0


@app.command("layout")
def layout_(names: options.NAMES, as_json: options.JSON = False) -> int:
    """Show parallel layouts: which rank sits where, and which ranks talk on which axis."""
    import json

    from cpbench.layout import Layout
    from cpbench.report import console
    from cpbench.report.layout_view import layout_json, layout_view

    layouts = [Layout.parse(name) for name in names]
    if as_json:
        console.show_json(json.dumps([layout_json(layout) for layout in layouts], indent=1))
        return 0
    out = console.output()
    for number, layout in enumerate(layouts):
        console.show(out, [*([""] if number else []), *layout_view(layout, out.width)])
    return 0


@app.command()
def explain(
    layout: options.EXPLAIN_LAYOUT,
    layer: options.EXPLAIN_LAYER = None,
    rank: options.EXPLAIN_RANK = 0,
    model: options.EXPLAIN_MODEL = None,
    seq: options.EXPLAIN_SEQ = None,
    strategy: options.EXPLAIN_STRATEGY = None,
    setting: options.EXPLAIN_SET = None,
    as_json: options.JSON = False,
) -> int:
    """Explain a layout: every collective of a rank between and inside blocks, with axis, shape and bytes. Runs nothing."""
    import json

    from cpbench.plan import only_cell
    from cpbench.report import console
    from cpbench.report.explanation import chosen, explanation, explanation_json

    given = {"layouts": layout, "strategies": strategy or "allgather", "baseline": False} | {
        name: value for name, value in (("model", model), ("seq", seq)) if value is not None
    }
    cell = only_cell(_fresh(None, given, {}, setting or [], None).scenario)
    layers = chosen(cell, rank, layer)
    if as_json:
        console.show_json(json.dumps(explanation_json(cell, rank, layers), indent=1))
    else:
        console.show(console.output(), explanation(cell, rank, layers))
    return 0


@app.command()
def doctor() -> int:
    """Check this machine: can it run a sweep, and on what? Exit code 1 if it cannot."""
    from cpbench.doctor import findings
    from cpbench.environment import detect_machine
    from cpbench.report import console
    from cpbench.report.listing import doctor_view

    found = findings(detect_machine())
    console.show(console.output(), doctor_view(found))
    return 0 if all(finding.ok for finding in found) else 1


@dataclass(frozen=True)
class _Job:
    """A sweep that is ready to start."""

    scenario: Scenario
    machine: Machine
    output: Path
    notes: list[str]
    resume: ResultFile | None = None
    retry: tuple[str, ...] = ("interrupted",)


def _fresh(file: Path | None, fields: dict[str, Any], limits: dict[str, str], settings: list[str], output: Path | None) -> _Job:
    """What the flags say over what the file says over what the machine suggests."""
    from datetime import UTC, datetime

    from cpbench.environment import detect_machine
    from cpbench.resume import RESULTS
    from cpbench.scenario import override, parse_scenario, read_yaml, resolve, without_replaced

    data: dict[str, Any] = {**without_replaced(read_yaml(file) if file else {}, fields), **fields}
    for setting in [*(f"limits.{name}={value}" for name, value in limits.items()), *settings]:
        data = override(data, setting)
    machine = detect_machine()
    scenario, notes = resolve(parse_scenario(data), machine)
    name = f"{scenario.name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    return _Job(scenario, machine, output or RESULTS / name, notes)


def _resumed(output: Path | None, limits: dict[str, str], retry: str | None, force: bool) -> _Job:
    from cpbench import resume
    from cpbench.environment import detect_machine

    statuses = resume.retried("interrupted" if retry is None else retry)
    file, result = resume.find(output)
    scenario, machine = resume.scenario_of(result, file, limits), detect_machine()
    if not force:
        resume.require_same_machine(result, machine)
    return _Job(scenario, machine, file, result.run.defaults, result, statuses)


def _refuse_with_resume(given: list[str]) -> None:
    flags = {"strategies": "strategy", "batches": "lengths"}
    if given:
        flag = f"--{flags.get(given[0], given[0])}"
        raise CpbenchError(f"--resume reads what to measure from the file and cannot be combined with {flag}.", f"Leave {flag} out, or start a new sweep.")


def _run_job(job: _Job, as_json: bool, quiet: bool) -> int:
    """Run, print, and say how it went."""
    from cpbench import resume
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
        resume=job.resume,
        retry=job.retry,
    )
    _print_result(result, as_json)
    console.show(messages if as_json else console.output(), [] if as_json and quiet else closing_lines(result, job.output))
    return exit_code(result)


def _dry_run(job: _Job, as_json: bool) -> int:
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


def _verify(fields: dict[str, Any], settings: list[str], deep: bool, as_json: bool, quiet: bool) -> int:
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


def _print_result(result: ResultFile, as_json: bool) -> None:
    from cpbench.report import console
    from cpbench.report.table import result_view

    if as_json:
        console.show_json(result.model_dump_json(by_alias=True, indent=1))
        return
    out = console.output()
    console.show(out, result_view(result, out))
