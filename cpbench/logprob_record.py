"""What a file of log-probabilities holds: the values of one layout on one prompt, and all that says which run they are from.

`cpbench verify -o` writes it and `cpbench verify --against` reads it, so that two machines, or two versions, can be compared. Files are untrusted, as
results are. Whether two may be compared is decided here, and what the comparison says in agreement.py.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

import cpbench
from cpbench.atomic import replace_file
from cpbench.cell import Cell
from cpbench.environment import git_state
from cpbench.errors import NOTHING_COMPARABLE, UNREADABLE, CpbenchError
from cpbench.logprobs import Rule
from cpbench.prompt import prompt_name
from cpbench.reading import checked, read_text

SCHEMA: Final = "cpbench.logprobs"
SCHEMA_VERSION = 1
# what makes a model another one, of a cell's key or its options, and how it is asked for
MODEL = {"model": "--model", "layers": "--set layers", "seed": "--seed", "weights": "--set weights", "router": "--set router"}


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, populate_by_name=True)


class Key(_Model):
    """What ran: the key of a cell."""

    target: Literal["prefill"]
    model: str
    layers: int
    layout: str
    strategy: str
    partition: str
    kernel: str
    dtype: str
    device: str
    lengths: list[int] = Field(min_length=1, description="new tokens of each sequence")
    prefixes: list[int] = Field(default_factory=list, description="cached tokens of each; none: there are none")
    seed: int
    options: dict[str, Any] = Field(description="every knob that changes the work and is not at its default")


class LogProbs(_Model):
    """The log-probabilities of one layout. A number is an fp32 value, written exactly; null: one that is not finite."""

    schema_name: Literal["cpbench.logprobs"] = Field(SCHEMA, alias="schema")
    schema_version: int = SCHEMA_VERSION
    cpbench_version: str
    git: str | None = None
    key: Key
    config: dict[str, Any] = Field(description="the numbers of the model")
    prompt: str = Field(description="hash of the token ids of the packed batch")
    temperature: float
    rounding: str = Field(description="where values are rounded between logits and log-probabilities")
    samples: list[list[float | None]] = Field(description="of each sequence, from its second new token on")

    @model_validator(mode="after")
    def _one_per_token(self) -> LogProbs:
        if [len(sample) for sample in self.samples] != [length - 1 for length in self.key.lengths]:
            raise ValueError("the samples are not as long as the sequences")
        return self

    @classmethod
    def of(cls, cell: Cell, ids_N: Tensor, rule: Rule, samples: Sequence[Tensor]) -> LogProbs:
        """Of one run."""
        values = [[value if math.isfinite(value) else None for value in sample.tolist()] for sample in samples]
        return cls(
            cpbench_version=cpbench.__version__,
            git=git_state(),
            key=Key.model_validate(cell.key),
            config=cell.config.to_dict(),
            prompt=prompt_name(ids_N.tolist()),
            temperature=rule.temperature,
            rounding=rule.rounding,
            samples=values,
        )

    def tensors(self) -> list[Tensor]:
        """The samples in fp32; what was not finite is NaN."""
        return [torch.tensor([math.nan if value is None else value for value in sample], dtype=torch.float32) for sample in self.samples]

    def require_comparable(self, other: LogProbs) -> None:
        """Raise CpbenchError (exit code 3) unless both are of one model, one prompt and one temperature. Layout, dtype and rounding may differ."""
        for what, mine, theirs, shown, hint in _compared(self, other):
            if mine != theirs:
                raise CpbenchError(f"Log-probabilities of different {what} cannot be compared{shown}.", hint, NOTHING_COMPARABLE)


def _compared(one: LogProbs, other: LogProbs) -> Iterator[tuple[str, Any, Any, str, str]]:
    """What must be equal: its name, both values, what of them is shown, and what to do where they differ."""
    for name, flag in MODEL.items():
        mine, theirs = ({**dict(record.key), **record.key.options}.get(name) for record in (one, other))
        yield "models", mine, theirs, f": {name} {mine} and {name} {theirs}", f"Run both with the same {flag}."
    yield "models", one.config, other.config, f" called {one.key.model}", "Run both with the same config.json."
    hint = "Run both with the same --lengths, --prefix and --seed."
    yield "prompts", one.key.lengths, other.key.lengths, f": {one.key.lengths} and {other.key.lengths} new tokens", hint
    yield "prompts", one.key.prefixes, other.key.prefixes, f": {one.key.prefixes} and {other.key.prefixes} cached tokens", hint
    yield "prompts", one.prompt, other.prompt, f": tokens {one.prompt} and {other.prompt}", hint
    shown = f": {one.temperature:g} and {other.temperature:g}"
    yield "temperatures", one.temperature, other.temperature, shown, f"Run both with --temperature {other.temperature:g}."


def read_log_probs(file: Path) -> LogProbs:
    """Read a file of log-probabilities. Raises CpbenchError (exit code 4) for anything that is not one."""
    text = read_text(file)
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CpbenchError(f"{file} is not a complete JSON file.", "cpbench verify -o FILE writes it anew.", UNREADABLE) from error
    return checked(data, file, LogProbs, SCHEMA, SCHEMA_VERSION)


def write_log_probs(record: LogProbs, file: Path) -> None:
    """Write a file in one step. Raises CpbenchError where it cannot be written."""
    replace_file(file, f"{record.model_dump_json(by_alias=True)}\n".encode())


def json_schema() -> dict[str, Any]:
    """The JSON Schema of such a file; `python -m cpbench.logprob_record` prints it, and results/logprobs.schema.json is that."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **LogProbs.model_json_schema(by_alias=True)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(json_schema(), indent=1) + "\n")
