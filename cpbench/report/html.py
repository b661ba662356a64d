"""One page that holds everything about a result, or about two: HTML with its style, its program, its data and its figures in one file.

The page asks nothing of a network, and its content security policy forbids it to. What files say is data: it lies in the page as JSON and
becomes text, never markup. Style and program run because their hashes are in the policy. Which sections there are is decided here; what
they say in sections.py, rows_table.py, drawer.py and changes.py, and how they look in page/.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from cpbench import __version__
from cpbench.comparison import Comparison
from cpbench.report import sections
from cpbench.report.changes import changes
from cpbench.report.console import plain
from cpbench.report.packed import packed
from cpbench.report.rows_table import cells_table
from cpbench.report.sections import Source
from cpbench.report.svg import elements
from cpbench.report.texts import Texts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GENERATOR = "cpbench report"
MARK = f'<meta name="generator" content="{GENERATOR}'.encode()  # what a page of ours has in its first bytes
MARK_WITHIN = 1024
HALF_PAGE = 9.0  # inches


def page(sources: Sequence[Source], comparison: Comparison | None = None, figures: Mapping[str, Figure] | None = None) -> str:
    """The page of one result, or of an old and a new one with their comparison. `figures`: those of plot.figures, by their names."""
    drawn, left_out = elements(figures or {})
    data = json.dumps(_data(sources, comparison, left_out), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    style, program = _asset("page.css"), _asset("page.js")
    policy = f"default-src 'none'; script-src '{_hash(program)}'; style-src '{_hash(style)}'; img-src data:; base-uri 'none'; form-action 'none'"
    filled = {
        "policy": html.escape(policy),
        "generator": html.escape(f"{GENERATOR} {__version__}"),
        "title": _text(" and ".join(source.name for source in sources)),
        "style": style,
        "figures": "\n".join(_figure(element, (figures or {})[name].get_figwidth()) for name, element in drawn.items()),
        "data": data,
        "program": program,
    }
    parts = _asset("page.html").split("{{")
    return parts[0] + "".join(filled[name] + rest for name, _, rest in (part.partition("}}") for part in parts[1:]))


def is_page(head: bytes) -> bool:
    """Whether a file that starts like this is a page of ours."""
    return MARK in head[:MARK_WITHIN]


def _data(sources: Sequence[Source], comparison: Comparison | None, left_out: Sequence[str]) -> dict[str, Any]:
    """Everything that the page says, as page.js takes it. The newest result is last, and the page opens with it."""
    texts, newest = Texts(), sources[-1]
    cells, drawers, opens = cells_table(sources, texts)
    data = {
        "title": texts(newest.title),
        "files": [texts(source.name) for source in sources],
        "tiles": sections.tiles(newest, texts),
        "best": [{"name": texts(source.name), "tables": sections.best(source, texts)} for source in sources],
        "cells": cells,
        "drawers": packed(drawers),
        "notes": [{"name": texts(source.name), "lines": sections.notes(source, texts)} for source in sources],
        "changes": changes(comparison, opens, texts) if comparison else None,
        "undrawn": texts(f"Too large for a page: {', '.join(left_out)}. cpbench plot draws them.") if left_out else None,
        "runs": [sections.run(source, texts) for source in sources],
    }
    return {**data, "texts": texts.all}


def _figure(element: str, inches: float) -> str:
    """In the page's colours; a wide one has a row of its own."""
    return f'<figure class="themed{" wide" if inches > HALF_PAGE else ""}">{element}</figure>'


def _asset(name: str) -> str:
    return (files("cpbench.report") / "page" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _text(text: str) -> str:
    return html.escape(plain(text).plain)
