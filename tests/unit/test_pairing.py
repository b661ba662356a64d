"""Which cells two variants are, and what is refused with a sentence."""

from __future__ import annotations

from typing import Any

import pytest

from cpbench.errors import CpbenchError
from cpbench.plan import Plan
from cpbench.scenario import parse_scenario, resolve
from tests.unit.fakes import CPU, made


def planned(a: str, b: str, **fields: Any) -> Plan:
    return made(ab=[a, b], **fields)[1]


def labels(plan: Plan) -> list[tuple[str, str]]:
    return [(pair.a.label, pair.b.label) for pair in plan.pairs]


def test_cells_of_both_sides_are_joined_by_what_else_is_equal() -> None:
    plan = planned("strategy=ring", "strategy=allgather", seq="256,512")
    assert [one.cell.label for one in plan.cells] == [
        *("cp1 none 256", "cp1 none 512", "cp2 ring 256", "cp2 ring 512", "cp2 allgather 256", "cp2 allgather 512")
    ]
    assert labels(plan) == [("cp2 ring 256", "cp2 allgather 256"), ("cp2 ring 512", "cp2 allgather 512")]
    assert plan.pairs[0].settings == ("strategy=ring", "strategy=allgather")


def test_what_both_sides_have_is_measured_once_and_alone() -> None:
    plan = planned("head_groups=1", "head_groups=2", strategies="ring,allgather")
    assert [(pair.a.head_groups, pair.b.head_groups, pair.a.strategy) for pair in plan.pairs] == [(1, 2, "allgather")]
    assert [len(together) for together in plan.together(plan.cells)] == [1, 1, 2]


def test_several_settings_of_a_side_and_layouts_instead_of_degrees() -> None:
    plan = planned("strategy=ring", "strategy=ring partition=contiguous")
    assert [(pair.a.partition, pair.b.partition) for pair in plan.pairs] == [("zigzag", "contiguous")]
    assert labels(planned("strategies=u2r2", "strategies=ring", cp="4")) == [("cp4u2 usp 256", "cp4 ring 256")]
    assert labels(planned("layouts=cp4", "layouts=cp2tp2", strategies="ring", cp=None)) == [("cp4 ring 256", "cp2tp2 ring 256")]


def test_pairs_stay_together_in_any_order_a_first() -> None:
    plan = planned("dtype=float32", "dtype=bfloat16", strategies="ring")
    shuffled = list(reversed(plan.cells))
    assert [[one.cell.dtype for one in together] for together in plan.together(shuffled)] == [["float32", "bfloat16"]] * 2
    assert [len(together) for together in plan.together(shuffled[:1])] == [1]


def test_a_variant_that_cannot_run_is_a_row_and_the_other_runs_alone() -> None:
    plan = planned("model=qwen3-tiny", "model=qwen3-0.6b", cp="2,16", strategies="ring,ulysses", baseline=False)
    assert len(plan.pairs) == 4
    assert [(one.cell.label, one.cell.config.name) for one in plan.cells if one.status] == [("cp16 ulysses 256", "qwen3-tiny")]
    assert sorted(len(together) for together in plan.together(plan.runnable)) == [1, 2, 2, 2]


def test_the_scenarios_own_strategies_are_not_said_to_be_a_default() -> None:
    fields = {"seq": "256", "cp": "2", "ab": ["strategy=ring", "strategy=allgather"]}
    notes = resolve(parse_scenario(fields), CPU)[1]
    assert not any("strategies" in note for note in notes)
    assert any("strategies" in note for note in resolve(parse_scenario({**fields, "ab": ["kernel=auto", "strategy=allgather"]}), CPU)[1])


@pytest.mark.parametrize(
    ("a", "b", "message", "hint"),
    [
        ("strategy=ring", "strategy=ring", "ab: strategy=ring and strategy=ring give the same cells.", "Give each variant another value of a field"),
        ("cp=2", "cp=4", "ab: cp2 is of 2 ranks and cp4 of 4, and variants alternate in one group of ranks.", "The nearest is a layout of 2 ranks for both."),
        (
            "strategy=ring",
            "strategy=ring,allgather",
            "strategy=ring gives 0 cells that the other does not, strategy=ring,allgather 1 cell.",
            "one value for each",
        ),
        ("strategy=ring", "threads=1", "ab: threads is not of a cell, so that both variants have the same.", "set it for both: --set threads=1."),
        ("strategy=ring", "timing.precision=1%", "ab: timing.precision is not of a cell", "--set timing.precision=1%"),
        ("strategy=ring", "allgather", "ab: 'allgather' is not a setting.", "Write field=value"),
        ("strategy=ring", "strategy=", "ab: 'strategy=' is not a setting.", "Write field=value"),
        ("strategy=ring", " ", "ab: ' ' is not a setting.", "Write field=value"),
        ("strategy=ring", "strategy=rnig", "Unknown strategy 'rnig'.", "Did you mean 'ring'?"),
        ("strategy=ring", "kernell=auto", "Unknown scenario field 'kernell'.", "Did you mean 'kernel'?"),
        ("strategy=ring", "strategy=ulysses", "8 query heads per tensor-parallel rank do not divide over cp=3.", "The nearest degree is cp=2."),
    ],
)
def test_what_is_refused(a: str, b: str, message: str, hint: str) -> None:
    with pytest.raises(CpbenchError) as caught:
        planned(a, b, cp="3" if "ulysses" in b else "2")
    assert message in caught.value.message and hint in caught.value.hint


@pytest.mark.parametrize("ab", [["strategy=ring"], ["a=1", "b=2", "c=3"], "strategy=ring"])
def test_two_variants_it_must_be(ab: Any) -> None:
    with pytest.raises(CpbenchError, match="ab"):
        parse_scenario({"ab": ab})
