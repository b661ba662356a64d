"""Tables that are not results: the cells of a plan, what `list` knows, and what `doctor` found. Data comes in, tables go out."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

from rich import box
from rich.console import ConsoleRenderable
from rich.table import Table

from cpbench.axes import LeftOut
from cpbench.batch import Batch
from cpbench.cell import Cell
from cpbench.doctor import Finding
from cpbench.environment import Machine, describe
from cpbench.formulas import weights_bytes
from cpbench.kernels import KERNELS, load_kernel
from cpbench.layout import Layout
from cpbench.models.config import ModelConfig
from cpbench.models.presets import PRESETS
from cpbench.needs import Needs, needs
from cpbench.partition import PARTITIONS
from cpbench.plan import Plan, PlannedCell
from cpbench.report.console import plain
from cpbench.report.table import CP_OFF, rough_seconds
from cpbench.scenario import DEVICE_DEFAULTS, Scenario
from cpbench.scenario_files import library
from cpbench.strategies import STRATEGIES
from cpbench.units import format_bytes, format_count

Justify = Literal["left", "right"]
TOKENS: tuple[str, Justify] = ("tokens\n/rank", "right")
MEMORY: tuple[str, Justify] = ("est. mem\n/rank", "right")
SCENARIOS = "Scenarios: cpbench sweep --scenario NAME, or cpbench project where it does not run here"


def plan_echo(scenario: Scenario, plan: Plan, notes: Sequence[str], machine: Machine) -> list[str]:
    """What is about to be measured, what the defaults chose, and how long it will take."""
    sizes = ", ".join(map(str, plan.world_sizes)) or "none"
    total = _cells(len(plan.cells))
    cells = f"{len(plan.runnable)} of {total}" if len(plan.runnable) < len(plan.cells) else total
    rounds = f" x {plan.rounds} rounds" if plan.rounds > 1 else ""
    memory = max((planned.live_bytes for planned in plan.runnable), default=0)
    return [
        f"{scenario.target} of {scenario.model} on {scenario.device}: {describe(machine)}",
        *(f"  {note}" for note in notes),
        *(f"  {line}" for line in _left_out(plan)),
        *([_pairs(plan)] if plan.pairs else []),
        *(f"  in {_cells(count)} {reason}" for reason, count in Counter(p.cell.cp_off for p in plan.runnable if p.cell.cp_off).items()),
        *(f"  in {_cells(count)} {axes} {'crosses' if ',' not in axes else 'cross'} nodes" for axes, count in _between_nodes(plan).items()),
        f"{cells}{rounds}, world sizes {sizes}: about {rough_seconds(plan.seconds)}, up to {format_bytes(memory)} per rank",
    ]


def _between_nodes(plan: Plan) -> Counter[str]:
    """The axes that go from node to node, of how many cells."""
    size = plan.ranks_per_node
    crossing = [", ".join(planned.cell.layout.axes_between(size)) for planned in plan.runnable] if size else []
    return Counter(axes for axes in crossing if axes)


def _pairs(plan: Plan) -> str:
    a, b = plan.pairs[0].settings
    return f"  {'1 pair' if len(plan.pairs) == 1 else f'{len(plan.pairs)} pairs'} of variants, whose passes alternate A B B A: A {a}, B {b}"


def plan_view(plan: Plan, machine: Machine, *, timed: bool = True) -> list[ConsoleRenderable | str]:
    """Every cell with estimates of its time, if it is `timed`, and memory, and below why some will not run or may fail. What all share is in the echo."""
    batches = {Batch(planned.cell.lengths, planned.cell.prefixes) for planned in plan.cells}
    varying: list[tuple[str, Justify]] = [("seq", "right")] if len({batch.exact for batch in batches}) > 1 else []
    varying += [("batch", "right")] if len({len(batch.lengths) for batch in batches}) > 1 else []
    seconds: list[tuple[str, Justify]] = [("est. time", "right")] if timed else []
    table = _table(("#", "right"), "layout", "strategy", "partition", *varying, TOKENS, *seconds, MEMORY, "note")
    reasons: dict[str, list[str]] = {}
    for number, planned in enumerate(plan.cells, 1):
        cell, runs = planned.cell, planned.status is None
        notes = _notes(planned, plan, machine)
        for note, reason in notes:
            reasons.setdefault(f"{note}: {reason}", []).append(str(number))
        table.add_row(
            str(number),
            str(cell.layout),
            cell.algorithm,
            cell.partition,
            *({"seq": Batch(cell.lengths, cell.prefixes).label, "batch": str(len(cell.lengths))}[column[0]] for column in varying),
            f"{cell.max_rows:,}" if runs else "-",
            *([rough_seconds(planned.seconds) if runs else "-"] if timed else []),
            format_bytes(planned.live_bytes) if runs else "-",
            ", ".join(note for note, _ in notes),
            style="" if runs else "dim",
        )
    return [table, *(f"{', '.join(numbers)}: {reason}" for reason, numbers in reasons.items())]


def plan_json(scenario: Scenario, plan: Plan, notes: Sequence[str]) -> dict[str, Any]:
    """The same as data: seconds per round, bytes on the rank that needs most."""
    cells = [
        {"id": p.cell.id, "key": p.cell.key, "status": p.status or "runs", "reason": p.reason, "estimated_s": p.seconds, "estimated_live_bytes": p.live_bytes}
        for p in plan.cells
    ]
    left = [{"layout": entry.name, "reason": entry.reason, "nearest": str(entry.nearest)} for entry in plan.left_out]
    return {
        "scenario": scenario.model_dump(mode="json"),
        "defaults": list(notes),
        "estimated_s": plan.seconds,
        "rounds": plan.rounds,
        "cells": cells,
        "left_out": left,
    }


def strategies(machine: Machine) -> Table:
    table = _table("strategy", "partitions", "what it does", "here", title="Strategies: attention across context-parallel ranks")
    single_gpu = machine.device == "cuda" and machine.devices < 2
    for strategy in STRATEGIES.values():
        reason = strategy.available(machine.device, str(DEVICE_DEFAULTS[machine.device]["dtype"]))
        if single_gpu and strategy.name != "none":
            reason = "needs 2 GPUs, this machine has 1"
        here = f"no: {reason}" if reason else "yes"
        table.add_row(strategy.name, _default_first(strategy.partitions), strategy.summary, here)
    return table


def kernels(machine: Machine) -> Table:
    """Asks every kernel about the machine's default dtype, which imports torch."""
    dtype = str(DEVICE_DEFAULTS[machine.device]["dtype"])
    config = PRESETS[str(DEVICE_DEFAULTS[machine.device]["model"])]
    table = _table("kernel", "what it is", "here", title=f"Kernels: attention on one device ({machine.device}, {dtype}); auto takes the first that can run")
    for name in KERNELS:
        kernel = load_kernel(name)
        reason = kernel.available(machine.device, dtype, config.head_dim, config.head_dim)
        table.add_row(name, kernel.summary, f"no: {reason}" if reason else "yes")
    return table


