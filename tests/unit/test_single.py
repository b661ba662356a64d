"""One cell, or the flags that make it one."""

from __future__ import annotations

from typing import Any

import pytest

from cpbench.errors import CpbenchError
from cpbench.single import require_one

from .fakes import made


def hint(**fields: Any) -> str:
    scenario, plan = made(baseline=False, **fields)
    with pytest.raises(CpbenchError) as caught:
        require_one(plan, scenario)
    assert caught.value.message.startswith("A profile is of one cell, and this describes ")
    return caught.value.hint


def test_one_cell_is_the_cell() -> None:
    scenario, plan = made(baseline=False, strategies="ring")
    assert require_one(plan, scenario).label == "cp2 ring 256"


@pytest.mark.parametrize(
    ("fields", "flags"),
    [
        ({}, "--strategy ring"),
        ({"strategies": "ring", "cp": "2,4"}, "--cp 2"),
        ({"cp": "1,2"}, "--cp 1"),
        ({"strategies": "ring", "seq": "256,512", "batch": "1,2"}, "--seq 256 --batch 1"),
        ({"strategies": "ring", "cp": None, "gpus": "2"}, "--layouts tp2"),
        ({"strategies": "ring", "seq": None, "batches": [{"lengths": "5,6", "prefixes": "1,2"}, {"lengths": "7"}]}, "--lengths 5,6 --prefix 1,2"),
    ],
)
def test_several_cells_are_narrowed_down_by_the_axes_that_have_several_values(fields: dict[str, Any], flags: str) -> None:
    assert hint(**fields) == f"Narrow it down: {flags}."


def test_several_rounds_and_cells_that_cannot_run_are_refused() -> None:
    with pytest.raises(CpbenchError, match=r"A profile is of one round\."):
        require_one(*reversed(made(baseline=False, strategies="ring", rounds=2)))
