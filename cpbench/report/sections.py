"""What the page says above and around its table: the headline numbers, the best layout for each length, and where the numbers are from.

Pure: results become plain data, in which every text is a number of texts.py; page.js shows it. Which layout is best is decided in
recommend.py, what a row says in rows.py, and what the two tables that can be searched say in rows_table.py.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from cpbench.maxseq import answers, length_of
from cpbench.recommend import Candidate, advise
from cpbench.report.advice import candidates
from cpbench.report.drawer import TOO_DEEP, shown
from cpbench.report.longest import limit_of, peak_bytes
from cpbench.report.rows import Group, Row, group_rows
from cpbench.report.table import OVERSUBSCRIBED, TIME_NAMES, Notes, cores_of, footnotes, provenance, title
from cpbench.report.texts import Texts
from cpbench.report.variants import variant_lines
from cpbench.results import FAILED, ResultFile
from cpbench.units import format_bytes, format_seconds, format_tokens

SHARED = f"{OVERSUBSCRIBED}: oversubscribed, more threads than cores"
MAX_BATCHES = 1000
MAX_TABLES = 12  # groups of a file that have a table of their own


@dataclass(frozen=True)
class Source:
    """A result and what its file is called."""

    name: str
    result: ResultFile

    @cached_property
    def groups(self) -> list[Group]:
        return group_rows(self.result.cells, cores_of(self.result.environment))

    @property
    def title(self) -> str:
        """`TTFT of qwen3-tiny, 1 layer, float32 on cpu`, and how many more such tables there are."""
        if not self.groups:
            return self.result.run.name
        more = len(self.groups) - 1
        return title(self.groups[0]) + (f", and {more} more" if more else "")


def tiles(source: Source, texts: Texts) -> list[dict[str, int]]:
    """The numbers that the page opens with: how many cells there are, and at the longest length who is fastest and who needs least memory."""
    cells = source.result.cells
    ok, failed = (sum(cell.status in wanted for cell in cells) for wanted in (("ok",), FAILED))
    others = len(cells) - ok - failed
    parts = [f"{number} {word}" for number, word in ((failed, "failed"), (others, "not run")) if number]
    made = [("cells", f"{ok} of {len(cells)} ok", ", ".join(parts) or "none failed")]
    longest = max(
        ((batch, group) for group in source.groups for batch in group.batches if candidates(group, batch, OVERSUBSCRIBED)),
        key=lambda item: (sum(item[0].lengths), -source.groups.index(item[1])),
        default=None,
    )
    if longest and source.result.run.kind != "maxseq":
        batch, group = longest
        made = [*_champions(group, candidates(group, batch, OVERSUBSCRIBED), batch.name), *made]
    warned = sum(bool(cell.warnings) for cell in cells)
    made.append(("warnings", f"{warned} of {len(cells)} cells" if warned else "none", "to be read before the numbers" if warned else "on any cell"))
    return [{"name": texts(name), "value": texts(value), "about": texts(about)} for name, value, about in made]


def _champions(group: Group, found: Sequence[tuple[Row, Candidate]], length: str) -> Iterator[tuple[str, str, str]]:
    """The fastest of a batch, and the one that needs least memory."""
    time = TIME_NAMES.get(str(group.common.get("target")), "time")
    row, fastest = min(found, key=lambda item: item[1].seconds)
    yield f"lowest {time} at {length}", fastest.name, f"{format_seconds(fastest.seconds)}{_against_baseline(row)}"
    known = [(candidate.memory, candidate.name) for _, candidate in found if candidate.memory is not None]
    if known:
        least, name = min(known, key=lambda item: item[0])
        yield f"least memory at {length}", name, f"{format_bytes(least)} per rank"


def _against_baseline(row: Row) -> str:
    return ", the baseline" if row.is_baseline else f", {row.speed_up:.2f}x the baseline" if row.speed_up is not None else ""


def best(source: Source, texts: Texts) -> list[dict[str, Any]]:
    """A table for each group: every batch with the layout to take. Of a search for the longest sequence, what it found."""
    if source.result.run.kind == "maxseq":
        return [_longest(source, texts)] if source.result.cells else []
    tables = []
    for group in source.groups[:MAX_TABLES]:
        rows = [_best_row(group, batch.name, found) for batch in group.batches if (found := candidates(group, batch, OVERSUBSCRIBED))]
        if rows:
            time = TIME_NAMES.get(str(group.common.get("target")), "time")
            head = ["length", "fastest", time, "speed-up", "as fast within noise", "least memory", "peak per rank", "worth considering"]
            made = {"title": texts(title(group)), **texts.table(head, rows, left=2, most=MAX_BATCHES), "words": [1, 4, 5, 7]}
            tables.append(made | ({"about": texts(SHARED)} if any(OVERSUBSCRIBED in text for row in rows for text in row) else {}))
    return tables


def _best_row(group: Group, length: str, found: Sequence[tuple[Row, Candidate]]) -> list[str]:
    advice = advise([candidate for _, candidate in found])
    if advice is None:
        row, only = found[0]
        return [length, f"{only.name} (the only one)", format_seconds(only.seconds), _speed_up(row), "-", only.name, format_bytes(only.memory), "-"]
    row = next(row for row, candidate in found if candidate is advice.fastest)
    least = format_bytes(advice.leanest[0].memory) if advice.leanest else "-"
    seconds = format_seconds(advice.fastest.seconds)
    return [length, advice.fastest.name, seconds, _speed_up(row), _names(advice.ties), _names(advice.leanest), least, _names(advice.front)]


def _speed_up(row: Row) -> str:
    return "baseline" if row.is_baseline else "-" if row.speed_up is None else f"{row.speed_up:.2f}x"


def _names(found: Sequence[Candidate]) -> str:
    return ", ".join(candidate.name for candidate in found) or "-"


def _longest(source: Source, texts: Texts) -> dict[str, Any]:
    rows = []
    for one in answers(source.result):
        fits, fails = one.fits, one.fails
        tokens = (format_tokens(length_of(fits)), f"{length_of(fits):,}", format_bytes(peak_bytes(fits))) if fits else ("-", "-", "-")
        rows.append((one.layout, one.strategy, *tokens, f"{length_of(fails):,}" if fails else "-", limit_of(one)))
    head = ["layout", "strategy", "longest", "tokens", "peak per rank", "does not fit", "limit"]
    return {"title": texts("Longest sequence that fits"), **texts.table(head, rows, left=2), "words": [1, 6]}


def notes(source: Source, texts: Texts) -> list[int]:
    """What must be known to read the table: baselines, marks, ranks that the others wait for, variants, and every reason for a missing time."""
    lines = [*footnotes(source.groups, Notes(), cores_of(source.result.environment)), *variant_lines(source.groups)]
    return texts.line(lines)


def run(source: Source, texts: Texts) -> dict[str, Any]:
    """Who measured this, where, and how it was asked for."""
    result = source.result
    facts = ["command", shlex.join(["cpbench", *result.run.argv]), "started", result.run.started, "ended", result.run.ended or "not complete"]
    facts += ["cpbench", f"{result.run.cpbench_version}" + (f", git {result.run.git}" if result.run.git else ""), "run", result.run.id]
    environment = [(name, shown(value)) for name, value in result.environment.items() if name != "running" and value not in (None, [], {}, "")]
    running = result.environment.get("running")
    seen = running.items() if isinstance(running, dict) else ()
    environment += [(f"{ranks} ranks", ", ".join(f"{name} {shown(value)}" for name, value in _known(found).items())) for ranks, found in seen]
    return {
        "name": texts(source.name),
        "about": texts(provenance(result)),
        "facts": texts.line(facts),
        "environment": texts.table(["environment", ""], environment, left=2),
        "defaults": texts.line(result.run.defaults),
        "scenario": texts.line(_scenario(result)),
    }


def _known(found: Any) -> dict[str, Any]:
    return {str(name): value for name, value in found.items() if value is not None} if isinstance(found, dict) else {}


def _scenario(result: ResultFile) -> list[str]:
    try:
        return json.dumps(result.run.scenario, indent=1, ensure_ascii=False, default=str).splitlines()
    except RecursionError:
        return [TOO_DEEP]
