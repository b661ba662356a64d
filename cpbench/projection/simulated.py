"""One rank's program with nobody else there: what it does on a tape, and its peak memory.

The program is the one that is measured (program.py), on the null backend. Of the layers of a kind one runs, or two, and stands for the
others. On tensors without storage (`meta`) nothing is computed either: then a clock that prices advance says what the work takes, and
models and prompts of any size pass in milliseconds. Which ranks are worth a run is decided here, too: those that have equal plans are one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from cpbench.buffers import CATEGORIES
from cpbench.cell import Cell
from cpbench.device_kind import standing_for
from cpbench.distributed.fake import leave
from cpbench.distributed.mesh import null_groups
from cpbench.distributed.traffic import Transfer
from cpbench.kernels.base import Kernel
from cpbench.measure.memory import LiveTensors
from cpbench.models.decoder import Decoder, Slice, parameters_of
from cpbench.models.held import Models
from cpbench.models.invariant import InvariantWeight
from cpbench.models.linear import Weight, hold
from cpbench.models.weights import RandomWeights
from cpbench.program import Program
from cpbench.projection.tape import Script, Tape
from cpbench.quantisation import NONE
from cpbench.strategies import STRATEGIES
from cpbench.tracing.spans import using

META = torch.device("meta")
KEPT = CATEGORIES["cache"]


class Clock(Protocol):
    """Says when a rank is where: `Device` is one, and prices are another."""

    def mark(self) -> Any: ...
    def between(self, first: Any, second: Any) -> float:
        """Seconds, once the pass is over."""


@dataclass(frozen=True)
class EvenChoices:
    """Experts of tokens, as many for each: what routers that know nothing choose on average. Stands where forced choices do (choices.py)."""

    count: int
    top_k: int

    def __getitem__(self, place: tuple[int, Tensor]) -> Tensor:
        """Experts [n, K], ascending, of so many tokens of a layer."""
        rows = torch.arange(len(place[1]))[:, None]
        return ((rows * self.top_k + torch.arange(self.top_k)) % self.count).sort(1).values


@dataclass(frozen=True)
class ShapedWeights:
    """Weights without values: shapes and dtypes alone."""

    dtype: torch.dtype
    quant: str = NONE
    deterministic: bool = False

    def linear(self, name: str, shape: tuple[int, int], rows: range | None = None, columns: range | None = None) -> Tensor:
        """As in `Weights`."""
        sizes = [len(part) if part is not None else size for part, size in zip((rows, columns), shape, strict=True)]
        return torch.empty(*sizes, dtype=self.dtype, device=META)

    def hold(self, weight: Tensor, *, is_summed: bool = False) -> Weight:
        """As in `Weights`."""
        return InvariantWeight(weight, is_summed) if self.deterministic else hold(weight, self.quant)

    def plain(self, weight: Tensor) -> Weight:
        """As in `Weights`."""
        return InvariantWeight(weight) if self.deterministic else weight

    def norm(self, name: str, size: int) -> Tensor:
        """As in `Weights`."""
        return torch.empty(size, dtype=self.dtype, device=META)

    def bias(self, name: str, size: int, rows: range | None = None, *, wide: bool = False) -> Tensor:
        """As in `Weights`."""
        dtype = torch.promote_types(self.dtype, torch.float32) if wide else self.dtype
        return torch.empty(size if rows is None else len(rows), dtype=dtype, device=META)


class SomeLayers(Models):
    """Decoders of which some layers are there, which stand for the others of their kind. `each`: how many of a kind."""

    def __init__(self, each: int, shaped: bool) -> None:
        super().__init__()
        self._each, self._shaped = each, shaped

    def get(self, cell: Cell, random: RandomWeights, part: Slice) -> Decoder:
        weights = ShapedWeights(random.dtype, random.quant, random.deterministic) if self._shaped else random
        return Decoder(cell.config, weights, replace(part, layers=tuple(stand_ins(cell, part.layers, self._each))))

    def token_ids(self, cell: Cell) -> Tensor:
        """Their number counts alone where nothing is computed."""
        return torch.empty(cell.tokens, dtype=torch.int64, device=META) if self._shaped else super().token_ids(cell)


def stand_ins(cell: Cell, layers: Sequence[int], each: int) -> dict[int, int]:
    """The layers of a stage that run, and how many each of them stands for."""
    chosen: dict[int, int] = {}
    for layer, count in cell.config.kinds(range(layers[0], layers[-1] + 1)).items():
        first = layer if layer == layers[0] else layers[-1] + 1 - count
        here = min(each, count)
        chosen |= {first + number: (count + here - 1 - number) // here for number in range(here)}
    return chosen


def simulate(
    cell: Cell, rank: int, kernel: Kernel, clock: Clock, device: torch.device, *, each: int = 1, is_nccl: bool = False, detailed: bool = False
) -> Script:
    """What a rank does in a pass, on a clock. Without a device (`META`) prices must look on, and `standing_for` say for what."""
    return next(recordings(cell, rank, kernel, clock, device, each=each, is_nccl=is_nccl, detailed=detailed))


def recordings(
    cell: Cell,
    rank: int,
    kernel: Kernel,
    clock: Clock,
    device: torch.device,
    *,
    each: int = 1,
    is_nccl: bool = False,
    detailed: bool = False,
    pause: Callable[[Transfer], float] | None = None,
) -> Iterator[Script]:
    """What a rank does in one pass after another, after one that is not counted where the work is done. `pause`: see Tape."""
    tape = Tape(clock.mark, detailed, pause)
    program = _program(cell, rank, kernel, device, tape, each, is_nccl)
    counts = stand_ins(cell, program.slice.layers, each)
    tape.fills = not _is_shaped(device)  # buffers keep the values, and later passes do not pay for them
    while True:
        program.prepare()
        _balance(program, cell)
        with torch.inference_mode(), using(tape):
            tape.begin()
            program.run()
            end = clock.mark()
        if device.type not in ("meta", "cpu"):
            torch.accelerator.synchronize()  # marks can be read once they have happened
        if not tape.fills:
            yield tape.script(end, clock.between, counts.__getitem__)
        tape.fills = False


def peak_of(cell: Cell, rank: int, kernel: Kernel) -> tuple[int, dict[str, int]]:
    """Bytes of the live tensors of a rank where they are most, in any pass but the first, and what they are: on shapes alone.

    Of the layers of a kind one runs. What the others add is what they hold, weights and kept rows, because all layers work in the same space.
    """
    with torch.inference_mode():
        program = _program(cell, rank, kernel, META, Tape(lambda: 0.0), 1, cell.device == "cuda")
        program.prepare()
        _balance(program, cell)
        if len(program.steps) > 1:  # buffers grow from chunk to chunk in the first pass, and in no other
            program.run()
            program.prepare()
            _balance(program, cell)
        tracker = LiveTensors(META, program.tensors)
        with tracker:
            program.run()
    categories = dict(tracker.by_category)
    if cell.target != "attention":
        stage = program.slice.layers
        counts = stand_ins(cell, stage, 1)
        more = [(layer, counts[layer.index] - 1) for layer in program.decoder.layers]
        categories["weights"] += sum(_bytes(parameters_of(layer)) * count for layer, count in more)
        pools = sum(category == KEPT for category, _ in program.cache.tensors()) // program.cache.lanes
        if pools and cell.kv_cache == "keep":
            categories[KEPT] = categories[KEPT] // pools * len(stage)  # cached prefixes are there for all layers from the start
    return sum(categories.values()), categories


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def _program(cell: Cell, rank: int, kernel: Kernel, device: torch.device, tape: Tape, each: int, is_nccl: bool) -> Program:
    groups = null_groups(cell.layout, rank, tape, is_nccl)
    return Program(cell, groups, kernel, device, SomeLayers(each, _is_shaped(device)))


def _is_shaped(device: torch.device) -> bool:
    return device.type == "meta"


def _balance(program: Program, cell: Cell) -> None:
    """Without values routers cannot choose, and what they would choose of random ones is even on average."""
    experts = cell.config.experts
    if experts is not None and cell.has_experts:
        program.log.watch(forced_LNK=EvenChoices(experts.count, experts.top_k))  # type: ignore[arg-type]


def classes(cell: Cell) -> dict[int, list[int]]:
    """The ranks that differ, and with each those whose programs are equal to its own: they have equal plans, rows and layers."""
    found: dict[Hashable, list[int]] = {}
    for rank in range(cell.world_size):
        found.setdefault(_kind(cell, rank), []).append(rank)
    return {ranks[0]: ranks for ranks in found.values()}


def _kind(cell: Cell, rank: int) -> Hashable:
    """Two ranks with the same are alike."""
    layout, place = cell.layout, cell.layout.coordinates(rank)
    part = cell.parts[place.dp].cell
    ends = (place.pp == 0, place.pp == layout.pp - 1)
    layers = tuple(cell.config.kinds(cell.stage_layers(place.pp)).values()) if cell.target != "attention" else ()
    held = tuple(len(rows.held(place)) for rows in cell.token_rows)
    plans = tuple(_plan(step, place.cp) for step in part.steps)
    return ends, layers, held, plans, part.lengths, part.prefixes


def _plan(step: Cell, place: int) -> str:
    """What a place in the cp group does. Libraries have their own way to know theirs."""
    strategy = STRATEGIES[step.strategy]
    return f"{strategy.plan(step, place)}{place if strategy.brings_collectives else ''}"


@contextmanager
def without_storage(kind: str) -> Iterator[None]:
    """Tensors without storage stand for those of a kind of device."""
    with standing_for(kind), torch.inference_mode():
        try:
            yield
        finally:
            leave()
