"""Flags as scenario fields, and a command that has the flags of another."""

from __future__ import annotations

import inspect
from typing import Any

from cpbench.cli import profile, sweep
from cpbench.flags import fields_of, limits_of, with_flags_of
from cpbench.options import SWEEP_ONLY


def test_axes_become_comma_lists_and_what_was_left_out_is_no_field() -> None:
    given: dict[str, Any] = {"seq": ["1k", "2k,4k"], "strategy": ["ring"], "cp": None, "model": "qwen3-tiny", "dtype": None, "pair": False, "output": "x"}
    assert fields_of(given) == {"seq": "1k,2k,4k", "strategies": "ring", "model": "qwen3-tiny"}
    assert fields_of({"deterministic": True, "prefix": ["0", "32k"]}) == {"deterministic": True, "prefix": "0,32k"}


def test_prefixes_belong_to_the_lengths_if_there_are_any() -> None:
    assert fields_of({"lengths": ["5,6"], "prefix": ["1,2"]}) == {"batches": [{"lengths": "5,6", "prefixes": "1,2"}]}


def test_limits() -> None:
    assert limits_of({"budget": "20m", "cell_timeout": None, "seq": ["1k"]}) == {"budget": "20m"}


def test_a_command_takes_the_flags_of_another_before_its_own() -> None:
    def one(a: int = 1, b: str = "x") -> int:
        return a

    @with_flags_of(one, leave_out=["a"])
    def other(c: bool = False, **rest: Any) -> int:
        return len(rest)

    assert list(inspect.signature(other).parameters) == ["b", "c"]
    assert other(c=True, b="y") == 1


def test_profile_has_the_flags_of_sweep_but_for_those_of_several_cells() -> None:
    of_sweep, of_profile = (list(inspect.signature(command).parameters) for command in (sweep, profile))
    assert set(SWEEP_ONLY) < set(of_sweep)
    assert of_profile == [*(name for name in of_sweep if name not in SWEEP_ONLY), "nsys"]
