"""All that is said about a result, whatever kind of run it is from, and the same as Markdown and HTML.

What is said is decided in table.py, longest.py and profile_view.py. Files are untrusted: every text is escaped for where it goes.
"""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleRenderable
from rich.table import Table
from rich.text import Text

from cpbench.report.columns import MAX_WIDTH
from cpbench.results import ResultFile

if TYPE_CHECKING:
    from cpbench.frame import Results

MAX_HTML_ROWS = 200  # of one table: a notebook stores what it shows
MARKDOWN = re.compile(r"([\\`*\[\]<>#|!~$])")
Kept = Collection[str] | None  # ids of the cells that a filter keeps; None: all


def whole_view(result: ResultFile, folder: Path, console: Console, kept: Kept = None) -> list[ConsoleRenderable]:
    """A result that lies in `folder`, for a console: its tables with the profiles that it holds. Cells that are not kept are still compared with."""
    from cpbench.report.profile_view import profile_view
    from cpbench.report.table import result_view

    shown = result if kept is None else result.model_copy(update={"cells": [cell for cell in result.cells if cell.id in kept]})
    if result.run.kind == "maxseq":
        from cpbench.report.longest import longest_view

        return longest_view(shown, folder, console.width)
    if result.run.kind == "projection":
        from cpbench.report.projection import projection_view

        return projection_view(result, console, kept)
    return [*result_view(result, folder, console, kept), *profile_view(shown, folder, console)]


def to_markdown(result: ResultFile, folder: Path, kept: Kept = None) -> str:
    """For a pull request: tables with all their columns, and what stands around them as lists."""
    lines: list[str] = []
    for item in whole_view(result, folder, _wide(), kept):
        if isinstance(item, Table):
            lines += ["", *_markdown_table(*_contents(item)), ""]
        elif (text := str(item)).strip():
            style = item.style if isinstance(item, Text) else ""
            bullet, text = "  -" if text.startswith(" ") else "-", markdown(text)
            if bullet != "-":  # the end of a log
                style = ""
            lines += {"bold": ["", f"**{text}**", ""], "dim": ["", f"<sub>{text}</sub>", ""]}.get(str(style), [f"{bullet} {text}"])
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines).strip()) + "\n"


def to_html(results: Results) -> str:
    """For a notebook: the same tables of several files, each cut after MAX_HTML_ROWS."""
    parts: list[str] = []
    for name, file in zip(results.names, results.files, strict=True):
        parts.append(f"<p><strong>{escape(name)}</strong></p>")
        for item in whole_view(file, Path(), _wide()):
            if isinstance(item, Table):
                headers, rows = _contents(item)
                parts.append(html_table(headers, rows[:MAX_HTML_ROWS]))
                parts += [f"<p><small>{len(rows) - MAX_HTML_ROWS:,} more rows: to_frame() has all.</small></p>"] * (len(rows) > MAX_HTML_ROWS)
            elif (text := str(item)).strip():
                parts.append(f"<p><small>{escape(text)}</small></p>")
    return "\n".join(parts) or "<p>No results.</p>"


def html_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Headers and cells, escaped."""
    head = "".join(f"<th>{escape(header)}</th>" for header in headers)
    body = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _wide() -> Console:
    """A console on which no column is left out."""
    return Console(width=MAX_WIDTH, file=io.StringIO())


def _contents(table: Table) -> tuple[list[str], list[list[str]]]:
    """Headers in one line each, and rows."""
    headers = [re.sub(r"-\n", "", str(column.header)).replace("\n", " ") for column in table.columns]
    return headers, [[str(text) for text in row] for row in zip(*(column.cells for column in table.columns), strict=True)]


def _markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(texts: Iterable[str]) -> str:
        return f"| {' | '.join(map(markdown, texts))} |"

    return [line(headers), f"|{'---|' * len(headers)}", *map(line, rows)]


def markdown(text: str) -> str:
    """Text from a file in one line, of which nothing is markup."""
    return MARKDOWN.sub(r"\\\1", " ".join(text.split()))
