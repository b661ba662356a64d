"""`cpbench report`: one or two result files become a page beside the first. What the page says is decided in report/html.py.

A file that is not a page of ours is not overwritten unless that is asked for, and a result never is.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cpbench.atomic import replace_file
from cpbench.comparison import Comparison, compare
from cpbench.errors import NOTHING_COMPARABLE, CpbenchError
from cpbench.frame import Results, short_names
from cpbench.reading import read
from cpbench.report.changes import forest
from cpbench.report.html import MARK_WITHIN, is_page, page
from cpbench.report.sections import Source

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_FILES = 2


def publish(files: Sequence[Path], output: Path | None, *, force: bool) -> tuple[Path, int, Comparison | None]:
    """Write the page of a result, or of an old and a new one. Returns where it is, its size in bytes, and of two how they compare.

    Without `output` it is beside the first file. Raises CpbenchError for a file that cannot be read (exit code 4), for more than two
    files, and where something else would be overwritten.
    """
    if len(files) > MAX_FILES:
        raise CpbenchError(f"A report is about one result or two, and {len(files)} files are given.", "Give one, or an old and a new one.")
    results = Results(tuple(read(file) for file in files), short_names([str(file) for file in files]))
    sources = [Source(name, result) for name, result in zip(results.names, results, strict=True)]
    target = output or files[0].with_suffix(".html")
    _refuse_overwriting(target, files, force)
    comparison = compare(*results, names=(results.names[0], results.names[1])) if len(results) == MAX_FILES else None
    content = page(sources, comparison, _figures(results, comparison)).encode(errors="replace")
    replace_file(target, content)
    return target, len(content), comparison


def _figures(results: Results, comparison: Comparison | None) -> dict[str, Figure]:
    """Those that the results can fill; with two, first what changed."""
    from cpbench.plot import figures

    changed = forest(comparison) if comparison else None
    try:
        return {**({"changes": changed} if changed else {}), **figures(results)}
    except CpbenchError as error:
        if error.exit_code != NOTHING_COMPARABLE:
            raise
        return {}  # nothing was timed, and the page says so elsewhere


def _refuse_overwriting(target: Path, files: Sequence[Path], force: bool) -> None:
    if target.is_dir():
        raise CpbenchError(f"{target} is a folder.", f"Name a file, for example -o {target / 'report.html'}.")
    if not target.exists():
        return
    if any(file.exists() and target.samefile(file) for file in files):
        raise CpbenchError(f"{target} is a result that the report is about.", f"Name another file, for example -o {target.with_suffix('.html')}.")
    try:
        with target.open("rb") as stream:
            ours = is_page(stream.read(MARK_WITHIN))
    except OSError as error:
        raise CpbenchError(f"{target} cannot be read: {error.strerror}.", "Choose another file with -o.") from error
    if not ours and not force:
        raise CpbenchError(f"{target} exists and is not a report.", "Choose another file with -o, or overwrite it with --force.")
