"""Filters: what they keep, and that what does not parse is an error in one sentence and is never evaluated."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpbench.errors import USAGE, CpbenchError
from cpbench.where import MAX_DEPTH, MAX_TEXT, parse_where

ROW = {
    "strategy": "ulysses-gather",
    "layout": "cp2tp4/ep4tp2",
    "name": 'tp4sp "latent" and so on',
    "seq": 131072,
    "ttft_s": 0.25,
    "sp": True,
    "kernel": None,
    "ratio": float("nan"),
}


@pytest.mark.parametrize(
    "text",
    [
        "strategy==ulysses-gather",
        'strategy == "ulysses-gather"',
        "strategy!='ring' and seq>=128k",
        "seq==131_072",
        "seq<0.5M",
        "seq == 128KiB",
        "seq in (1k, 128k)",
        "layout in [cp2, cp2tp4/ep4tp2]",
        "name=='tp4sp \"latent\" and so on'",
        "ttft_s<=2.5e-1",
        "ttft_s > -1",
        "sp==true and not sp==no",
        "strategy==ring or seq>1 and not (seq<1 or seq<2)",
        "not not seq==128k",
        "kernel!=flash2 and not kernel==flash2",
        "not ratio<1 and not ratio>=1 and ratio!=1",
    ],
)
def test_kept(text: str) -> None:
    assert parse_where(text).keep(ROW)
    assert not parse_where(f"not ({text})").keep(ROW)


def test_and_binds_closer_than_or() -> None:
    where = parse_where("a==1 or b==1 and c==1")
    assert where.keep({"a": 1, "b": 0, "c": 0})
    assert not where.keep({"a": 0, "b": 1, "c": 0})
    assert where.names == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the end is where the name of a field"),
        ("seq", "one of == != < <= > >= in after 'seq'"),
        ("seq=1", "does not parse at '=1'"),
        ("seq>=", "where a value"),
        ("seq>=1 seq<2", "'seq' stands where and, or, or the end"),
        ("(seq>1", "the end is where )"),
        ("seq>1)", "')' stands"),
        ("seq in 1k", "where ( or [ after in"),
        ("seq in (1k", "where , or ) should be"),
        ("seq in (1k]", "']' stands"),
        ("strategy=='ring", "does not parse at"),
        ("__import__('os').system('true')", "'(' stands"),
        ("seq>1; import os", "does not parse at ';"),
        ("(" * (MAX_DEPTH + 2) + "seq>1" + ")" * (MAX_DEPTH + 2), "nested more than"),
        ("not " * (MAX_DEPTH + 2) + "seq>1", "nested more than"),
        ("s" * (MAX_TEXT + 1), "2,001 characters"),
    ],
)
def test_what_does_not_parse(text: str, message: str) -> None:
    with pytest.raises(CpbenchError) as caught:
        parse_where(text)
    assert message in caught.value.message
    assert (caught.value.exit_code, "\n" in caught.value.message) == (USAGE, False)
    assert "strategy==ring and seq>=128k" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("stratgy==ring", "Unknown field 'stratgy'", "'strategy'"),
        ("seq>=long", "seq is a number, and 'long' is none", "seq>=128k"),
        ("seq==ring", "seq is a number", "seq>=128k"),
        ("strategy<ring", "strategy has no order", "strategy==ulysses-gather"),
        ("sp>0", "sp has no order", "sp==True"),
        ("sp==maybe", "sp is true or false, and not 'maybe'", "sp==true"),
    ],
)
def test_what_does_not_fit_the_fields(text: str, message: str, hint: str) -> None:
    with pytest.raises(CpbenchError) as caught:
        parse_where(text).keep(ROW)
    assert message in caught.value.message
    assert hint in caught.value.hint


def test_fields_that_no_row_reaches_are_required_too() -> None:
    where = parse_where("seq>1 or stratgy==ring")
    assert where.keep(ROW)
    with pytest.raises(CpbenchError, match="'stratgy'"):
        where.require(ROW)


@given(st.text("=!<>()[],'\" andortisequ128k.", max_size=40) | st.text(max_size=40))
def test_any_text_parses_or_is_an_error(text: str) -> None:
    try:
        assert parse_where(text).names
    except CpbenchError as error:
        assert "\n" not in error.message.replace(repr(text), "")
