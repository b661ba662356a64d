"""The texts of a page, each stored once: what is shown refers to them by number. A page of a thousand cells repeats most of what it says.

Files are untrusted: characters that do not print, or that turn others around, are replaced, and a text has an end. What a text is for is
decided in sections.py and drawer.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from cpbench.report.console import plain

MAX_TEXT = 2000  # characters
MAX_ROWS = 64  # of a table in a drawer


class Texts:
    """Texts in the order in which they were first needed; calling it with one gives its number."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def __call__(self, text: object) -> int:
        shown = str(text)
        if (known := self._numbers.get(shown)) is not None:
            return known
        shown = shown if len(shown) <= MAX_TEXT else f"{shown[:MAX_TEXT]}..."
        return self._numbers.setdefault(plain(shown).plain, len(self._numbers))

    @property
    def all(self) -> list[str]:
        return list(self._numbers)

    def line(self, items: Iterable[object]) -> list[int]:
        return [self(item) for item in items]

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]], left: int = 1, most: int = MAX_ROWS) -> dict[str, Any]:
        """A table whose first `left` columns are texts and the others numbers. Of many rows the first, and how many more there are."""
        made: dict[str, Any] = {"head": self.line(head), "left": left, "rows": [self.line(row) for row in rows[:most]]}
        if len(rows) > most:
            made["more"] = self(f"and {len(rows) - most:,} more")
        return made


def number(value: float | None, digits: int = 6) -> float | int | None:
    """A value as short as it may be stored: rows are sorted by it and bars drawn from it, and the text beside it is what is read."""
    if value is None or isinstance(value, int):
        return value
    if not math.isfinite(value):  # of a file that was edited
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 2**53 else short
