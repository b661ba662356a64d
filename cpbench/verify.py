"""What `cpbench verify` runs: a grid of batches, dtypes, layouts, strategies and partitions as data, and the verdict on one cell of it.

A cell is proved as it is, with all ranks as threads of this process on the device at hand, so that layouts of many ranks can be verified
where no such machine is. Strategies that bring their own collectives need processes and are left to sweeps, which check every cell again
with the real ones. What makes an answer wrong is decided in numerics.py.
"""

from __future__ import annotations

import random
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

from cpbench.answer import Answer, solve
from cpbench.axes import BASELINE, GROUPED, cells_of
from cpbench.cell import Cell
from cpbench.deterministic import reduced
from cpbench.distributed.local import LocalWorld, one_thread_each
from cpbench.distributed.mesh import local_groups
from cpbench.environment import Machine
from cpbench.errors import CpbenchError, unknown
from cpbench.kernels import kernel_of, load_kernel
from cpbench.measure.device import open_device
from cpbench.models.config import ModelConfig
from cpbench.models.held import Models
from cpbench.models.presets import PRESETS, load_config
from cpbench.numerics import Check, judge
from cpbench.one_device import OneDevice
from cpbench.plan import unsupported
from cpbench.quantisation import NONE
from cpbench.scenario import DEVICE_DEFAULTS, override, parse_scenario, resolve
from cpbench.strategies import STRATEGIES
from cpbench.strategies.usp import hybrid_degrees

Fields = dict[str, Any]  # some fields of a scenario

MAX_RANKS = 64  # threads of one process
MAX_TOKENS = 16 * 1024  # new and cached ones of a batch: the truth is dense attention in fp64
COLLECTIVE_TIMEOUT = 120.0  # seconds after which a rank that is waited for will not come
DEGREES = ("pp", "dp", "cp", "tp")
# fields of a scenario that a caller may fix for the whole grid
FIELDS = (
    "strategies",
    "partition",
    *DEGREES,
    "layouts",
    "dtype",
    "model",
    "batches",
    "chunk",
    "target",
    "kernel",
    "kv_cache",
    "page_size",
    "head_groups",
    "quant",
    "deterministic",
    "seed",
    "device",
)
NEEDS_PROCESSES = "needs processes: checked by sweep"
NAMED = {"strategies", "partition", *DEGREES, "layouts", "batches"}  # where one of them was asked for, what cannot run is a row that says so
DEEPER_HYBRID = "u4r2"

# fmt: off
CONFIGS = {  # query:kv heads; width and vocabulary are small, because attention is what differs
    name: ModelConfig(f"{name} heads", 64, 2, heads, kv_heads, dim, 128, 256)
    for name, heads, kv_heads, dim in [("8:2", 8, 2, 64), ("8:8", 8, 8, 64), ("8:1", 8, 1, 64), ("24:4", 24, 4, 32), ("12:4", 12, 4, 128)]
}
# fmt: on
CONFIGS |= {
    name: replace(load_config(name).reduced(), layers=2, vocab=256) for name in ("qwen3-moe-tiny", "deepseek-v2-tiny", "deepseek-v3-tiny", "deepseek-v3.2-tiny")
}
EQUAL: Fields = {"batches": [{"lengths": [96, 96]}], "page_size": None}
UNEVEN: Fields = {"batches": [{"lengths": [101, 67, 130], "prefixes": [0, 40, 17]}]}
CHUNKED: Fields = {"batches": [{"lengths": [150, 64], "prefixes": [21, 0]}], "chunk": 48}
SHORT: Fields = {"batches": [{"lengths": [64, 3]}]}  # too short for zigzag, which switches context parallelism off
CACHED: Fields = {"batches": [{"lengths": [19, 16], "prefixes": [300, 77]}]}  # few new tokens on a long prefix
REMAINDERS: Fields = {"batches": [{"lengths": [127, 33, 65, 31]}]}
PREFILL: Fields = {"target": "prefill"}  # of two layers
LAYER: Fields = {"target": "layer"}
SINGLE: Fields = {"batches": [{"lengths": [67]}]}  # of two attention-DP groups one is idle
RANKS: tuple[Fields, ...] = ({"cp": [1], "tp": [1, 2]}, {"cp": [2, 3, 4, 8], "tp": [1]}, {"cp": [4], "tp": [2]})
MANY_RANKS: tuple[Fields, ...] = (
    {"cp": [1], "tp": [1, 2, 4]},
    {"cp": [2, 3, 4, 5, 8, 16], "tp": [1]},
    {"cp": [4, 8], "tp": [2]},
)
STAGES_AND_GROUPS: tuple[Fields, ...] = ({"dp": [2], "cp": [2], "tp": [1, 2]}, {"pp": [2], "cp": [2], "tp": [1]})
ABSORBED: Fields = {"mla": "absorbed"}
FIXED_ORDER: Fields = UNEVEN | PREFILL | {"deterministic": True, "strategies": ["allgather", "ulysses"]}
LATENT = ("deepseek-v2-tiny", "deepseek-v3.2-tiny")
EXPERTS = ("qwen3-moe-tiny", "deepseek-v3-tiny")
EXPERT_RANKS: tuple[Fields, ...] = ({"layouts": ["cp2tp2/ep4", "dp2cp2/ep2tp2"]},)
NARROW = ("float32", "bfloat16")
RANDOM_BATCHES = 8