def models(machine: Machine) -> Table:
    columns = ["hidden", "layers", "heads", "kv heads", "head dim", "FFN", "experts", "vocabulary"]
    table = _table(
        "model", *((column, "right") for column in columns), "layers that fit here", title="Models: presets; --model also takes a Hugging Face config.json"
    )
    for config in PRESETS.values():
        kv_heads = (
            f"{config.kv_heads:,}" if config.latent is None else f"latent {config.latent.row_values}" + (f"+{config.indexer.dim}" if config.indexer else "")
        )
        sizes = (f"{number:,}" for number in (config.hidden, config.layers, config.heads))
        numbers = (*sizes, kv_heads, f"{config.head_dim:,}", f"{config.intermediate:,}", _experts(config), f"{config.vocab:,}")
        table.add_row(config.name, *numbers, _fitting_layers(config, machine))
    return table


def partitions(machine: Machine) -> Table:
    table = _table("partition", "what a rank holds", "default of", title="Partitions: which tokens each context-parallel rank holds")
    for name, function in PARTITIONS.items():
        summary = re.sub(r" \([^()]*\)\.$", ".", (inspect.getdoc(function) or "").partition("\n")[0])  # without the source
        table.add_row(name, plain(summary), ", ".join(strategy.name for strategy in STRATEGIES.values() if strategy.partitions[0] == name))
    return table


def scenarios(machine: Machine) -> Table:
    """Plans every scenario that comes with cpbench."""
    table = _table("scenario", ("ranks", "right"), "model", ("longest\nprompt", "right"), ("about", "right"), "here", title=SCENARIOS)
    for name, file in library().items():
        need = needs(name, file, machine)
        model = f"{need.model}, {need.layers} {'layer' if need.layers == 1 else 'layers'}"
        about, longest = "-" if need.seconds is None else rough_seconds(need.seconds), format_count(need.tokens) if need.tokens else "-"
        table.add_row(f"{name}: {need.question}", str(need.ranks or "-"), model, longest, about, _here(need), end_section=True)
    return table


