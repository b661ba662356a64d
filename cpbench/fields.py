"""The kinds of values that a scenario's fields take, as people write them, and the sentence for a value that a field cannot have.

Lists are comma lists too, sizes and durations carry units, and `true` is no number. Which fields there are is decided in scenario.py.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterator
from typing import Annotated, Any, NoReturn, get_args

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema
from pydantic_core import ErrorDetails, PydanticCustomError

from cpbench.errors import CpbenchError, unknown
from cpbench.layout import MAX_RANKS, Layout
from cpbench.units import parse_bytes, parse_count, parse_fraction, parse_seconds

MAX_BATCH = 4096
MAX_LIST = 1 << 14  # values of a list; no plan has as many cells
FLAGS = {"strategy": "strategies"}  # flags that are called otherwise than their field


def refuse(message: str, hint: str) -> NoReturn:
    """What a validator raises so that `readable` returns exactly this."""
    raise PydanticCustomError("cpbench", "{message}", {"message": message, "hint": hint})


def _through(parse: Callable[[Any], Any]) -> BeforeValidator:
    """Use a parser of units.py as a validator, keeping its hint."""

    def convert(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            return value  # pydantic names the type
        if re.fullmatch(r"\s*-\d+\s*", str(value)):
            return int(value)  # the bound of the field names the nearest valid value
        try:
            return parse(value)
        except CpbenchError as error:
            refuse(error.message, error.hint)

    return BeforeValidator(convert)


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        refuse(f"{value} is not a whole number.", "Write a number.")
    return value


def _canonical(value: Any) -> Any:
    """The name of a layout as `str(layout)` writes it."""
    if not isinstance(value, str):
        return value  # pydantic names the type
    try:
        return str(Layout.parse(value.strip()))
    except CpbenchError as error:
        refuse(error.message, error.hint)


def _as_list(value: Any) -> Any:
    """`2,4` and `2` are lists too."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",") if part.strip()]
    if isinstance(value, list) and len(value) > MAX_LIST:
        refuse(f"the list has {len(value):,} values.", f"The nearest valid number is {MAX_LIST:,}.")
    return [value] if isinstance(value, int | float) else value


def _or_text(kind: str) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"type": kind}, {"type": "string"}]})


Whole = Annotated[int, BeforeValidator(_no_bool)]
Tokens = Annotated[int, BeforeValidator(_no_bool), _through(parse_count), Field(ge=1), _or_text("integer")]
Cached = Annotated[int, BeforeValidator(_no_bool), _through(parse_count), Field(ge=0), _or_text("integer")]
Seconds = Annotated[float, BeforeValidator(_no_bool), _through(parse_seconds), Field(gt=0), _or_text("number")]
Size = Annotated[int, BeforeValidator(_no_bool), _through(parse_bytes), Field(ge=1), _or_text("integer")]
Ratio = Annotated[float, BeforeValidator(_no_bool), _through(parse_fraction), Field(gt=0, lt=1), _or_text("number")]
Degree = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=MAX_RANKS)]
BatchSize = Annotated[int, BeforeValidator(_no_bool), Field(ge=1, le=MAX_BATCH)]
LayoutName = Annotated[str, BeforeValidator(_canonical)]
LIST = BeforeValidator(_as_list)


def settings_of(variant: str) -> list[tuple[str, str]]:
    """`strategy=ring head_groups=2` as fields with their values. Raises CpbenchError for what is none."""
    found = [part.partition("=") for part in variant.split()]
    wrong = next((f"{name}{equals}{value}" for name, equals, value in found if not (name and value)), None if found else variant)
    if wrong is not None:
        hint = "Write field=value for each variant, several separated by spaces: --ab strategy=ring 'strategy=allgather head_groups=2'."
        raise CpbenchError(f"ab: {wrong!r} is not a setting.", hint)
    return [(FLAGS.get(name, name), value) for name, _, value in found]


def group_of_fields(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The group of fields behind a field, if it is one."""
    kind = model.model_fields[name].annotation
    kinds = get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)


def readable(error: ErrorDetails, model: type[BaseModel]) -> CpbenchError:
    """pydantic's complaint about a `model` as one sentence and the nearest valid value."""
    names = [str(part) for part in error["loc"] if isinstance(part, str)]
    where = ".".join(names) or "scenario"
    context = error.get("ctx", {})
    value = str(error["input"])[:40]
    if error["type"] == "extra_forbidden":
        for name in names[:-1]:
            model = next(_models(model.model_fields[name].annotation), model)
        return unknown("scenario field", where, [".".join([*names[:-1], field]) for field in model.model_fields])
    if error["type"] == "literal_error":
        return unknown(where, value, re.findall(r"'([^']*)'", str(context["expected"])))
    if error["type"] == "cpbench":
        return CpbenchError(f"{where}: {context['message']}" if names else str(context["message"]), str(context["hint"]))
    if error["type"] == "missing":
        return CpbenchError(f"{where} is missing.", "Give it a value.")
    if error["type"] == "too_short":
        return CpbenchError(f"{where}: the list is empty.", "Give at least one value, or leave the field out.")
    if error["type"] == "too_long":
        return CpbenchError(f"{where}: the list has {context['actual_length']} values.", f"The nearest valid number is {context['max_length']}.")
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


def _models(kind: Any) -> Iterator[type[BaseModel]]:
    """Every group of fields in a type, those in lists included."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        yield kind
    for part in get_args(kind):
        yield from _models(part)
