"""What to measure: the scenario file, its fields, overrides, and the defaults that the machine decides.

A scenario is YAML; command-line flags and `--set a.b=c` override it; environment variables configure nothing. The models below check
every field and name the nearest valid value. What a field gets that was left out is in defaults.py as far as it depends on other fields. Which
cells come out of a scenario, and which of them can run, is decided in plan.py.
`python -m cpbench.scenario` prints the JSON Schema that is committed as scenarios/schema.json.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cpbench.batch import Batch
from cpbench.defaults import check_names, echo_sizes, expand_strategies, fit_layers, fit_pages
from cpbench.errors import CpbenchError, unknown
from cpbench.experts import TRAINED, RouterRule
from cpbench.fields import (
    LIST,
    MAX_BATCH,
    BatchSize,
    Cached,
    Degree,
    LayoutName,
    Ratio,
    Seconds,
    Size,
    Tokens,
    Whole,
    group_of_fields,
    readable,
    refuse,
    settings_of,
)
from cpbench.units import format_count, format_seconds

if TYPE_CHECKING:
    from cpbench.environment import Machine

DEVICE_DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"model": "qwen3-tiny", "layers": 1, "dtype": "float32"},
    "cuda": {"model": "qwen3-8b", "layers": 4, "dtype": "bfloat16", "page_size": 256},  # as a server's cache; flash kernels read such pages in place
}
BATCH_DEFAULTS: dict[str, Any] = {"seq": [36 * 1024], "batch": [1], "prefix": [0]}
DEGREES = ("cp", "tp", "dp", "pp", "ep")
DEGREE_DEFAULTS: dict[str, Any] = {name: [1] for name in DEGREES}
COMMON_DEFAULTS: dict[str, Any] = {"strategies": ["allgather", "ring", "ulysses"]}
NO_NOTE = ("batch", "prefix", *DEGREES[1:], "seq", "layers")  # defaults that go without saying, or that are said in other words
LAYOUTS = (("layouts",), ("gpus",), DEGREES)  # three ways to say which layouts, of which a scenario has one
AXES = ("seq", "batch", "prefix", "batches", *DEGREES, "layouts", "gpus")  # lists that are crossed or paired
EXTENDS = "extends"  # in files alone: the scenario that has the fields which a file leaves out (scenario_files.py)


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
            refuse(f"max_samples = {self.max_samples} is below min_samples = {self.min_samples}.", f"Set max_samples to at least {self.min_samples}.")
        return self


class Limits(_Model):
    """What a sweep may cost."""

    cell_timeout: Seconds = Field(600.0, description="a cell that takes longer in one round gets the status timeout")
    budget: Seconds | None = Field(None, description="cells that do not fit into this time are skipped")
    memory: Size | None = Field(None, description="bytes that a rank may have; on CPU live tensors are held against it in the pass that measures memory")
    start_timeout: Seconds = Field(120.0, description="time for the processes of a world size to come up")


class BatchFields(_Model):
    """One batch: the new and the cached tokens of each sequence."""

    lengths: Annotated[list[Tokens], LIST] = Field(min_length=1, max_length=MAX_BATCH, description="new tokens of each sequence")
    prefixes: Annotated[list[Cached], LIST] = Field([0], min_length=1, description="cached tokens of each sequence, or one number for all")

    @model_validator(mode="after")
    def _pairs_up(self) -> BatchFields:
        if len(self.prefixes) == 1:
            self.prefixes = self.prefixes * len(self.lengths)
        sequences, prefixes = len(self.lengths), len(self.prefixes)
        if sequences != prefixes:
            nearest = [format_count(prefix) for prefix in [*self.prefixes, *[0] * sequences][:sequences]]
            hint = f"Give each sequence its own, for example {','.join(nearest)}, or one number for all."
            refuse(f"{sequences} {'length' if sequences == 1 else 'lengths'} and {prefixes} prefixes do not pair up.", hint)
        return self

    @property
    def batch(self) -> Batch:
        return Batch(tuple(self.lengths), tuple(self.prefixes))


class Scenario(_Model):
    """A sweep: the axes seq x batch x prefix (or batches) x cp x tp x dp x pp x ep (or layouts, or gpus) x strategies, and what holds for all cells.

    A field left out gets a default.
    """

    name: str = Field("sweep", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,79}$", description="names the result file")
    target: Literal["prefill", "layer", "attention"] = Field("prefill", description="prefill: time to first token; layer: one decoder layer; attention alone")
    model: str | None = Field(None, description="a preset (cpbench list models) or the path of a Hugging Face config.json")
    experts: Whole | None = Field(None, ge=1, description="experts per layer instead of the model's own number, so that a layer fits into less memory")
    weights: str | None = Field(None, description="a folder with config.json and *.safetensors, instead of a model with random weights")
    prompt: str | None = Field(None, description="a text file as the one sequence of the batch, in the tokens of the weights' tokenizer.json")
    layers: Whole | None = Field(None, ge=1, description="decoder layers to run, at most those of the model")
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    seq: Annotated[list[Tokens], LIST] | None = Field(None, min_length=1, description="new tokens per sequence: 36k = 36864")
    batch: Annotated[list[BatchSize], LIST] | None = Field(None, min_length=1, description="sequences per batch")
    prefix: Annotated[list[Cached], LIST] | None = Field(None, min_length=1, description="cached tokens before the new ones of every sequence")
    batches: list[BatchFields] | None = Field(None, min_length=1, description="batches one by one, instead of seq, batch and prefix")
    cp: Annotated[list[Degree], LIST] | None = Field(None, min_length=1, description="context-parallel degrees")
    tp: Annotated[list[Degree], LIST] | None = Field(None, min_length=1, description="tensor-parallel degrees")
    dp: Annotated[list[Degree], LIST] | None = Field(None, min_length=1, description="attention data-parallel degrees: groups that share out the sequences")
    pp: Annotated[list[Degree], LIST] | None = Field(None, min_length=1, description="pipeline stages that share out the layers")
    ep: Annotated[list[Degree], LIST] | None = Field(None, min_length=1, description="expert-parallel degrees; they divide the ranks of a stage")
    layouts: Annotated[list[LayoutName], LIST] | None = Field(None, min_length=1, description="layouts by name, instead of degrees: tp8, cp8u4, pp2cp4")
    gpus: Annotated[list[Degree], LIST] | None = Field(None, min_length=1, description="every layout of so many ranks, instead of degrees")
    strategies: Annotated[list[str], LIST] | None = Field(None, min_length=1, description="context-parallel algorithms (cpbench list strategies), u4r2, or all")
    pair: bool = Field(False, description="pair the lists (all but strategies) that have several values, instead of crossing them")
    partition: str | None = Field(None, description="which tokens a rank holds (cpbench list partitions); null: what each strategy prefers")
    kernel: str = Field("auto", description="attention on one device (cpbench list kernels)")
    baseline: bool = Field(True, description="also measure cp=1, from which speed-up and efficiency are computed")
    kv_cache: Literal["keep", "drop"] = Field("keep", description="keep every layer's K and V as a server does, or drop them")
    chunk: Tokens | None = Field(None, description="prefill in chunks of so many new tokens of each sequence")
    page_size: Tokens | None = Field(None, description="tokens per page of the K/V cache; null: 256 on CUDA, on CPU no pages unless something is cached")
    cache_tokens: Tokens | None = Field(None, description="capacity of the paged K/V cache of a rank in tokens; null: what the batch needs")
    head_groups: Whole = Field(1, ge=1, description="allgather: collectives per layer, each for a group of kv heads that hides behind the one before")
    compile: Literal["none", "eager", "inductor"] = Field("none", description="local-map: its attention by torch.compile; eager captures it and no more")
    mla: Literal["expanded", "absorbed"] = Field("expanded", description="latent attention: K and V of every head, or in the latent's width")
    router: str = Field(TRAINED, description="of models with experts: trained (the model's own), uniform, or zipf:1.2 for skewed load")
    dispatch: Literal["alltoall", "gather"] | None = Field(None, description="how rows reach experts; null: alltoall where the layout allows it")
    quant: Literal["none", "fp8"] = Field("none", description="projections: as dtype says, or W8A8 in FP8 e4m3 with scales per channel and token")
    sp_chunks: Whole = Field(1, ge=1, le=64, description="layouts with sp: pieces in which rows are gathered and scattered, each behind a product")
    sp_gather: Literal["hidden", "latent"] = Field("hidden", description="layouts with sp: gather hidden states, or what low-rank projections made of them")
    sp_fused: bool = Field(False, description="layouts with sp on CUDA: gather and scatter inside products (PyTorch's symmetric memory)")
    deterministic: bool = Field(False, description="sums and products in an order that gives every layout the same bits")
    seed: Whole = Field(0, ge=0, lt=2**31, description="of weights, token ids and the order of later rounds")
    rounds: Whole = Field(1, ge=1, le=1000, description="fresh passes over all cells; 4 or more for files that will be compared")
    ab: tuple[str, str] | None = Field(None, description="two variants whose passes alternate in one process group: field=value for each, e.g. strategy=ring")
    threads: Whole | None = Field(None, ge=1, le=4096, description="CPU threads per rank; null: cores // ranks")
    timing: Timing = Field(default_factory=Timing)
    limits: Limits = Field(default_factory=Limits)

    @model_validator(mode="after")
    def _consistent(self) -> Scenario:
        if self.weights and self.model not in (None, f"{self.weights}/config.json"):
            refuse("model and weights both say which model to measure.", "Leave model out: the config.json beside the weights says it.")
        if self.weights and self.experts:
            refuse("experts changes a model, and weights are those of the model as it is.", "Leave experts or weights out.")
        if self.weights and self.target == "attention":
            refuse("Target 'attention' has no weights to read.", "Leave weights out, or use --target prefill.")
        if self.quant != "none" and self.target == "attention":
            refuse("Target 'attention' has no linear layers to quantise.", "Leave quant out, or use --target prefill.")
        if self.prompt and (not self.weights or self.target != "prefill"):
            refuse("prompt is for a prefill with the weights of a checkpoint.", "Add --weights DIR, or leave prompt out.")
        said = next((name for name in BATCH_DEFAULTS if self.prompt and getattr(self, name) is not None), None)
        if said:
            refuse(f"{said} and prompt both describe the batch.", f"Leave {said} out: the prompt is one sequence of its own length.")
        clash = next((name for name in BATCH_DEFAULTS if getattr(self, name) is not None), None)
        if self.batches and clash:
            refuse(f"{clash} and batches (--lengths) both describe batches.", f"Leave {clash} out, or use seq, batch and prefix alone.")
        used = [(name, kind) for kind in LAYOUTS for name in kind if getattr(self, name) is not None]
        if len({kind for _, kind in used}) > 1:
            first, second = used[0][0], next(name for name, kind in used if kind != used[0][1])
            refuse(f"{first} and {second} both say which layouts to measure.", f"Leave {first} or {second} out; {', '.join(DEGREES)} go together.")
        several = {name: len(values) for name in AXES if (values := getattr(self, name)) and len(values) > 1}
        if self.pair and len(set(several.values())) > 1:
            sizes = ", ".join(f"{name} has {size} values" for name, size in several.items())
            refuse(f"Lists of different lengths do not pair up: {sizes}.", f"Give each {max(several.values())} values, or one that holds for all.")
        RouterRule.parse(self.router)
        if self.chunk and self.kv_cache == "drop":
            refuse("chunk needs the K/V cache: each chunk reads what the ones before it left.", "Set kv_cache=keep, or leave chunk out.")
        return self


def parse_scenario(data: dict[str, Any]) -> Scenario:
    """Check a mapping as YAML gives it. Raises CpbenchError that names the first wrong field and the nearest valid value."""
    try:
        try:
            return Scenario.model_validate(data)
        except ValidationError as error:
            raise readable(error.errors()[0], Scenario) from error
    except UnicodeEncodeError as error:
        raise CpbenchError(f"{str(error.object)[:40]!r} is not text: it holds half of a character.", "Write it in UTF-8.") from error


def load_scenario(path: str | Path) -> Scenario:
    """Read and check a scenario by path or by name. Raises CpbenchError."""
    return parse_scenario(read_yaml(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a scenario file, or in one that comes with cpbench by name, not checked yet. Raises CpbenchError."""
    from cpbench.scenario_files import read_file

    return read_file(path)


