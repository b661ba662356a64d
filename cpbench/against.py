"""What `cpbench verify --against` runs: two layouts on one prompt with the same weights, their log-probabilities, and where they part.

Ranks are threads of this process, as in verify.py. Either side may be a file instead. The model is reduced in width unless it is a checkpoint,
because what layouts do differently does not hang on it. What is compared, and in which numbers, is decided in logprob_record.py and agreement.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from cpbench.agreement import Agreement, agreement
from cpbench.axes import cells_of
from cpbench.cell import Cell
from cpbench.defaults import model_of
from cpbench.deterministic import reduced
from cpbench.distributed.local import LocalWorld, one_thread_each
from cpbench.distributed.mesh import local_groups
from cpbench.divergence import Divergence, Trace, first_difference, measured
from cpbench.environment import Machine
from cpbench.errors import CpbenchError, unknown
from cpbench.kernels import kernel_of
from cpbench.logprob_record import LogProbs, read_log_probs
from cpbench.logprobs import Rule, rank_log_probs
from cpbench.measure.device import open_device
from cpbench.models.held import Models
from cpbench.plan import checkpoint_name, impossible, only_cell, text_name
from cpbench.program import Program
from cpbench.prompt import read_prompt
from cpbench.scenario import Scenario, override, parse_scenario, resolve
from cpbench.verify import COLLECTIVE_TIMEOUT, NEEDS_PROCESSES, UNEVEN, Fields, cannot_run
from cpbench.verify import FIELDS as GRID_FIELDS

LAYOUT_FIELDS = ("pp", "dp", "cp", "tp", "layouts")
MORE_FIELDS = ("layers", "mla", "router", "dispatch", "sp_chunks", "sp_gather", "weights", "prompt")
FIELDS = (*(name for name in GRID_FIELDS if name != "target"), *MORE_FIELDS)
STRATEGY = "allgather"  # across context-parallel ranks, where none is named
LAYERS = 2  # at least, where the model has them: what a layer gets from another one counts
WRONG = 1  # the exit code of an answer that is wrong


@dataclass(frozen=True)
class Job:
    """One layout to run on a prompt."""

    cell: Cell
    folder: str | None = None  # of the checkpoint that the cell names
    prompt: tuple[int, ...] | None = None  # the tokens of the text that the cell names

    def with_layers(self, layers: int) -> Job:
        """The same with more layers; those of a model that is reduced."""
        config = replace(self.cell.config, layers=max(layers, self.cell.config.layers))
        return replace(self, cell=replace(self.cell, layers=layers, config=config))


@dataclass(frozen=True)
class Comparison:
    """`other` held against `one`. `divergence`: the first module that differs, where that was asked for and there is one."""

    one: LogProbs
    other: LogProbs
    agreement: Agreement
    divergence: Divergence | None = None


def job_of(fields: Fields, settings: Sequence[str], layout: str | None, machine: Machine) -> Job:
    """What flags describe, with another layout than theirs if one is given. Raises CpbenchError with the nearest valid value."""
    data: Fields = dict(fields)
    for setting in settings:
        data = override(data, setting)
    for name in data:
        if name not in FIELDS:
            raise unknown("field of log-probabilities", name, FIELDS)
    data = {"strategies": STRATEGY, "baseline": False} | ({} if data.get("prompt") else UNEVEN) | data
    if layout is not None:
        data = {name: value for name, value in data.items() if name not in LAYOUT_FIELDS} | {"layouts": layout}
    scenario, _ = resolve(parse_scenario(data), machine)
    config = model_of(scenario)
    if "layers" not in data and not scenario.weights:
        scenario = scenario.model_copy(update={"layers": max(scenario.layers or 1, min(LAYERS, config.layers))})
    return _only_job(scenario)


def _only_job(scenario: Scenario) -> Job:
    config = model_of(scenario)
    weights, prompt = checkpoint_name(scenario, config), text_name(scenario, config)
    if weights is None:
        config = replace(reduced(config, scenario.deterministic), layers=scenario.layers or 1)
    cells = list(dict.fromkeys(cells_of(scenario, config, weights, prompt)))
    if len(cells) > 1:
        names = ", ".join(dict.fromkeys(cell.label for cell in cells))
        raise CpbenchError(f"Log-probabilities are of one layout, strategy and batch, not of {len(cells)}: {names}.", f"Ask for one: {cells[0].label}.")
    cell = cells[0] if cells else only_cell(scenario)
    reason = cannot_run(cell)
    if reason == NEEDS_PROCESSES:
        raise CpbenchError(f"{cell.strategy} needs processes, and ranks are threads here.", "Use cpbench sweep, which checks every cell.")
    if reason:
        raise impossible(f"{cell.layout}{'' if cell.strategy == 'none' else f' {cell.strategy}'}", reason)
    tokens = tuple(read_prompt(scenario.weights, scenario.prompt)) if scenario.weights and scenario.prompt else None
    return Job(cell, scenario.weights, tokens)


class Runner:
    """Runs one layout, as often as it takes, with the weights that its ranks keep."""

    def __init__(self, job: Job, rule: Rule) -> None:
        self.cell, self._rule = job.cell, rule
        self._device = open_device(job.cell.device, 0).torch_device
        self._models = [Models(job.folder, job.prompt) for _ in range(job.cell.world_size)]

    def record(self) -> LogProbs:
        """The log-probabilities of the prompt."""
        return self._record(self._run([]))

    def traced(self, module: str | None = None) -> tuple[LogProbs, list[Trace]]:
        """The same, and what every rank saw: hashes of all outputs, or the rows of one."""
        traces = [Trace(module) for _ in range(self.cell.world_size)]
        return self._record(self._run(traces)), traces

    def _record(self, samples: list[Tensor]) -> LogProbs:
        return LogProbs.of(self.cell, self._models[0].token_ids(self.cell), self._rule, samples)

    def _run(self, traces: Sequence[Trace]) -> list[Tensor]:
        cell, kernel, world = self.cell, kernel_of(self.cell), LocalWorld(self.cell.world_size, COLLECTIVE_TIMEOUT)

        def rank_program(rank: int) -> tuple[Tensor, Tensor]:
            program = Program(cell, local_groups(cell.layout, world, rank), kernel, self._device, self._models[rank])
            program.keeps_rows = True
            program.watch = traces[rank].watch if traces else None
            program.prepare()
            return rank_log_probs(program, program.run().rows, self._rule)

        with one_thread_each():
            return collected(cell, world.run(rank_program))


def collected(cell: Cell, found: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The log-probabilities of each sequence, on the CPU, from the (tokens, values) of every rank: of its tokens but the last.

    Raises CpbenchError (exit code 1) where ranks that have a token both do not agree in every bit.
    """
    values_N, held_N = torch.full((cell.tokens,), float("nan")), torch.full((cell.tokens,), -1)
    for rank, (tokens_n, mine_n) in enumerate((tokens.cpu(), values.cpu()) for tokens, values in found):
        first_n = held_N[tokens_n]
        clash_n = (first_n >= 0) & ~torch.isclose(values_N[tokens_n], mine_n, rtol=0, atol=0, equal_nan=True)
        if clash_n.any():
            token, first = int(tokens_n[clash_n][0]), int(first_n[clash_n][0])
            message = f"Ranks {first} and {rank} of {cell.layout} do not have the same log-probability behind token {token}."
            raise CpbenchError(message, f"cpbench verify --layouts {cell.layout} holds every copy against one device.", WRONG)
        values_N[tokens_n] = torch.where(first_n >= 0, values_N[tokens_n], mine_n)
        held_N[tokens_n] = torch.where(first_n >= 0, first_n, rank)
    return [sample[:-1] for sample in values_N.split(list(cell.lengths))]


