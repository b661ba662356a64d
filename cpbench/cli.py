"""The command line: parse, call, print, exit code. What is measured, decided and printed is in other modules.

Nothing heavy is imported at the top, so that `cpbench --help` answers at once. Commands return their exit code. A CpbenchError becomes
two lines on stderr; so does a flag that does not parse. A bug keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

from cpbench import __version__, commands, options
from cpbench.errors import INTERRUPTED, CpbenchError, unknown
from cpbench.flags import fields_of, limits_of, with_flags_of

BROKEN_PIPE = 141  # 128 + SIGPIPE, as a shell reports it

app = typer.Typer(
    name="cpbench",
    help="Benchmark context parallelism of LLM decoder layers. Lengths are binary: 36k = 36,864 tokens.",
    add_completion=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def main() -> None:
    """The entry point. Ends the process with the exit code."""
    try:
        sys.exit(_here_or_inside(sys.argv[1:]))
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(BROKEN_PIPE)


def _here_or_inside(arguments: list[str]) -> int:
    """One command in this process, or by the processes of a launch that this one is inside of."""
    from cpbench.cluster.place import place_of

    try:
        place = place_of(os.environ)
        if place is None:
            return run(arguments)
        from cpbench.cluster.session import take_part

        return take_part(place, lambda: run(arguments))
    except CpbenchError as error:
        return _complain(error)
    except KeyboardInterrupt:
        return INTERRUPTED


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
    deterministic: options.DETERMINISTIC = False,
    seed: options.SEED = None,
    threads: options.THREADS = None,
    setting: options.SET = None,
    ab: options.AB = None,
    rounds: options.ROUNDS = None,
    budget: options.BUDGET = None,
    cell_timeout: options.CELL_TIMEOUT = None,
    memory_limit: options.MEMORY_LIMIT = None,
    resume: options.RESUME = False,
    retry: options.RETRY = None,
    force: options.FORCE = False,
    output: options.OUTPUT = None,
    dry_run: options.DRY_RUN = False,
    as_json: options.JSON = False,
    quiet: options.QUIET = False,
) -> int:
    """Measure layouts: time to first token and peak memory of every combination of lengths, degrees and strategies."""
    given, limits = fields_of(locals()), limits_of(locals())
    if resume:
        commands.refuse_with_resume([*given, *(["scenario"] if scenario else []), *(["set"] if setting else []), *(["dry-run"] if dry_run else [])])
        return commands.run_job(commands.resumed(output, limits, retry, force), as_json, quiet)
    for name in (["--retry"] if retry is not None else []) + (["--force"] if force else []):
        raise CpbenchError(f"{name} is for sweeps that are continued.", "Add --resume, or leave it out.")
    job = commands.fresh(scenario, given, limits, setting or [], output)
    return commands.show_plan(job, as_json) if dry_run else commands.run_job(job, as_json, quiet)


@app.command(epilog=options.MORE_OF_ONE)
@with_flags_of(sweep, leave_out=options.SWEEP_ONLY)
def profile(nsys: options.NSYS = False, **flags: Any) -> int:
    """Profile one layout: where the time of a pass goes, by phase and rank, and traces to look at. Same flags as sweep, one cell."""
    given = fields_of(flags) | {"baseline": False, "rounds": 1} | ({} if flags["scenario"] else {"name": "profile"})
    job = commands.fresh(flags["scenario"], given, limits_of(flags), flags["setting"] or [], flags["output"])
    return commands.profile(job, nsys, flags["as_json"], flags["quiet"])


@app.command(epilog=options.MORE_OF_ONE)
@with_flags_of(sweep, leave_out=options.PROJECT_ONLY)
def project(
    file: options.PROJECT_FILE = None,
    hardware: options.HARDWARE = None,
    nodes: options.NODES = None,
    gpus_per_node: options.PER_NODE = None,
    link: options.LINK = None,
    compute: options.COMPUTE = None,
    top: options.TOP = None,
    explained: options.EXPLAIN_PROJECTION = False,
    **flags: Any,
) -> int:
    """Project layouts to devices that are not here: time, exposed communication and peak memory."""
    from cpbench.projecting_command import Asked, Devices, Shown, run

    given = fields_of(flags) | ({} if flags["scenario"] else {"name": "project"})
    devices = Devices(hardware, nodes, gpus_per_node, link, compute)
    asked = Asked(file, flags["scenario"], given, flags["setting"] or [], flags["output"], devices)
    return run(asked, Shown(top, explained, flags["dry_run"], flags["as_json"], flags["quiet"]))


@app.command()
def verify(
    file: options.VERIFY_FILE = None,
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
    deterministic: options.VERIFY_DETERMINISTIC = False,
    setting: options.VERIFY_SET = None,
    deep: options.DEEP = False,
    against: options.AGAINST = None,
    trace: options.TRACE = False,
    temperature: options.TEMPERATURE = None,
    rounding: options.ROUNDING = None,
    output: options.VERIFY_OUTPUT = None,
    as_json: options.JSON = False,
    quiet: options.QUIET = False,
) -> int:
    """Verify strategies, partitions and layouts against one device in fp64, or one layout against another. Exit code 1 if one is wrong."""
    from cpbench.batch import flag_batches

    if prefix and not lengths:
        raise CpbenchError("--prefix describes the batch of --lengths, which is missing.", "Add --lengths, for example --lengths 101,67,130.")
    axes = {"cp": cp, "tp": tp, "layouts": layouts, "strategies": strategy}
    fields: dict[str, Any] = {name: ",".join(values) for name, values in axes.items() if values}
    fields |= {"batches": flag_batches(lengths, prefix or [])} if lengths else {}
    fields |= {name: value for name, value in (("chunk", chunk), ("model", model), ("dtype", dtype), ("seed", seed)) if value is not None}
    fields |= {"deterministic": True} if deterministic else {}
    asked = commands.LogProbFlags(file, against, output, trace, temperature, rounding)
    if asked.given:
        return commands.verify_log_probs(asked, fields, setting or [], deep, as_json, quiet)
    return commands.verify(fields, setting or [], deep, as_json, quiet)


@app.command()
def maxseq(
    layouts: options.MAXSEQ_LAYOUTS = None,
    strategy: options.MAXSEQ_STRATEGY = None,
    model: options.MAXSEQ_MODEL = None,
    layers: options.MAXSEQ_LAYERS = None,
    memory_limit: options.MAXSEQ_MEMORY = None,
    seq: options.MAXSEQ_SEQ = None,
    precision: options.MAXSEQ_PRECISION = None,
    setting: options.MAXSEQ_SET = None,
    output: options.MAXSEQ_OUTPUT = None,
    as_json: options.JSON = False,
    quiet: options.QUIET = False,
) -> int:
    """Find the longest sequence that fits on each layout, by running it, and what stands in the way of a longer one."""
    fields: dict[str, Any] = {name: ",".join(values) for name, values in (("layouts", layouts), ("strategies", strategy)) if values}
    fields |= {name: value for name, value in (("model", model), ("layers", layers)) if value is not None}
    limits = {} if memory_limit is None else {"memory": memory_limit}
    return commands.maxseq(commands.maxseq_job(fields | {"seq": seq or "4k"}, limits, setting or [], output), precision, as_json, quiet)


@app.command()
def calibrate(
    output: options.CALIBRATE_OUTPUT = None,
    device: options.CALIBRATE_DEVICE = None,
    max_ranks: options.CALIBRATE_RANKS = None,
    quick: options.QUICK = False,
    quiet: options.QUIET = False,
) -> int:
    """Measure what this machine's compute and links cost, and write a device profile for projections. About a minute."""
    from cpbench.projection.calibrating import run as calibrate_machine

    return calibrate_machine(output, device, max_ranks, quick, quiet)


