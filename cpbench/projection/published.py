"""Results that others published, as data: what projections are held against, and never fitted to.

A study is one JSON file in `studies/`: where it is from, what is known and what is not known of how it was measured, the machines, and a row
for each number as it was printed. This module reads and checks them; what a projection makes of a row is decided elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cpbench.cell import Cell
from cpbench.errors import UNREADABLE, CpbenchError, unknown
from cpbench.layout import Layout
from cpbench.models.presets import PRESETS
from cpbench.plan import unsupported
from cpbench.projection.named_files import NamedFiles
from cpbench.projection.profile import profile_names
from cpbench.strategies import STRATEGIES

SCHEMA = "cpbench.study"
MAX_BYTES = 1 << 20
HINT = "Compare it with the files of cpbench/projection/studies."
Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[float, Field(gt=0)]
TIMES: dict[str, Callable[[float], float]] = {"iterations/s": lambda value: 1 / value, "ms": lambda value: value / 1e3, "s": lambda value: value}


class _Model(BaseModel):
    """Nothing unknown in it, and no number that is not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Machine(_Model):
    """What a study ran on: the profile that is nearest to it, and what of it is not as that profile says.

    `flops` are FLOP/s in the dtype of the study, `network_bytes_per_s` is the line rate of one GPU.
    """

    device: Text
    gpus_per_node: Annotated[int, Field(gt=0)]
    title: Text
    flops: Positive | None = None
    memory_bytes_per_s: Positive | None = None
    memory_bytes: Positive | None = None
    network_bytes_per_s: Positive | None = None


class Row(_Model):
    """One published number. Of a change in % or GB, `baseline` is the layout that it is against.

    `is_rate`: attention on one device, which says how fast that device is, and is not predicted.
    """

    table: Text
    machine: Text
    model: Text
    layout: Text
    strategy: Text
    partition: Text
    tokens: Annotated[int, Field(gt=0)]
    value: float
    unit: Literal["iterations/s", "ms", "s", "%", "GB"]
    baseline: str | None = None
    note: str = ""
    is_rate: bool = False

    @model_validator(mode="after")
    def _is_a_time_or_a_change(self) -> Row:
        if (self.unit in TIMES) != (self.baseline is None):
            raise ValueError("a time has no baseline, and a change has one")
        if self.unit in TIMES and self.value <= 0:
            raise ValueError("a time is more than 0")
        if self.is_rate and (self.unit not in TIMES or self.layout != "cp1"):
            raise ValueError("a rate is a time of cp1")
        return self

    @property
    def seconds(self) -> float | None:
        """The time of one pass; None where only a change was published."""
        return TIMES[self.unit](self.value) if self.unit in TIMES else None

    @property
    def change(self) -> float | None:
        """The change of the time as a part of the baseline's: -0.1 for 10% less; None where something else was published."""
        return self.value / 100 if self.unit == "%" else None


class Study(_Model):
    """One publication. What cpbench has no cell for is in `known`, in words. `in_8_bits`: products whose operands have one byte per value."""

    schema_name: Literal["cpbench.study"] = Field(alias="schema")
    title: Text
    source: Text
    target: Literal["prefill", "layer", "attention"]
    dtype: Literal["bfloat16", "float16", "float32"]
    in_8_bits: Literal["none", "feed-forward", "all"] = "none"
    known: Annotated[tuple[Text, ...], Field(min_length=1)]
    unknown: Annotated[tuple[Text, ...], Field(min_length=1)]
    machines: Mapping[str, Machine]
    rows: Annotated[tuple[Row, ...], Field(min_length=1)]

    def rate(self, row: Row) -> Row | None:
        """The row that says how fast one device of a row's machine attends."""
        return next((other for other in self.rows if other.is_rate and other.machine == row.machine), None)

    def machine(self, row: Row) -> Machine:
        """What a row was measured on."""
        return self.machines[row.machine]

    def cell(self, row: Row) -> Cell:
        """The cell of a row; its kernel is whichever fits. Raises CpbenchError for a name that cpbench does not know."""
        return self._cell(row, row.layout)

    def baseline(self, row: Row) -> Cell | None:
        """The cell that a change is against."""
        return None if row.baseline is None else self._cell(row, row.baseline)

    def _cell(self, row: Row, layout: str) -> Cell:
        if row.model not in PRESETS:
            raise unknown("model", row.model, PRESETS)
        if row.strategy not in STRATEGIES:
            raise unknown("strategy", row.strategy, STRATEGIES)
        config = PRESETS[row.model]
        layers = config.layers if self.target == "prefill" else 1
        return Cell(self.target, config, layers, Layout.parse(layout), row.strategy, row.partition, "auto", self.dtype, "cuda", (row.tokens,))


_STUDIES = NamedFiles("studies", "study", "study", SCHEMA, Study, MAX_BYTES, HINT)


def study_names() -> list[str]:
    """The studies that cpbench has."""
    return _STUDIES.names()


def load_study(name_or_path: str | Path) -> Study:
    """A study by name, or from a file (anything with a slash or .json at its end).

    Raises CpbenchError: an unknown name (exit code 2), a file that cannot be read or whose rows are no cells of cpbench (exit code 4).
    """
    study = _STUDIES.load(name_or_path)
    for number, row in enumerate(study.rows):
        if wrong := _wrong(study, row):
            raise CpbenchError(f"The study {name_or_path} is wrong in row {number}: {wrong}", HINT, UNREADABLE)
    return study


def _wrong(study: Study, row: Row) -> str | None:
    """Why a row is nothing that cpbench could project; None if it is."""
    if row.machine not in study.machines:
        return f"it has no machine {row.machine!r}."
    device = study.machine(row).device
    try:
        if device not in profile_names():
            raise unknown("device", device, profile_names())
        reasons = [unsupported(cell) for cell in (study.cell(row), study.baseline(row)) if cell]
    except CpbenchError as error:
        return error.message
    return next((f"{reason}." for reason in reasons if reason), None)