LISTS: dict[str, Callable[[Machine], Table]] = {
    "strategies": strategies,
    "kernels": kernels,
    "models": models,
    "partitions": partitions,
    "scenarios": scenarios,
}


def doctor_view(found: Sequence[Finding]) -> list[ConsoleRenderable | str]:
    """One row per check, and the verdict."""
    table = _table("check", "", "found", "what to do")
    for finding in found:
        table.add_row(finding.name, "ok" if finding.ok else "NO", plain(finding.detail), plain(finding.hint), style="" if finding.ok else "red")
    bad = [finding.name for finding in found if not finding.ok]
    return [table, f"Sweeps cannot run here: {', '.join(bad)}." if bad else "Sweeps can run here."]


def _table(*columns: str | tuple[str, Justify], title: str | None = None) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False, show_edge=False, header_style="bold", title=title, title_justify="left", title_style="bold"
    )
    for column in columns:
        header, justify = (column, "left") if isinstance(column, str) else column
        table.add_column(header, justify="right" if justify == "right" else "left", vertical="top", overflow="fold")
    return table


def _notes(planned: PlannedCell, plan: Plan, machine: Machine) -> list[tuple[str, str]]:
    """What is special about a cell: words for its row, and the reason of each for below the table."""
    if planned.status:
        return [(planned.status, planned.reason or "")]
    notes = [(CP_OFF, planned.cell.cp_off.removeprefix("context parallelism is off: "))] if planned.cell.cp_off else []
    size = planned.cell.world_size
    groups, sequences = planned.cell.layout.dp, len(planned.cell.lengths)
    if groups > sequences:
        notes.append(("idle", f"{groups - sequences} of {groups} attention-DP groups {'has' if groups - sequences == 1 else 'have'} no sequence"))
    needed, there = planned.live_bytes * plan.on_a_node(size), machine.memory_bytes
    if plan.device == "cuda":
        needed, there = planned.live_bytes, machine.gpu_memory_bytes
    if needed > there:
        notes.append(("may not fit", f"{format_bytes(needed)} of live tensors in {format_bytes(there)} of memory"))
    threads = plan.on_a_node(size) * plan.threads_per_rank(size)
    return [*notes, ("oversubscribed", f"{threads} threads on {plan.cores} cores")] if plan.oversubscribed(size) else notes


def _here(need: Needs) -> str:
    """Whether a scenario runs on this machine, and what of it does not."""
    if need.seconds is None:
        return f"no: {need.missing}"
    crowded = f", {need.threads_per_core:g} threads per core" if need.threads_per_core > 1 else ""
    return f"yes{crowded}" + (f", but for {need.missing}" if need.missing else "")


def _left_out(plan: Plan) -> list[str]:
    """What was asked for and is no layout of the model, by reason."""
    by_reason: dict[str, list[LeftOut]] = {}
    for entry in plan.left_out:
        by_reason.setdefault(entry.reason, []).append(entry)
    lines = []
    for reason, entries in by_reason.items():
        nearest = list(dict.fromkeys(str(entry.nearest) for entry in entries))
        near = f"the nearest valid layout{'s are' if len(nearest) > 1 else ' is'} {', '.join(nearest)}"
        lines.append(f"left out: {', '.join(entry.name for entry in entries)}: {reason}; {near}")
    return lines


def _cells(count: int) -> str:
    return "1 cell" if count == 1 else f"{count} cells"


def _default_first(names: Sequence[str]) -> str:
    return ", ".join([f"{names[0]} (default)", *names[1:]]) if len(names) > 1 else names[0]


def _experts(config: ModelConfig) -> str:
    """`8 of 256 + 1`: chosen ones, and one that is shared."""
    experts = config.experts
    return "-" if experts is None else f"{experts.top_k} of {experts.count}" + (f" + {experts.shared}" if experts.shared else "")


def _fitting_layers(config: ModelConfig, machine: Machine) -> str:
    """How many layers' weights one device holds beside embedding and head, in the machine's default dtype."""
    dtype = str(DEVICE_DEFAULTS[machine.device]["dtype"])
    memory = machine.gpu_memory_bytes if machine.device == "cuda" else machine.memory_bytes

    def needed(layers: int) -> int:
        return weights_bytes(Cell("prefill", config, layers, Layout(), "none", "contiguous", "auto", dtype, machine.device, (1,)))

    fitting = next((layers for layers in range(config.layers, 0, -1) if needed(layers) <= memory), 0)
    return f"{fitting} of {config.layers}" if fitting >= 1 else f"none: one needs {format_bytes(needed(1))} for weights"