Side = LogProbs | Runner  # what a file holds, or what is to run


def sides(file: Path | None, reference: str | None, fields: Fields, settings: Sequence[str], rule: Rule, machine: Machine) -> tuple[Side | None, Side]:
    """(what is compared with, what is compared): `reference`, a layout or a file, and the layout of `fields` or a file. Nothing runs yet."""
    jobs = [
        None if reference is None or is_file(reference) else job_of(fields, settings, reference, machine),
        None if file else job_of(fields, settings, None, machine),
    ]
    if jobs != [None, None] and "strategies" in fields and not any(job and job.cell.layout.cp > 1 for job in jobs):
        raise CpbenchError("--strategy is for context-parallel layouts, and none is to run.", "Leave --strategy out, or use --layouts cp2.")
    layers = max((job.cell.layers for job in jobs if job), default=0)  # pipeline stages may have asked for more
    files = Path(reference) if reference is not None else None, file
    one, other = (Runner(job.with_layers(layers), rule) if job else read_log_probs(path) if path else None for job, path in zip(jobs, files, strict=True))
    assert other is not None, "without a file there is a layout"
    return one, other


def is_file(side: str) -> bool:
    """Whether a side is named as a file, not as a layout."""
    return side.endswith(".json") or Path(side).is_file()


def record_of(side: Side) -> LogProbs:
    """The log-probabilities of a side, which is run if it is not stored."""
    return side.record() if isinstance(side, Runner) else side


def compare(one: Side, other: Side, trace: bool = False) -> Comparison:
    """Two sides; with `trace`, of two layouts, also where they part. Raises CpbenchError where they cannot be compared."""
    if trace and isinstance(one, Runner) and isinstance(other, Runner):
        return _traced(one, other)
    return _compared(record_of(one), record_of(other))


def _compared(one: LogProbs, other: LogProbs, divergence: Divergence | None = None) -> Comparison:
    other.require_comparable(one)
    return Comparison(one, other, agreement(one.tensors(), other.tensors()), divergence)


def _traced(one: Runner, other: Runner) -> Comparison:
    """A pass of each that hashes, and where outputs differ another one that fetches those of the first module."""
    (first, hashes), (second, other_hashes) = one.traced(), other.traced()
    found = first_difference(one.cell, hashes, other_hashes)
    if found is None:
        return _compared(first, second)
    module, tokens = found
    (_, rows), (_, other_rows) = one.traced(module), other.traced(module)
    return _compared(first, second, measured(one.cell, module, tokens, rows, other_rows))
