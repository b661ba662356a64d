"""Records that are alike, stored once as a pattern, and of each what is its own: a page of a thousand cells has a handful of patterns.

Pure data in and out. Records are nested lists and objects whose leaves are numbers, true, false or null; page.js fills the patterns again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

OWN = ""  # in a pattern, where each record has a value of its own: no leaf is a text


def packed(records: Sequence[Any]) -> dict[str, list[Any]]:
    """`patterns`, and for each record in `each` the number of its pattern and its own values, in the order of the pattern."""
    alike: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        alike.setdefault(json.dumps(_filled(record, iter(lambda: OWN, None))), []).append(index)
    patterns: list[Any] = []
    each: list[list[Any]] = [[] for _ in records]
    for members in alike.values():
        values = [list(_leaves(records[index])) for index in members]
        shared = [
            all(value is column[0] or (value == column[0] and type(value) is type(column[0])) for value in column) for column in zip(*values, strict=True)
        ]
        pattern = [value if is_shared else OWN for value, is_shared in zip(values[0], shared, strict=True)]
        for index, own in zip(members, values, strict=True):
            each[index] = [len(patterns), *(value for value, is_shared in zip(own, shared, strict=True) if not is_shared)]
        patterns.append(_filled(records[members[0]], iter(pattern)))
    return {"patterns": patterns, "each": each}


def _is_one(column: Sequence[Any]) -> bool:
    """All are the same, 1 and true and 1.0 apart."""
    return len({(type(value), value) for value in column}) == 1


def _leaves(record: Any) -> Iterator[Any]:
    if isinstance(record, dict | list):
        for part in record.values() if isinstance(record, dict) else record:
            yield from _leaves(part)
    else:
        yield record


def _filled(record: Any, values: Iterator[Any]) -> Any:
    """The record with other leaves."""
    if isinstance(record, dict):
        return {name: _filled(part, values) for name, part in record.items()}
    return [_filled(part, values) for part in record] if isinstance(record, list) else next(values)
