"""What to measure: the scenario file, its fields, overrides, and the defaults that the machine decides.

A scenario is YAML; command-line flags and `--set a.b=c` override it; environment variables configure nothing. The models below check
every field and name the nearest valid value. Which cells come out of a scenario, and which of them can run, is decided in plan.py.
`python -m cpbench.scenario` prints the JSON Schema that is committed as scenarios/schema.json.
"""

from __future__ import annotations

import copy
import re
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from cpbench.errors import CpbenchError, unknown
from cpbench.layout import MAX_RANKS
from cpbench.units import format_count, format_seconds, parse_count, parse_fraction, parse_seconds

if TYPE_CHECKING:
    from cpbench.environment import Machine

DEVICE_DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"model": "qwen3-tiny", "layers": 1, "dtype": "float32"},
    "cuda": {"model": "qwen3-8b", "layers": 4, "dtype": "bfloat16"},
}
COMMON_DEFAULTS: dict[str, Any] = {"seq": [36 * 1024], "batch": [1], "cp": [1], "tp": [1], "strategies": ["allgather", "ring", "ulysses"]}
MAX_BATCH = 4096


def _through(parse: Callable[[Any], Any]) -> BeforeValidator:
    """Use a parser of units.py as a validator, keeping its hint."""

    def convert(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return value  # pydantic names the type
        try:
            return parse(value)
        except CpbenchError as error:
            raise PydanticCustomError("cpbench", "{message}", {"message": error.message, "hint": error.hint}) from error

    return BeforeValidator(convert)


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("cpbench", "{message}", {"message": f"{value} is not a whole number.", "hint": "Write a number."})
    return value


def _as_list(value: Any) -> Any:
    """`2,4` and `2` are lists too."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return [value] if isinstance(value, int | float) else value


def _or_text(kind: str) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"type": kind}, {"type": "string"}]})


Whole = Annotated[int, BeforeValidator(_no_bool)]
Tokens = Annotated[int, BeforeValidator(_no_bool), _through(parse_count), Field(ge=1), _or_text("integer")]
Seconds = Annotated[float, BeforeValidator(_no_bool), _through(parse_seconds), Field(gt=0), _or_text("number")]
Ratio = Annotated[float, BeforeValidator(_no_bool), _through(parse_fraction), Field(gt=0, lt=1), _or_text("number")]
Degree = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=MAX_RANKS)]
Batch = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=MAX_BATCH)]
LIST = BeforeValidator(_as_list)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, validate_default=True)


class Timing(_Model):
    """When a round of a cell has enough samples."""

    min_samples: Whole = Field(3, ge=1, le=100_000, description="timed passes that always run")
    max_samples: Whole = Field(30, ge=1, le=100_000, description="timed passes at most")
    max_seconds: Seconds = Field(10.0, description="stop after this time, once min_samples are there")
    precision: Ratio = Field(0.02, description="stop when half the 95% interval of the median is below this part of it, e.g. 2%")

    @model_validator(mode="after")
    def _ordered(self) -> Timing:
        if self.max_samples < self.min_samples:
            message = f"max_samples = {self.max_samples} is below min_samples = {self.min_samples}."
            raise PydanticCustomError("cpbench", "{message}", {"message": message, "hint": f"Set max_samples to at least {self.min_samples}."})
        return self


class Limits(_Model):
    """What a sweep may cost."""

    cell_timeout: Seconds = Field(600.0, description="a cell that takes longer in one round gets the status timeout")
    budget: Seconds | None = Field(None, description="cells that do not fit into this time are skipped")
    start_timeout: Seconds = Field(120.0, description="time for the processes of a world size to come up")


class Scenario(_Model):
    """A sweep: the axes seq x batch x cp x tp x strategies, and what holds for all its cells. A field left out gets a default."""

    name: str = Field("sweep", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$", description="names the result file")
    target: Literal["prefill", "layer", "attention"] = Field("prefill", description="prefill: time to first token; layer: one decoder layer; attention alone")
    model: str | None = Field(None, description="a preset (cpbench list models) or the path of a Hugging Face config.json")
    layers: Whole | None = Field(None, ge=1, description="decoder layers to run, at most those of the model")
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seq: Annotated[list[Tokens], LIST] | None = Field(None, min_length=1, description="tokens per sequence: 36k = 36864")
    batch: Annotated[list[Batch], LIST] | None = Field(None, min_length=1, description="sequences per batch")
    cp: Annotated[list[Degree], LIST] | None = Field(None, min_length=1, description="context-parallel degrees")
    tp: Annotated[list[Degree], LIST] | None = Field(None, min_length=1, description="tensor-parallel degrees")
    strategies: Annotated[list[str], LIST] | None = Field(None, min_length=1, description="context-parallel algorithms (cpbench list strategies)")
    partition: str | None = Field(None, description="which tokens a rank holds (cpbench list partitions); null: what each strategy prefers")
    kernel: str = Field("auto", description="attention on one device (cpbench list kernels)")
    baseline: bool = Field(True, description="also measure cp=1, from which speed-up and efficiency are computed")
    kv_cache: Literal["keep", "drop"] = Field("keep", description="keep every layer's K and V as a server does, or drop them")
    seed: Whole = Field(0, ge=0, lt=2**31, description="of weights, token ids and the order of later rounds")
    rounds: Whole = Field(1, ge=1, le=1000, description="fresh passes over all cells; 4 or more for files that will be compared")
    threads: Whole | None = Field(None, ge=1, le=4096, description="CPU threads per rank; null: cores // ranks")
    timing: Timing = Field(default_factory=Timing)
    limits: Limits = Field(default_factory=Limits)


def parse_scenario(data: dict[str, Any]) -> Scenario:
    """Check a mapping as YAML gives it. Raises CpbenchError that names the first wrong field and the nearest valid value."""
    try:
        return Scenario.model_validate(data)
    except ValidationError as error:
        raise _readable(error.errors()[0]) from error


def load_scenario(path: str | Path) -> Scenario:
    """Read and check a scenario file. Raises CpbenchError."""
    return parse_scenario(read_yaml(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a scenario file, not checked yet; `name` is the file's where it has none. Raises CpbenchError."""
    from cpbench.yaml_input import read_mapping

    data = read_mapping(Path(path))
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", Path(path).stem).lstrip("._-")
    return {"name": stem[:80] or "sweep", **data}


def override(data: dict[str, Any], setting: str) -> dict[str, Any]:
    """A copy of a scenario mapping with one `a.b=value` applied; the value is YAML. Raises CpbenchError for a field that does not exist."""
    from cpbench.yaml_input import parse_value

    path, equals, text = setting.partition("=")
    names = [name.strip() for name in path.split(".")]
    if not equals or not all(names):
        raise CpbenchError(f"{setting[:60]!r} is not a setting.", "Write field=value, for example timing.precision=1%.")
    model: type[BaseModel] | None = Scenario
    for depth, name in enumerate(names):
        if model is None:
            raise CpbenchError(f"{'.'.join(names[:depth])} has no fields.", f"Set it directly: {'.'.join(names[:depth])}=VALUE.")
        if name not in model.model_fields:
            raise unknown("scenario field", ".".join(names[: depth + 1]), [".".join([*names[:depth], field]) for field in model.model_fields])
        model = _submodel(model, name)
    if model is not None:
        raise CpbenchError(f"{path} is a group of fields.", f"Set one of them: {', '.join(f'{path}.{field}' for field in model.model_fields)}.")
    changed = copy.deepcopy(data)
    place = changed
    for name in names[:-1]:
        place[name] = place.get(name) or {}
        place = place[name]
        if not isinstance(place, dict):
            raise CpbenchError(f"{name} in the scenario is not a group of fields.", f"Write its fields below it, for example {path}: {text}.")
    place[names[-1]] = parse_value(text, path)
    return changed


def resolve(scenario: Scenario, machine: Machine) -> tuple[Scenario, list[str]]:
    """Fill every field that was left out from the device, and check all names.

    Returns the complete scenario and one note per choice that the user did not make, for the echo before the start. Resolving a
    resolved scenario changes nothing. Raises CpbenchError for names that do not exist and a device that is not there.
    """
    device = machine.device if scenario.device == "auto" else scenario.device
    if device == "cuda" and machine.device != "cuda":
        raise CpbenchError("This machine has no CUDA device that PyTorch can use.", "Use --set device=cpu, or see cpbench doctor.")
    filled: dict[str, Any] = {"device": device}
    notes = [] if scenario.device == device else [f"device {device}"]
    for field, default in {**DEVICE_DEFAULTS[device], **COMMON_DEFAULTS}.items():
        if getattr(scenario, field) is None:
            filled[field] = copy.copy(default)
            if field not in ("batch", "tp", "seq", "layers"):
                shown = ", ".join(map(str, default)) if isinstance(default, list) else default
                notes.append(f"{field} {shown} (default on {device})" if field in DEVICE_DEFAULTS[device] else f"{field} {shown} (default)")
    result = scenario.model_copy(update=filled)
    _check_names(result)
    _fit_layers(result, scenario.layers, notes)
    notes += [_echo_length(length, scenario.seq is None) for length in result.seq or []]
    if result.baseline and result.cp and 1 not in result.cp:
        notes.append("cp=1 added as the baseline")
    timing = result.timing
    if scenario.timing == Timing():
        seconds = format_seconds(timing.max_seconds)
        notes.append(f"{timing.min_samples} to {timing.max_samples} timed passes, {seconds} per cell unless {timing.min_samples} take longer (default)")
    return result, notes


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a scenario file, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Scenario.model_json_schema(), "title": "cpbench scenario"}


