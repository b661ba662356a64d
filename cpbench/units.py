"""Sizes, durations and percentages as people type them and as tables print them.

One table of suffixes for everything. Lengths are binary (36k is 36 x 1024), because sequence lengths and buffer sizes are;
plain integers are exact. Files hold plain numbers: nothing here is needed to read them.
"""

from __future__ import annotations

import re
from fractions import Fraction

from cpbench.errors import CpbenchError

COUNT_SUFFIXES = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3}
SECOND_SUFFIXES = {"": 1.0, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
_NUMBER = re.compile(r"^(\d[\d_]*(?:\.\d+)?|\.\d+)\s*([a-z%]*)$")
_MAX_COUNT = 2**53  # a JSON reader may hold numbers as doubles


def _split(text: str, what: str, hint: str) -> tuple[str, str]:
    found = _NUMBER.match(str(text).strip().lower())
    if found is None or len(text) > 40:
        raise CpbenchError(f"{text[:40]!r} is not a {what}.", hint)
    return found[1].replace("_", ""), found[2]


def parse_count(text: str | int) -> int:
    """`36k` -> 36864, `1M` -> 1048576, `36_000` -> 36000. Raises CpbenchError for anything that is not a whole number."""
    return _whole(text, "length", "Write a whole number with an optional suffix k, M or G (binary): 36k = 36,864, 1M = 1,048,576, 36000 = 36,000.")


def parse_bytes(text: str | int) -> int:
    """`512M` -> 536870912, `8G`, `1.5GiB`; a plain number is bytes. Raises CpbenchError for anything that is not a whole number of bytes."""
    return _whole(text, "size", "Write bytes with an optional suffix k, M or G (binary): 512M, 8G, 1.5GiB.")


def _whole(text: str | int, what: str, hint: str) -> int:
    number, suffix = _split(str(text), what, hint)
    suffix = suffix.removesuffix("ib").removesuffix("b") if suffix not in COUNT_SUFFIXES else suffix
    if suffix not in COUNT_SUFFIXES:
        raise CpbenchError(f"{text!r} has the unknown suffix {suffix!r}.", hint)
    value = Fraction(number) * COUNT_SUFFIXES[suffix]
    if value.denominator != 1:
        raise CpbenchError(f"{text!r} is not a whole number: it is {float(value)}.", hint)
    if value > _MAX_COUNT:
        raise CpbenchError(f"{text!r} is larger than 2^53.", hint)
    return int(value)


def parse_seconds(text: str | int | float) -> float:
    """`20m` -> 1200.0, `90s`, `1.5h`, `250ms`; a plain number is seconds."""
    hint = "Write a number with an optional unit: 90s, 20m, 1.5h, 250ms."
    number, suffix = _split(str(text), "duration", hint)
    if suffix not in SECOND_SUFFIXES:
        raise CpbenchError(f"{text!r} has the unknown unit {suffix!r}.", hint)
    return float(number) * SECOND_SUFFIXES[suffix]


def parse_fraction(text: str | float) -> float:
    """`2%` -> 0.02; a plain number is the fraction itself. Raises CpbenchError outside [0, 1]."""
    hint = "Write a percentage such as 2%, or a fraction such as 0.02."
    plain = f"{text:.12f}" if isinstance(text, float) else str(text)  # a small float would be written as 1e-05
    number, suffix = _split(plain, "percentage", hint)
    if suffix not in ("", "%"):
        raise CpbenchError(f"{text!r} has the unknown unit {suffix!r}.", hint)
    value = float(number) / (100.0 if suffix == "%" else 1.0)
    if not 0.0 <= value <= 1.0:
        raise CpbenchError(f"{text!r} is outside 0% to 100%.", hint)
    return value


def format_count(value: int) -> str:
    """36864 -> `36k`, 1048576 -> `1M`; a number that no suffix divides stays as it is, `36000`."""
    for suffix, factor in (("G", 1024**3), ("M", 1024**2), ("k", 1024)):
        if value >= factor and value % factor == 0:
            return f"{value // factor}{suffix}"
    return str(value)


def format_tokens(value: int) -> str:
    """A count that was found and not chosen, to three significant digits: 103424 -> `101k`, 1310720 -> `1.25M`; small ones as they are."""
    for suffix, factor in (("M", 1024**2), ("k", 1024)):
        if value >= factor:
            return f"{_significant(value / factor)}{suffix}"
    return str(value)


def format_bytes(value: float | None) -> str:
    """Three significant digits with a binary unit: `268 MiB`; None -> `-`."""
    if value is None:
        return "-"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1000 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} B" if unit == "B" else f"{_significant(value)} {unit}"


def format_seconds(value: float | None) -> str:
    """Three significant digits with the unit that reads best: `4.53 s`, `21.4 ms`, `310 us`; minutes from 2 min on."""
    if value is None:
        return "-"
    if value >= 120:
        minutes, seconds = divmod(round(value), 60)
        return f"{minutes // 60}h{minutes % 60:02d}" if minutes >= 120 else f"{minutes}m{seconds:02d}"
    for unit, factor in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= factor * 0.9995 or unit == "us":
            return f"{_significant(value / factor)} {unit}"
    raise AssertionError("unreachable: the last unit always returns")


def _significant(value: float) -> str:
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{digits}f}"