@dataclass(frozen=True)
class Part:
    """A full product: every batch x dtype x model x degrees x strategy, with all of a strategy's partitions or the default one."""

    batches: Sequence[Fields]
    dtypes: Sequence[str] = ("float32",)
    configs: Sequence[str] = ("8:2",)
    ranks: Sequence[Fields] = RANKS
    all_partitions: bool = True


GRID = (
    Part((EQUAL, UNEVEN), NARROW),
    Part((CHUNKED, SHORT)),
    Part((UNEVEN | PREFILL, CHUNKED | PREFILL), NARROW, ranks=({"cp": [4], "tp": [1, 2]},), all_partitions=False),
    Part((UNEVEN | PREFILL, CHUNKED | PREFILL, SINGLE | PREFILL), ranks=STAGES_AND_GROUPS, all_partitions=False),
    Part((UNEVEN | PREFILL, CHUNKED | PREFILL), ranks=({"layouts": ["tp4sp", "cp2tp2sp"]},), all_partitions=False),
    Part((UNEVEN | PREFILL, CHUNKED | PREFILL | ABSORBED), configs=LATENT, ranks=({"cp": [4], "tp": [1]},), all_partitions=False),
    Part((UNEVEN | PREFILL,), configs=EXPERTS, ranks=EXPERT_RANKS, all_partitions=False),
    Part((FIXED_ORDER,), NARROW, ranks=({"cp": [4], "tp": [1]},), all_partitions=False),
)
DEEP_GRID = (
    Part((EQUAL, UNEVEN, CHUNKED, SHORT, CACHED, REMAINDERS), NARROW, ranks=MANY_RANKS),
    Part((UNEVEN,), NARROW, ("8:8", "8:1", "24:4", "12:4"), ({"cp": [2, 3, 4, 6, 8], "tp": [1]}, {"cp": [2], "tp": [2]})),
    Part((UNEVEN | PREFILL, CHUNKED | PREFILL, UNEVEN | LAYER), (*NARROW, "float16"), ranks=({"cp": [4], "tp": [1, 2]},)),
    Part([UNEVEN | PREFILL | {"kv_cache": "drop"}, *(CHUNKED | {"page_size": size} for size in (1, 16, 256))], NARROW, ranks=({"cp": [4], "tp": [1]},)),
    Part((UNEVEN | PREFILL, CHUNKED | PREFILL, SINGLE | PREFILL, SHORT | PREFILL), NARROW, ranks=({"pp": [1, 2], "dp": [1, 2], "cp": [1, 2], "tp": [1, 2]},)),
    Part((UNEVEN | PREFILL, CHUNKED | PREFILL, UNEVEN | LAYER), NARROW, (*LATENT, *EXPERTS), ({"cp": [2, 4], "tp": [1]}, *EXPERT_RANKS)),
    Part((UNEVEN | PREFILL, CHUNKED | PREFILL), NARROW, ranks=({"layouts": ["tp4sp", "cp2tp2sp", "dp2tp2sp", "pp2tp2sp"]},)),
    Part((UNEVEN | PREFILL | {"sp_gather": "latent"},), NARROW, LATENT[1:], ({"layouts": ["tp4sp", "cp2tp2sp/ep4"]},)),
    Part((CHUNKED | PREFILL | ABSORBED,), NARROW, LATENT, ({"cp": [4], "tp": [1]},)),
    Part((FIXED_ORDER,), NARROW, ranks=({"cp": [2, 4], "tp": [1]},), all_partitions=False),
    Part([batch | {"head_groups": 2, "strategies": [GROUPED]} for batch in (UNEVEN, CHUNKED, UNEVEN | PREFILL)], NARROW),
)


@dataclass(frozen=True)
class Row:
    """The verdict on one cell. `off`: the answer is right, but context parallelism was off; `skipped`: nothing ran, and why."""

    cell: Cell
    verdict: Literal["ok", "off", "wrong", "skipped"]
    reason: str | None
    check: Check | None = None