@app.command()
def launch(
    system: options.LAUNCH_SYSTEM,
    command: options.LAUNCH_COMMAND = None,
    nodes: options.LAUNCH_NODES = 2,
    gpus_per_node: options.LAUNCH_GPUS = 8,
    ranks_per_node: options.LAUNCH_RANKS = None,
    name: options.LAUNCH_NAME = "cpbench",
    image: options.LAUNCH_IMAGE = None,
    partition: options.LAUNCH_PARTITION = None,
    account: options.LAUNCH_ACCOUNT = None,
    time: options.LAUNCH_TIME = None,
    kind: options.LAUNCH_KIND = "trainjob",
    namespace: options.LAUNCH_NAMESPACE = None,
    claim: options.LAUNCH_CLAIM = None,
) -> int:
    """Print what starts a command on several nodes: an sbatch script, or a manifest for Kubernetes. Submits nothing."""
    from cpbench.cluster.manifest import Asked, text_of
    from cpbench.report import console

    asked = Asked(nodes, gpus_per_node, ranks_per_node, partition, account, time, image, kind, namespace, claim, name)
    console.show_json(text_of(system, asked, command or []))
    return 0


@app.command()
def show(
    files: options.FILES,
    where: options.WHERE = None,
    form: options.FORMAT = None,
    output: options.SHOW_OUTPUT = None,
    as_json: options.JSON = False,
) -> int:
    """Show results as tables, or export them: CSV and Parquet have one row per cell and metric."""
    from cpbench.show import run as show_files

    show_files(files, where, form, as_json, output)
    return 0


