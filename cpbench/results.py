"""What a result file holds: the models that every reader and writer shares, and how a file becomes one of them.

A run is an append-only journal (`.jsonl`) while it lasts and one JSON file when it ends; both read alike. Files are untrusted: their
size is limited, they are checked against the models, nothing in them is executed. Writing while a sweep runs is journal.py's part.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from glob import glob
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cpbench.errors import UNREADABLE, CpbenchError

SCHEMA: Final = "cpbench.result"
SCHEMA_VERSION = 1
MAX_FILE_BYTES = 256 << 20

Stored = TypeVar("Stored", bound=BaseModel)
Status = Literal["ok", "oom", "timeout", "crash", "wrong", "unsupported", "skipped", "interrupted"]
FAILED: tuple[Status, ...] = ("oom", "timeout", "crash", "wrong", "interrupted")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


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


class Failure(_Model):
    """Where a cell failed, as far as is known."""

    rank: int | None = None
    log_tail: list[str] = Field(default_factory=list)


class CellResult(_Model):
    """Everything known about one cell, all rounds together."""

    id: str
    key: dict[str, Any]
    status: Status
    reason: str | None = None
    world_size: int = 1
    tokens_per_rank: int | None = None
    oversubscribed: bool = False
    cp_active: bool = Field(True, description="false where the batch was too short, so that every context-parallel rank computed all of it")
    cp_off_reason: str | None = None
    threads_per_rank: int | None = None
    kernel: str | None = Field(None, description="the kernel that was dispatched")
    metrics: dict[str, Metric] = Field(default_factory=dict)
    first_call_s: float | None = None
    memory: Memory | None = None
    ranks: list[RankRecord] = Field(default_factory=list)
    traffic: dict[str, Any] = Field(default_factory=dict, description="predicted and recorded, of the rank that receives most")
    experts: dict[str, Any] = Field(
        default_factory=dict, description="of a model with experts: rows of each expert and rank in a pass, and the worst imbalance"
    )
    clocks: dict[str, Any] = Field(default_factory=dict)
    numerics: Numerics | None = None
    first_tokens: list[FirstToken] = Field(default_factory=list)
    failure: Failure | None = None
    artifacts: list[str] = Field(default_factory=list)
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
    cpbench_version: str
    git: str | None = None


class ResultFile(_Model):
    """One run. Field `schema` says that it is one."""

    schema_name: Literal["cpbench.result"] = Field(SCHEMA, alias="schema")
    schema_version: int = SCHEMA_VERSION
    run: Run
    environment: dict[str, Any]
    cells: list[CellResult]

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, populate_by_name=True)

    def cell(self, cell_id: str) -> CellResult | None:
        return next((cell for cell in self.cells if cell.id == cell_id), None)


def read(path: str | Path) -> ResultFile:
    """Read a result file or a journal. Raises CpbenchError (exit code 4) for anything that is not one."""
    file = Path(path)
    text = read_text(file)
    try:
        data = _fold(text) if file.suffix == ".jsonl" else json.loads(text)
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        hint = f"It was cut or is not from cpbench; a journal beside it ({file.stem}.jsonl) may hold the data."
        raise CpbenchError(f"{file} is not a complete JSON file.", hint, UNREADABLE) from error
    return checked(data, file, ResultFile, SCHEMA, SCHEMA_VERSION)


def read_text(file: Path) -> str:
    """A file of cpbench's as it is, if it is not too large. Raises CpbenchError (exit code 4) where it cannot be read."""
    try:
        size = file.stat().st_size
        if size > MAX_FILE_BYTES:
            raise CpbenchError(f"{file} is larger than {MAX_FILE_BYTES >> 20} MiB.", "A result file is a few megabytes: is this the right file?", UNREADABLE)
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CpbenchError(f"{file} does not exist.", _nearest_file(file), UNREADABLE) from error
    except (OSError, UnicodeDecodeError) as error:
        raise CpbenchError(f"{file} cannot be read.", f"{error}", UNREADABLE) from error


def load(pattern: str | Path | Iterable[str | Path]) -> list[ResultFile]:
    """Read all files that match a glob pattern (or the given paths), in name order."""
    patterns = [pattern] if isinstance(pattern, str | Path) else list(pattern)
    paths = sorted({path for item in patterns for path in (glob(str(item)) or [str(item)])})  # noqa: PTH207 - patterns may be absolute
    return [read(path) for path in paths]


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a result file; `python -m cpbench.results` prints it, and results/schema.json is that."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **ResultFile.model_json_schema(by_alias=True)}


def checked(data: Any, file: Path, model: type[Stored], schema: str, version: int) -> Stored:
    """The content of a file as its model. Raises CpbenchError (exit code 4) where it is of another schema, or breaks it."""
    kind = schema.removeprefix("cpbench.")
    if not isinstance(data, dict) or data.get("schema") != schema:
        raise CpbenchError(f"{file} is not a cpbench {kind}.", f'A {kind} has "schema": "{schema}" at its top.', UNREADABLE)
    found = data.get("schema_version")
    if not isinstance(found, int) or found > version:
        raise CpbenchError(f"{file} has schema version {found!r}; this cpbench reads up to {version}.", "Install a newer cpbench.", UNREADABLE)
    try:
        return model.model_validate(data)
    except (ValidationError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": ("?",), "msg": "too deeply nested"}
        where = ".".join(str(part) for part in first["loc"])
        raise CpbenchError(f"{file} breaks the {kind} schema at {where}: {first['msg']}.", "The file was edited or damaged.", UNREADABLE) from error


def _fold(text: str) -> dict[str, Any]:
    """Journal lines -> the dictionary of a result file. A last line that was cut short is ignored: it was never finished."""
    lines = text.splitlines()
    entries = []
    for number, line in enumerate(lines):
        try:
            entries.append(json.loads(line))
        except ValueError:
            if number + 1 < len(lines):
                raise
    data: dict[str, Any] = {}
    cells: dict[str, Any] = {}
    for entry in entries:
        kind = entry["type"]
        if kind == "header":
            data.update(entry["result"])
        elif kind == "environment":
            data["environment"] = entry["environment"]
        elif kind == "run":
            data["run"] = entry["run"]
        elif kind == "cell":
            cells[entry["cell"]["id"]] = entry["cell"]
    if not data:
        raise ValueError("no header")
    return {**data, "cells": list(cells.values())}


def _nearest_file(file: Path) -> str:
    import difflib

    try:
        names = [path.name for path in file.parent.iterdir() if path.suffix in (".json", ".jsonl")]
    except OSError:
        names = []
    near = difflib.get_close_matches(file.name, names, n=1, cutoff=0.0)
    return f"The nearest file there is {file.parent / near[0]}." if near else "cpbench sweep writes results/<name>-<time>.json."


if __name__ == "__main__":
    sys.stdout.write(json.dumps(json_schema(), indent=1) + "\n")