def asked_fields(data: Fields, settings: Sequence[str], machine: Machine) -> tuple[Fields, str]:
    """What was asked for, checked as a scenario, and the device. Raises CpbenchError that names the nearest valid value."""
    for setting in settings:
        data = override(data, setting)
    for name in data:
        if name not in FIELDS:
            raise unknown("field of verify", name, FIELDS)
    scenario, _ = resolve(parse_scenario(data), machine)
    return {name: getattr(scenario, name) for name in data if name != "device"}, scenario.device


def grid(asked: Fields, device: str, *, deep: bool) -> list[Cell | Row]:
    """The cells to verify, and rows for what will not run: all of it where something was asked for, else strategies that need processes.

    `asked` are fields of a resolved scenario that hold for the whole grid. Raises CpbenchError where nothing can run.
    """
    if asked.get("quant", NONE) != NONE and "target" not in asked:
        asked = asked | PREFILL  # attention alone has no projections
    parts: Sequence[Part] = (*DEEP_GRID, Part(_random_batches(asked.get("seed", 0)))) if deep else GRID
    if asked.keys() & NAMED:  # who names rows looks at these, in the model that was named or a plain one
        parts = tuple(part for part in parts if not PRESETS.keys() & part.configs and FIXED_ORDER not in part.batches)
    entries: dict[object, Cell | Row] = {}
    refused: list[Row] = []
    for cell in dict.fromkeys(cell for part in parts for cell in _cells(part, asked, device)):
        reason = _too_long(cell) or cannot_run(cell)
        if reason is None:
            entries[cell] = cell
            continue
        refused.append(Row(cell, "skipped", reason))
        if reason == NEEDS_PROCESSES or asked.keys() & NAMED:  # one row for what has one reason
            entries.setdefault((cell.strategy, _brings_collectives(cell) or (cell.layout, reason)), refused[-1])
    if not any(isinstance(entry, Cell) for entry in entries.values()):
        raise _nothing_to_verify(refused)
    return list(entries.values())


def _nothing_to_verify(refused: Sequence[Row]) -> CpbenchError:
    """The first reason of ours; else a library's, where the best one is that it needs processes."""
    first = min(refused, key=lambda row: (_brings_collectives(row.cell), row.reason != NEEDS_PROCESSES))
    if first.reason == NEEDS_PROCESSES:
        return CpbenchError(f"There is nothing to verify: {first.cell.strategy} needs processes.", "Use cpbench sweep, which checks every cell.")
    text, _, nearest = (first.reason or "").partition("; ")
    hint = f"{nearest[:1].upper()}{nearest[1:]}." if nearest else "See cpbench list for what can run here."
    return CpbenchError(f"There is nothing to verify: {text}.", hint)


def _brings_collectives(cell: Cell) -> bool:
    return STRATEGIES[cell.strategy].brings_collectives


def _cells(part: Part, asked: Fields, device: str) -> Iterator[Cell]:
    """The cells of one part. What was asked for takes the place of the part's own."""
    own = {"batches", "chunk", "page_size"} if "batches" in asked else set()
    fixed = {name: value for name, value in asked.items() if name not in (*DEGREES, "layouts", "strategies", "partition", "model")}
    dtypes = [asked["dtype"]] if "dtype" in asked else part.dtypes
    configs = [reduced(load_config(asked["model"]), bool(asked.get("deterministic")))] if "model" in asked else [CONFIGS[name] for name in part.configs]
    common = {"device": device, "baseline": False, "page_size": DEVICE_DEFAULTS[device].get("page_size")}
    for batch, dtype, config, ranks in product(part.batches, dtypes, configs, _ranks(part, asked)):
        fields = common | {name: value for name, value in batch.items() if name not in own} | {"dtype": dtype} | fixed | ranks
        if fields.get("kv_cache") == "drop" and fields.get("chunk"):
            continue  # a chunk reads what the ones before it left
        names = asked.get("strategies") or batch.get("strategies") or [*(name for name in STRATEGIES if name != BASELINE), DEEPER_HYBRID]
        fields["strategies"] = names if asked.keys() & {"cp", "layouts"} and "strategies" in asked else [name for name in names if _fits(name, ranks)]
        if not fields["strategies"]:
            continue
        layers = 2 if fields.get("target") == "prefill" else 1
        for cell in cells_of(parse_scenario({"target": "attention", "layers": layers} | fields), config):
            if cell.strategy == BASELINE and "strategies" in asked and not asked.keys() & {"cp", "layouts"} and BASELINE not in asked["strategies"]:
                continue
            every = STRATEGIES[cell.strategy].partitions if part.all_partitions else (cell.partition,)
            for partition in every if "partition" not in asked or cell.layout.cp == 1 else (asked["partition"],):
                yield replace(cell if "target" in asked else _with_stages(cell), partition=partition)