def _echo_length(length: int, default: bool) -> str:
    short = format_count(length)
    exact = f"seq {length:,} tokens" if short == str(length) else f"seq {short} = {length:,} tokens"
    return f"{exact} (default)" if default else exact


def _check_names(scenario: Scenario) -> None:
    from cpbench.kernels import KERNELS
    from cpbench.models.presets import load_config
    from cpbench.partition import PARTITIONS
    from cpbench.strategies import STRATEGIES

    load_config(scenario.model or "")
    for name in scenario.strategies or []:
        if name not in STRATEGIES:
            raise unknown("strategy", name, STRATEGIES)
    if scenario.partition is not None and scenario.partition not in PARTITIONS:
        raise unknown("partition", scenario.partition, PARTITIONS)
    if scenario.kernel != "auto" and scenario.kernel not in KERNELS:
        raise unknown("kernel", scenario.kernel, [*KERNELS, "auto"])


def _fit_layers(scenario: Scenario, asked: int | None, notes: list[str]) -> None:
    """Only a prefill has several layers, and no more than its model. Changes `scenario.layers` and `notes`."""
    from cpbench.models.presets import load_config

    config = load_config(scenario.model or "")
    if scenario.target != "prefill":
        if asked not in (None, 1):
            raise CpbenchError(f"Target {scenario.target!r} runs one layer, not {asked}.", "Leave --layers out, or use --target prefill.")
        scenario.layers = 1
        return
    if asked is None:
        scenario.layers = min(scenario.layers or 1, config.layers)
        notes.append(f"layers {scenario.layers} of {config.layers} (default on {scenario.device})")
    elif asked > config.layers:
        raise CpbenchError(f"{config.name} has {config.layers} layers, not {asked}.", f"The nearest valid value is --layers {config.layers}.")


