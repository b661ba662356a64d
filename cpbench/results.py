"""What a result file holds: the models that every reader and writer shares, and the schema of them.

How a file becomes a model is reading.py's part; writing while a sweep runs is journal.py's.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from cpbench.clock_record import Clocks
from cpbench.tracing.record import Profile

SCHEMA: Final = "cpbench.result"
SCHEMA_VERSION = 1
MAX_TOKENS = 2**53

Status = Literal["ok", "oom", "timeout", "crash", "wrong", "unsupported", "skipped", "interrupted"]
RunKind = Literal["sweep", "profile", "maxseq", "projection"]
FAILED: tuple[Status, ...] = ("oom", "timeout", "crash", "wrong", "interrupted")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, defer_build=True)


class Metric(_Model):
    """A measured quantity: raw samples per round (each the maximum over ranks), and the summary that tables print."""

    unit: str
    better: Literal["lower", "higher", "none"] = "lower"
    rounds: list[list[float]] = Field(description="raw samples in order, one list per round")
    median: float
    ci95: tuple[float, float] | None = Field(None, description="interval of the median over all samples; null under 5 samples")
    n: int
    stop: list[str] = Field(default_factory=list, description="why each round stopped sampling")


class Memory(_Model):
    """Peaks of one rank in bytes (the rank with the highest). Measured in a pass that is not timed."""

    rank: int
    peak_live_bytes: int | None = Field(None, description="tensors alive, from the dispatch-level tracker")
    peak_allocator_bytes: int | None = Field(None, description="allocator peak; on CPU from the profiler, kernel workspace included")
    peak_reserved_bytes: int | None = Field(None, description="CUDA caching allocator")
    peak_rss_bytes: int | None = Field(None, description="resident set of the process")
    predicted_live_bytes: int | None = Field(None, description="closed form for the same rank")
    by_category: dict[str, int] = Field(default_factory=dict, description="what was alive at the live peak")


class RankTimes(_Model):
    """Seconds of one rank in the marked pass."""

    step_s: float
    compute_s: float = Field(description="own work: the pass without what is exposed")
    comm_s: float = Field(description="exposed, and hidden behind own work as far as a collective of its size takes alone")
    exposed_comm_s: float = Field(description="starting collectives and waiting for them, and so for ranks that are late")


class Collectives(_Model):
    """All collectives of one kind of one rank in the marked pass."""

    axis: str
    ranks: int
    operation: str
    calls: int
    bytes: int = Field(description="received, or sent to a single other rank")
    exposed_s: float
    alone_s: float = Field(description="what they take one after the other with nothing else going on, from one or two sizes timed outside of timed passes")
    bytes_per_s: float = Field(description="of the larger size timed: what nccl-tests call bus bandwidth")


class Split(_Model):
    """How a rank spends a pass, from one that was marked: of the rank with the most work of its own, for which the others wait."""

    reason: str | None = Field(None, description="why it is not known")
    rank: int | None = None
    step_s: float | None = None
    compute_s: float | None = None
    comm_s: float | None = None
    exposed_comm_s: float | None = None
    compute_skew: float | None = Field(None, description="the most own work of a rank over the median")
    collectives: list[Collectives] = Field(default_factory=list)
    ranks: list[RankTimes] = Field(default_factory=list, description="of all ranks, in order")


class Peak(_Model):
    """What one rank's device could compute."""

    flops: float
    source: str
    is_limit: bool = Field(description="nothing real is above it: a data sheet's; not so a GEMM that was measured")


class RankRecord(_Model):
    """One rank's share of the work and its own clock."""

    rank: int
    coordinates: dict[str, int]
    tokens: int = Field(description="logical rows of this rank")
    score_pairs: int = Field(description="attention score pairs per layer, times query heads")
    median_s: float | None = None
    peak_live_bytes: int | None = None


class Numerics(_Model):
    """What was proved on a small input before the cell was timed."""

    ratio: float | None = Field(None, description="relative RMSE against fp64 over that of one device in the same dtype")
    relative_rmse: float | None = None
    limit: str = Field("", description="the bound that was applied")
    remote_tokens_used: bool | None = None
    logits_max_error: float | None = None
    tokens: int | None = Field(None, description="size of the small input")
    passed: bool = True


class FirstToken(_Model):
    """Greedy first token of one sequence and the gap between its logit and the next one (fp32)."""

    token: int
    margin: float
    text: str | None = Field(None, description="the token as text, where the input was a prompt")


class MemoryOwner(_Model):
    """What memory was for: a category of what is held, or the span, operator and shape that made a tensor."""

    name: str
    bytes: int


class Failure(_Model):
    """Where a cell failed, as far as is known."""

    rank: int | None = None
    log_tail: list[str] = Field(default_factory=list)
    owners: list[MemoryOwner] = Field(default_factory=list, description="where memory ran out: who had most of it, the largest first")


