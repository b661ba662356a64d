"""The command `compare`: read files, compare each with the first, print all of it, and only then say how it went.

What a comparison is, is in comparison.py; how it looks, in report/.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cpbench.comparison import REGRESSIONS, Comparison, compare
from cpbench.errors import unknown
from cpbench.frame import short_names
from cpbench.judging import Row
from cpbench.quantities import DEFAULT
from cpbench.reading import read, read_summary, without_collection
from cpbench.report import console
from cpbench.report.comparison import comparison_view, failure_line
from cpbench.report.comparison_export import comparison_csv, comparison_json, markdown
from cpbench.summary import Comparable
from cpbench.units import parse_fraction
from cpbench.verdicts import NOISE

FORMATS = ("text", "md", "json", "csv")


@dataclass(frozen=True)
class Question:
    """What the flags say; None for those that were left out."""

    metrics: list[str] | None
    by: str | None
    noise: str | None
    strict: bool
    across: list[str] | None


def compare_files(files: Sequence[Path], question: Question, fail_on: str | None, form: str, everything: bool) -> int:
    """Print the comparison of every file with the first. Raises CpbenchError afterwards where one had nothing to compare (exit code 3)."""
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    if fail_on is not None and fail_on not in REGRESSIONS:
        raise unknown("--fail-on", fail_on, REGRESSIONS)
    with without_collection():  # until all of it is gone again
        return _compare(files, question, fail_on, form, everything)


def _compare(files: Sequence[Path], question: Question, fail_on: str | None, form: str, everything: bool) -> int:
    comparisons = _compared(files, question)
    failed = [row for comparison in comparisons for row in comparison.failures(fail_on)] if fail_on else []
    _print(comparisons, failed, form, everything)
    for comparison in comparisons:
        comparison.require_comparable()
    return int(bool(failed))


def _compared(files: Sequence[Path], question: Question) -> list[Comparison]:
    names = short_names([str(file) for file in files]) if len(set(files)) == len(files) else tuple(map(str, files))
    results: list[Comparable] = [read_summary(file) if question.metrics is None else read(file) for file in files]
    across = [name.strip() for text in question.across or () for name in text.split(",")]
    noise = NOISE if question.noise is None else parse_fraction(question.noise)
    others: list[Comparable | None] = [*results[1:]] or [None]
    return [
        compare(
            results[0],
            new,
            metrics=question.metrics or DEFAULT,
            by=question.by,
            noise=noise,
            strict=question.strict,
            across=across,
            names=(names[0], name),
        )
        for new, name in zip(others, names[1:] or names, strict=True)
    ]


def _print(comparisons: Sequence[Comparison], failed: Sequence[Row], form: str, everything: bool) -> None:
    """The report; below it, or on stderr where a program reads it, what it fails for."""
    if form == "json":
        console.show_json(comparison_json(comparisons, failed))
    elif form == "csv":
        console.show_json(comparison_csv(comparisons))
    elif form == "md":
        console.show_json(markdown(comparisons, everything, failure_line(failed) if failed else None))
    else:
        out = console.output()
        for number, comparison in enumerate(comparisons):
            console.show(out, [*([""] if number else []), *comparison_view(comparison, out, everything)])
    if failed and form != "md":
        console.show(console.output() if form == "text" else console.messages(), [failure_line(failed)])