@app.command()
def report(files: options.REPORT_FILES, output: options.REPORT_OUTPUT = None, force: options.REPORT_FORCE = False) -> int:
    """Make one self-contained page of a result, or of an old and a new one: summary, figures, all cells, what changed."""
    from cpbench.publish import publish
    from cpbench.report import console
    from cpbench.units import format_bytes

    page, size, comparison = publish(files, output, force=force)
    console.show(console.output(), [f"Report: {page} ({format_bytes(size)})"])
    if comparison:
        comparison.require_comparable()
    return 0


@app.command()
def upgrade(files: options.UPGRADE_FILES) -> int:
    """Rewrite results of older versions of the schema as the newest. They can be read without it."""
    from cpbench.report import console
    from cpbench.upgrade import upgrade_file

    for file in files:
        console.show(console.output(), [upgrade_file(file)])
    return 0


@app.command()
def plot(
    files: options.PLOT_FILES,
    figure: options.PLOT_FIGURE = None,
    x: options.PLOT_X = None,
    y: options.PLOT_Y = None,
    by: options.PLOT_BY = None,
    facet: options.PLOT_FACET = None,
    where: options.PLOT_WHERE = None,
    formats: options.PLOT_FORMAT = None,
    output: options.PLOT_OUTPUT = None,
    quiet: options.QUIET = False,
) -> int:
    """Plot results: time, throughput, memory, efficiency, where the time goes, which layouts are worth it, and what changed."""
    from cpbench.plot.files import Asked, run

    return run(files, Asked(figure, x, y, by, facet, where), formats, output, quiet)


@app.command()
def compare(
    files: options.COMPARE_FILES,
    metric: options.COMPARE_METRIC = None,
    by: options.COMPARE_BY = None,
    noise: options.COMPARE_NOISE = None,
    strict: options.COMPARE_STRICT = False,
    across: options.COMPARE_ACROSS = None,
    fail_on: options.FAIL_ON = None,
    form: options.COMPARE_FORMAT = None,
    everything: options.ALL = False,
) -> int:
    """Compare results: same, faster, slower or unsure, with evidence. Exit code 1 on what --fail-on names, 3 if nothing is comparable."""
    from cpbench.comparing import Question, compare_files

    return compare_files(files, Question(metric, by, noise, strict, across), fail_on, form or "text", everything)


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
    cell = only_cell(commands.fresh(None, given, {}, setting or [], None).scenario)
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
