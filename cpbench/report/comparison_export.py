"""A comparison as Markdown for a pull request, as JSON, and as CSV. Markup in texts from files is taken apart, so that it is shown and not obeyed."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from pydantic_core import to_json

from cpbench.comparison import COLUMNS, Comparison, values_of
from cpbench.judging import Row
from cpbench.report.comparison import (
    change_text,
    closing_lines,
    environment_lines,
    evidence_text,
    geomean_line,
    hidden_line,
    metric_title,
    origin_lines,
    profile_tables,
    shown_rows,
    side_text,
)
from cpbench.units import format_seconds

MARKER = "<!-- cpbench compare -->"  # by which a bot finds its comment again
SPECIAL = re.compile(r"([\\`*_\[\]#|~]|^[-+])")
ENTITIES = {ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;", ord("@"): "&#64;"}
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def table_cells(comparison: Comparison, everything: bool) -> tuple[list[str], list[list[str]]]:
    """Header and rows of all metrics in one table, as text."""
    names = ("old", "new") if comparison.one_file else comparison.names
    body = [
        [metric, row.label, side_text(row, 0), side_text(row, 1), change_text(row), row.verdict, evidence_text(row), "; ".join(row.notes)]
        for metric in comparison.metrics
        for row in shown_rows(comparison, metric, everything)[0]
    ]
    return ["metric", "cell", *names, "change", "verdict", "evidence", "notes"], body


def markdown(comparisons: Sequence[Comparison], everything: bool, failed: str | None) -> str:
    """A comment for a pull request: the verdicts in one line, and all else folded away."""
    lines = [MARKER]
    for comparison in comparisons:
        *_, summary = [*closing_lines(comparison, everything)] or ["nothing in common"]
        title = " and ".join(comparison.names[:1] if comparison.one_file else comparison.names)
        lines += ["<details>", f"<summary>{_html(title)}: {_html(summary)}</summary>", ""]
        lines += [f"{_escaped(line)}  " for line in [*origin_lines(comparison), *environment_lines(comparison)]]
        for metric in comparison.metrics:
            lines += _metric_table(comparison, metric, everything)
        for heading, parts in profile_tables(comparison.profiles):
            cells = [[row.name, format_seconds(row.old_s), format_seconds(row.new_s)] for row in parts]
            lines += ["", f"**{_escaped(heading)}**", "", *_table(["name", *comparison.names], cells)]
        lines += ["", *(f"{_escaped(line)}  " for line in closing_lines(comparison, everything)), "", "</details>"]
    return "\n".join([*lines, *(["", f"**{_escaped(failed)}**"] if failed else [])])


def _metric_table(comparison: Comparison, metric: str, everything: bool) -> list[str]:
    rows, hidden = shown_rows(comparison, metric, everything)
    means = [geomean_line(mean) for mean in comparison.geomeans if mean.metric == metric]
    if hidden:
        means.append(hidden_line(hidden))
    names = ("old", "new") if comparison.one_file else comparison.names
    cells = [[row.label, side_text(row, 0), side_text(row, 1), change_text(row), row.verdict, evidence_text(row), "; ".join(row.notes)] for row in rows]
    table = _table(["cell", *names, "change", "verdict", "evidence", "notes"], cells) if rows else []
    return ["", f"**{_escaped(metric_title(metric))}**", "", *table, *(["", *map(_escaped, means)] if means else [])]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    names = [_escaped(name) for name in head]
    return [_line(names), _line(["---"] * len(names)), *(_line(map(_escaped, row)) for row in rows)]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escaped(text: str) -> str:
    """For Markdown: on one line, without markup, mentions and HTML."""
    return SPECIAL.sub(r"\\\1", _printable(text)).translate(ENTITIES)


def _html(text: str) -> str:
    return _printable(text).translate(ENTITIES)


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def comparison_json(comparisons: Sequence[Comparison], failed: Sequence[Row]) -> str:
    """All rows with the numbers as they are; `comparisons` has one entry for each file but the first."""
    failures = {id(row) for row in failed}
    entries = [_entry(comparison, failures) for comparison in comparisons]
    return to_json({"schema": "cpbench.comparison", "schema_version": 1, "comparisons": entries}, indent=1).decode()


def _entry(comparison: Comparison, failures: set[int]) -> dict[str, Any]:
    each = zip(comparison.rows, values_of(comparison.rows), strict=True)
    rows = [values | {"notes": list(row.notes), "failure": id(row) in failures} for row, values in each]
    return {
        "files": list(comparison.names),
        "runs": [comparison.old.run.id, comparison.new.run.id],
        "noise": comparison.noise,
        "strict": comparison.strict,
        "environment": [{"name": name, "old": _known(old), "new": _known(new)} for name, old, new in comparison.environment],
        "rows": rows,
        "geomeans": [{"metric": mean.metric, "ratio": mean.ratio, "cells": mean.cells, "left_out": mean.left_out} for mean in comparison.geomeans],
        "counts": dict(comparison.counts),
        "tests": len(comparison.tests),
        "false_alarms": comparison.false_alarms,
        "profiles": [{"cell": row.cell, "part": row.part, "name": row.name, "old_s": row.old_s, "new_s": row.new_s} for row in comparison.profiles],
    }


def _known(value: object) -> object:
    """As it is where JSON has it, else as text."""
    return value if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)) else str(value)


def comparison_csv(comparisons: Sequence[Comparison]) -> str:
    """A line for each row, with the files before it. What a spreadsheet would take for a formula begins with an apostrophe."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["old_file", "new_file", *COLUMNS])
    for comparison in comparisons:
        for values in values_of(comparison.rows):
            writer.writerow([_cell(value) for value in (*comparison.names, *values.values())])
    return text.getvalue().rstrip("\n")


def _cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    return _printable(f"'{value}" if value.startswith(FORMULA) else value)
