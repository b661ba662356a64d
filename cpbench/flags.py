"""From flags to the fields of a scenario, for the commands that measure: which flag is which field, and a command that has another one's flags.

What the flags are called and say is in options.py; what the fields mean is in scenario.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any

from cpbench.batch import flag_batches

AXES = {name: name for name in ("seq", "batch", "prefix", "cp", "tp", "dp", "pp", "ep", "layouts", "gpus")} | {"strategy": "strategies"}
FLAG_OF = {field: name for name, field in AXES.items() if name != field} | {"batches": "lengths"}  # where a field's flag has another name
FIELDS = ("partition", "model", "target", "chunk", "layers", "dtype", "quant", "router", "seed", "experts", "weights", "prompt", "threads", "rounds", "ab")
SWITCHES = ("pair", "deterministic")
LIMITS = {"budget": "budget", "cell_timeout": "cell_timeout", "memory_limit": "memory"}


def fields_of(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The scenario fields that flags say, by the names of the command's parameters; those that were left out are None or False."""
    lengths, prefix = flags.get("lengths"), flags.get("prefix")
    fields: dict[str, Any] = {field: ",".join(flags[name]) for name, field in AXES.items() if flags.get(name) and not (lengths and name == "prefix")}
    fields |= {name: flags[name] for name in FIELDS if flags.get(name) is not None}
    fields |= {name: True for name in SWITCHES if flags.get(name)}
    return fields | ({"batches": flag_batches(lengths, prefix or [])} if lengths else {})


def limits_of(flags: Mapping[str, Any]) -> dict[str, str]:
    """The limits that flags say."""
    return {field: flags[name] for name, field in LIMITS.items() if flags.get(name) is not None}


def with_flags_of(command: Callable[..., int], leave_out: Collection[str]) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Give a command with `**flags` the parameters of another one, but for some, before its own."""

    def decorate(function: Callable[..., int]) -> Callable[..., int]:
        taken = [one for name, one in inspect.signature(command, eval_str=True).parameters.items() if name not in leave_out]
        own = [one for one in inspect.signature(function, eval_str=True).parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in [*taken, *own]]
        function.__signature__ = inspect.Signature(parameters, return_annotation=int)  # type: ignore[attr-defined]
        function.__annotations__ = {one.name: one.annotation for one in parameters} | {"return": int}
        return function

    return decorate