class Alternation(_Model):
    """The cell is one of two variants (--ab) whose passes alternate: A B B A."""

    variant: Literal["A", "B"]
    setting: str = Field(description="what the variant is, as it was asked for")
    other: str = Field(description="id of the cell of the other variant")
    rounds: list[int | None] = Field(default_factory=list, description="of each list of samples the round in which they alternated; null: it ran alone")
    ratio: float | None = Field(None, description="of B: its time over that of A, the median over the blocks A B B A")
    ratio_ci95: tuple[float, float] | None = Field(None, description="interval of that median; null under 5 blocks")
    blocks: int = 0


class Projection(_Model):
    """What a projection rests on. Its values are metrics whose names begin with `projected_`."""

    hardware: str = Field(description="name of the device profile")
    title: str
    compute: str = Field(description="where seconds of work come from: looked up in the profile, or measured on a device")
    links: str = Field(description="where seconds of transfers come from")
    ranks_simulated: int = Field(description="ranks whose programs differ; each stands for those that are like it")
    gpus_per_node: int
    band: tuple[float, float] = Field(
        description="seconds, if links are fast and disturb nothing, and if they are slow, disturb twice as much, and ranks are late"
    )
    band_jitter: float = Field(description="of the slow end: by what part of its work a rank may be late, one standard deviation")
    slowest_rank: int
    peak_rank: int
    by_category: dict[str, int] = Field(default_factory=dict, description="bytes that are alive at the peak")
    reserved: dict[str, int] = Field(default_factory=dict, description="bytes that libraries take beside tensors")
    memory_bytes: int = Field(description="of one device")
    fits: bool
    outside: list[str] = Field(default_factory=list, description="sizes that the profile was not measured at")
    light_binds: str | None = Field(None, description="which floor the speed of light is: compute, memory or wire")


class ComparedCell(_Model):
    """What a cell was and what it measured: all of it that is compared."""

    id: str
    key: dict[str, Any]
    status: Status
    reason: str | None = None
    world_size: int = 1
    oversubscribed: bool = False
    kernel: str | None = Field(None, description="the kernel that was dispatched")
    metrics: dict[str, Metric] = Field(default_factory=dict)
    first_call_s: float | None = None
    memory: Memory | None = None
    traffic: dict[str, Any] = Field(default_factory=dict, description="predicted and recorded, of the rank that receives most")
    peak: Peak | None = None
    clocks: Clocks = Field(default_factory=Clocks, description="clocks and load while each round was timed")
    ab: Alternation | None = None
    numerics: Numerics | None = None
    profile: Profile | None = None

    @field_validator("key")
    @classmethod
    def _key_can_be_read(cls, key: dict[str, Any]) -> dict[str, Any]:
        """What tables and frames compute with; everything else of a key is only shown."""
        for name in ("lengths", "prefixes"):
            values = key.get(name, [])
            if not isinstance(values, list) or any(type(value) is not int or not 0 <= value <= MAX_TOKENS for value in values):
                raise ValueError(f"{name} must be a list of whole numbers up to {MAX_TOKENS:,}")
        if not isinstance(key.get("options", {}), dict):
            raise ValueError("options must be an object")
        return key


class CellResult(ComparedCell):
    """Everything known about one cell, all rounds together."""

    tokens_per_rank: int | None = None
    cp_active: bool = Field(True, description="false where the batch was too short, so that every context-parallel rank computed all of it")
    cp_off_reason: str | None = None
    threads_per_rank: int | None = None
    ranks: list[RankRecord] = Field(default_factory=list)
    split: Split | None = Field(None, description="compute, communication, and what of it is exposed; of the latest round")
    experts: dict[str, Any] = Field(
        default_factory=dict, description="of a model with experts: rows of each expert and rank in a pass, and the worst imbalance"
    )
    first_tokens: list[FirstToken] = Field(default_factory=list)
    failure: Failure | None = None
    projection: Projection | None = None
    artifacts: list[str] = Field(default_factory=list, description="files of this cell, relative to the result file")
    warnings: list[str] = Field(default_factory=list)


class Run(_Model):
    """Who ran what, when."""

    id: str
    name: str
    argv: list[str]
    scenario: dict[str, Any] = Field(description="resolved: every default filled in")
    defaults: list[str] = Field(default_factory=list, description="what the defaults chose, as echoed")
    started: str
    ended: str | None = None
    complete: bool = False
    kind: RunKind = Field(
        "sweep",
        description="profile: one cell, which was traced too; maxseq: cells are trials of lengths, and nothing was timed; projection: of other devices",
    )
    cpbench_version: str
    git: str | None = None


class RunFile(_Model):
    """A result file without its cells."""

    schema_name: Literal["cpbench.result"] = Field(SCHEMA, alias="schema")
    schema_version: int = Field(SCHEMA_VERSION, strict=True)
    run: Run
    environment: dict[str, Any]

    model_config = ConfigDict(populate_by_name=True)


class ResultFile(RunFile):
    """One run. Field `schema` says that it is one."""

    cells: list[CellResult]

    def cell(self, cell_id: str) -> CellResult | None:
        return next((cell for cell in self.cells if cell.id == cell_id), None)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a result file; `python -m cpbench.results` prints it, and results/schema.json is that."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **ResultFile.model_json_schema(by_alias=True)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(json_schema(), indent=1) + "\n")
