"""A result file read in half the time: only what a comparison of times and memory looks at becomes objects.

The rest of a cell (ranks, how time was split, other metrics) is parsed as JSON and passed over: its fields are not checked against the
schema. What is read is checked as in results.py. Whoever needs more reads a ResultFile.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, get_args

from pydantic import ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema, core_schema

from cpbench.results import ComparedCell, Metric, ResultFile, RunFile

TIMES = ("ttft_s", "layer_s", "attention_s")
PEAKS = ("peak_live_bytes", "peak_allocator_bytes")
UNMEASURED = ("derived", "projected")


@dataclass(frozen=True)
class Only:
    """Of a dictionary these entries, as far as they are there; the others do not become objects."""

    names: Iterable[str]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        value = handler.generate_schema(get_args(source)[1])
        fields = {name: core_schema.typed_dict_field(value, required=False) for name in self.names}
        return core_schema.typed_dict_schema(fields, extra_behavior="ignore")


COMPARED = (*TIMES, *(f"{kind}_{name}" for kind in UNMEASURED for name in (*TIMES, *PEAKS)))


class CellSummary(ComparedCell):
    """A cell with its time and its memory."""

    metrics: Annotated[dict[str, Metric], Only(COMPARED)] = Field(default_factory=dict)
    traffic: Annotated[dict[str, Any], Only(["bytes"])] = Field(default_factory=dict)

    model_config = ConfigDict(extra="ignore")


class ResultSummary(RunFile):
    """A run as far as its times and its memory are compared."""

    cells: list[CellSummary]


Comparable = ResultFile | ResultSummary