def _submodel(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The group of fields behind a field, if it is one."""
    kind = model.model_fields[name].annotation
    kinds = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)


def _readable(error: ErrorDetails) -> CpbenchError:
    """pydantic's first complaint as one sentence and the nearest valid value."""
    names = [str(part) for part in error["loc"] if isinstance(part, str)]
    where = ".".join(names) or "scenario"
    context = error.get("ctx", {})
    value = str(error["input"])[:40]
    if error["type"] == "extra_forbidden":
        model: type[BaseModel] = Scenario
        for name in names[:-1]:
            model = _submodel(model, name) or model
        return unknown("scenario field", where, [".".join([*names[:-1], field]) for field in model.model_fields])
    if error["type"] == "literal_error":
        return unknown(where, value, re.findall(r"'([^']*)'", str(context["expected"])))
    if error["type"] == "cpbench":
        return CpbenchError(f"{where}: {context['message']}", str(context["hint"]))
    if error["type"] == "too_short":
        return CpbenchError(f"{where}: the list is empty.", "Give at least one value, or leave the field out.")
    if error["type"] == "string_pattern_mismatch":
        return CpbenchError(f"{where}: {value!r} is not a file name.", "Use letters, digits, dots, hyphens and underscores, at most 80.")
    for bound, words in (("ge", "at least"), ("le", "at most"), ("gt", "more than"), ("lt", "less than")):
        if bound in context:
            hint = f"The nearest valid value is {context[bound]}." if bound in ("ge", "le") else f"It must be {words} {context[bound]}."
            return CpbenchError(f"{where}: {value} is not possible: it must be {words} {context[bound]}.", hint)
    kind = {"int": "a whole number", "float": "a number", "bool": "true or false", "list": "a list", "string": "text", "model": "a group of fields"}
    for prefix, words in kind.items():
        if error["type"].startswith(prefix) and error["type"].endswith(("_type", "_parsing", "_from_float")):
            return CpbenchError(f"{where}: {value!r} is not {words}.", f"Write {words}.")
    return CpbenchError(f"{where}: {value!r} is not valid: {error['msg']}.", "See scenarios/README.md for the fields.")


if __name__ == "__main__":
    import json
    import sys

    sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