def without_replaced(data: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """What a file says, without the batches and the layouts that flags replace by those of another kind."""
    replaced = list(BATCH_DEFAULTS) if "batches" in flags else ["batches"] if "seq" in flags else []
    given = [kind for kind in LAYOUTS if any(name in flags for name in kind)]
    replaced += [name for kind in LAYOUTS for name in kind if given and kind not in given]
    return {name: value for name, value in data.items() if name not in replaced}


def override(data: dict[str, Any], setting: str) -> dict[str, Any]:
    """A copy of a scenario mapping with one `a.b=value` applied; the value is YAML. Raises CpbenchError for a field that does not exist."""
    from cpbench.yaml_input import parse_value

    path, equals, text = setting.partition("=")
    names = [name.strip() for name in path.split(".")]
    if not equals or not all(names):
        raise CpbenchError(f"{setting[:60]!r} is not a setting.", "Write field=value, for example timing.precision=1%.")
    if names[0] == EXTENDS:
        raise CpbenchError("extends is for scenario files.", "Use --scenario NAME for the scenario, and --set for single fields of it.")
    model: type[BaseModel] | None = Scenario
    for depth, name in enumerate(names):
        if model is None:
            raise CpbenchError(f"{'.'.join(names[:depth])} has no fields.", f"Set it directly: {'.'.join(names[:depth])}=VALUE.")
        if name not in model.model_fields:
            raise unknown("scenario field", ".".join(names[: depth + 1]), [".".join([*names[:depth], field]) for field in model.model_fields])
        model = group_of_fields(model, name)
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
    if scenario.weights:
        scenario = scenario.model_copy(update={"model": f"{scenario.weights}/config.json"})
    if scenario.prompt and scenario.weights:
        scenario = scenario.model_copy(update={"batches": [_prompt_batch(scenario.prompt, scenario.weights, scenario.batches)]})
    filled: dict[str, Any] = {"device": device}
    compared = set.intersection(*({name for name, _ in settings_of(text)} for text in scenario.ab)) if scenario.ab else set()
    notes = [] if scenario.device == device else [f"device {device}"]
    degrees = {} if scenario.layouts or scenario.gpus else DEGREE_DEFAULTS
    for field, default in {**DEVICE_DEFAULTS[device], **({} if scenario.batches else BATCH_DEFAULTS), **degrees, **COMMON_DEFAULTS}.items():
        if getattr(scenario, field) is None:
            filled[field] = copy.copy(default)
            if field not in (*NO_NOTE, *compared):
                shown = ", ".join(map(str, default)) if isinstance(default, list) else default
                notes.append(f"{field} {shown} (default on {device})" if field in DEVICE_DEFAULTS[device] else f"{field} {shown} (default)")
    result = scenario.model_copy(update=filled)
    check_names(result)
    expand_strategies(result, notes)
    fit_layers(result, scenario.layers, notes)
    fit_pages(result, notes)
    notes += echo_sizes(result, default=scenario.seq is None)
    if result.baseline and result.cp and 1 not in result.cp:
        notes.append("cp=1 added as the baseline")
    timing = result.timing
    if scenario.timing == Timing():
        seconds = format_seconds(timing.max_seconds)
        notes.append(f"{timing.min_samples} to {timing.max_samples} timed passes, {seconds} per cell unless {timing.min_samples} take longer (default)")
    return result, notes


def _prompt_batch(file: str, folder: str, batches: list[BatchFields] | None) -> BatchFields:
    """The batch that is a prompt; a scenario that was resolved has it already."""
    from cpbench.prompt import read_prompt

    batch = BatchFields(lengths=[len(read_prompt(folder, file))])
    if batches not in (None, [batch]):
        hint = "Leave --lengths out: the prompt is one sequence of its own length."
        raise CpbenchError(f"batches (--lengths) and the prompt of {batch.lengths[0]:,} tokens both describe the batch.", hint)
    return batch


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a scenario file, for editors."""
    schema = Scenario.model_json_schema()
    described = "a scenario by name (cpbench list scenarios), or by path from the folder of this file, that has the fields which are left out here"
    schema["properties"] = {EXTENDS: {"type": "string", "title": "Extends", "description": described}, **schema["properties"]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "cpbench scenario"}


if __name__ == "__main__":
    import json
    import sys

    sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
