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
    deterministic: options.DETERMINISTIC = False,
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
    fields |= {"weights": weights, "prompt": prompt, "threads": threads, "rounds": rounds}
    fields |= {"pair": pair or None, "deterministic": deterministic or None}
    fields |= {"batches": flag_batches(lengths, prefix or [])} if lengths else {}
    limits = {name: value for name, value in (("budget", budget), ("cell_timeout", cell_timeout)) if value is not None}
    given = {name: ",".join(values) for name, values in axes.items() if values} | {name: value for name, value in fields.items() if value is not None}
    if resume:
        commands.refuse_with_resume([*given, *(["scenario"] if scenario else []), *(["set"] if setting else []), *(["dry-run"] if dry_run else [])])
        return commands.run_job(commands.resumed(output, limits, retry, force), as_json, quiet)
    for name in (["--retry"] if retry is not None else []) + (["--force"] if force else []):
        raise CpbenchError(f"{name} is for sweeps that are continued.", "Add --resume, or leave it out.")
    job = commands.fresh(scenario, given, limits, setting or [], output)
    return commands.show_plan(job, as_json) if dry_run else commands.run_job(job, as_json, quiet)


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
def show(file: options.FILE, as_json: options.JSON = False) -> int:
    """Show a result as a table."""
    from cpbench.results import read

    commands.print_result(read(file), as_json)
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
