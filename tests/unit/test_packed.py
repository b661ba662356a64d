"""Records stored as patterns come back as they were, whatever is alike in them."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from cpbench.report.packed import packed
from tests.cli.test_report import unpacked

LEAF = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.0, 1.0, 2.5])
RECORD = st.recursive(LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=8)


@given(st.lists(RECORD, max_size=6))
def test_records_come_back(records: list[object]) -> None:
    stored = json.loads(json.dumps(packed(records)))
    assert json.dumps(unpacked(stored)) == json.dumps(records)


def test_what_is_alike_is_stored_once() -> None:
    stored = packed([{"title": 7, "rows": [[1, 2]]}, {"title": 7, "rows": [[1, 3]]}, {"title": 7, "rows": []}])
    assert stored["patterns"] == [{"title": 7, "rows": [[1, ""]]}, {"title": 7, "rows": []}]
    assert stored["each"] == [[0, 2], [0, 3], [1]]