def _with_stages(cell: Cell) -> Cell:
    """Pipeline stages are of layers: where a layout has some, a prefill of as many layers."""
    layers = max(2, cell.layout.pp)
    return replace(cell, target="prefill", layers=layers, config=replace(cell.config, layers=layers)) if cell.layout.pp > 1 else cell


def _ranks(part: Part, asked: Fields) -> list[Fields]:
    """Layouts or degrees that are crossed: those asked for, else the part's, and those of the hybrids that were asked for."""
    if "layouts" in asked:
        return [{"layouts": asked["layouts"]}]
    degrees = {name: asked[name] for name in DEGREES if name in asked}
    if "cp" in asked:
        return [{"tp": [1]} | degrees]
    hybrids = [found for name in asked.get("strategies", []) if (found := hybrid_degrees(name))]
    return [entry | degrees for entry in (*part.ranks, *({"cp": [ulysses * ring], "tp": [1]} for ulysses, ring in hybrids))]


def _fits(name: str, ranks: Fields) -> bool:
    """Whether a strategy is no hybrid, or one of these degrees."""
    degrees = hybrid_degrees(name)
    return degrees is None or degrees[0] * degrees[1] in ranks.get("cp", ())


def _too_long(cell: Cell) -> str | None:
    """Why a batch has no truth to be held against, with the nearest valid value behind a semicolon."""
    tokens = cell.tokens + sum(cell.prefixes)
    if tokens <= MAX_TOKENS or cell.world_size > MAX_RANKS:
        return None
    return f"{tokens:,} new and cached tokens are too many for the dense fp64 truth; the nearest valid number is {MAX_TOKENS:,}"


def cannot_run(cell: Cell) -> str | None:
    """Why a cell will not run as threads of one process, with the nearest valid value behind a semicolon."""
    shape = cell.shape
    if cell.world_size > MAX_RANKS:
        return f"{cell.layout} has {cell.world_size} ranks, and as threads of one process they are at most {MAX_RANKS}; sweeps check more"
    if reason := unsupported(cell):
        return reason
    if _brings_collectives(cell):
        return NEEDS_PROCESSES
    if cell.kernel != "auto" and (reason := load_kernel(cell.kernel).available(cell.device, cell.dtype, shape.qk_dim, shape.v_dim)):
        return f"kernel {cell.kernel} cannot run here: {reason}"
    return None


def _random_batches(seed: int) -> list[Fields]:
    """Uneven batches with prefixes, whole or in chunks, as a function of the seed."""
    draw = random.Random(seed)
    batches = []
    for _ in range(RANDOM_BATCHES):
        count = draw.randint(1, 4)
        lengths = [draw.randint(16, 299) for _ in range(count)]
        batch: Fields = {"batches": [{"lengths": lengths, "prefixes": [draw.choice((0, draw.randint(1, 299))) for _ in range(count)]}]}
        batches.append(batch | {"chunk": draw.choice((None, draw.randint(16, 150))), "page_size": draw.choice((None, 1, 16))})
    return batches


def run(entries: Sequence[Cell | Row], device: str, starting: Callable[[int, Cell], object]) -> Iterator[Row]:
    """The rows of a grid, one after the other; `starting` is called with the number of a row (from 1) before it runs."""
    verifier = Verifier(device)
    for number, entry in enumerate(entries, 1):
        if isinstance(entry, Row):
            yield entry
            continue
        starting(number, entry)
        yield verifier.row(entry)


class Verifier:
    """Runs cells on one device, and keeps what they share: models, and the answers of one device."""

    def __init__(self, device: str) -> None:
        self._device = open_device(device, 0).torch_device
        self._one_device = OneDevice(self._device)
        self._models = [Models() for _ in range(MAX_RANKS)]

    def row(self, cell: Cell) -> Row:
        """The verdict on one cell. An exception of a rank is a wrong answer too."""
        kernel, world = kernel_of(cell), LocalWorld(cell.world_size, COLLECTIVE_TIMEOUT)

        def rank_program(rank: int) -> list[Answer]:
            return solve(cell, local_groups(cell.layout, world, rank), kernel, self._device, self._models[rank])

        try:
            with one_thread_each():
                check = judge(world.run(rank_program)[0], kernel, self._one_device)
        except Exception as error:
            return Row(cell, "wrong", _raised(error))
        if not check.passed:
            return Row(cell, "wrong", check.reason, check)
        return Row(cell, "off" if cell.cp_off else "ok", cell.cp_off, check)


def _raised(error: Exception) -> str:
    """What went wrong and where, in one line: `ValueError: ... (ring.py:92)`."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "cpbench" in Path(frame.filename).parts]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"
