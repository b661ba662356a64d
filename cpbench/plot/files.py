"""What `cpbench plot` does between its flags and its exit code: draw, write a file for each figure and format, and say where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cpbench.errors import CpbenchError, unknown
from cpbench.frame import Results, short_names
from cpbench.plot import FIGURES, FOREST, figures, versus
from cpbench.plot.canvas import Chart, write
from cpbench.reading import read
from cpbench.report import console

FORMATS = ("svg", "png")


@dataclass(frozen=True)
class Asked:
    """The flags. `x`, `y`, `by`, `facet` ask for one figure instead of those of `names` (None: all that can be filled)."""

    names: str | None = None
    x: str | None = None
    y: str | None = None
    by: str | None = None
    facet: str | None = None
    where: str | None = None

    @property
    def is_one(self) -> bool:
        return any(value is not None for value in (self.x, self.y, self.by, self.facet))


def run(files: Sequence[Path], asked: Asked, formats: str | None, folder: Path | None, quiet: bool) -> int:
    """Draw and write. Nothing is written where anything is wrong with the flags or the files."""
    kinds = _listed(FORMATS[0] if formats is None else formats, "format", FORMATS)
    results = Results(tuple(read(file) for file in files), short_names([str(file) for file in files]))
    charts = _charts(results, asked)
    written = write_charts(charts, folder or files[0].parent, files[0].stem, kinds)
    console.show(console.output(), [str(file) for file in written])
    left = [f"{name} (needs {kind.needs})" for name, kind in FIGURES.items() if name not in charts]
    if left and not quiet and not asked.is_one and not asked.names:
        console.show(console.messages(), [f"Not drawn: {', '.join(left)}."])
    return 0


def write_charts(charts: Mapping[str, Chart], folder: Path, stem: str, kinds: Sequence[str]) -> list[Path]:
    """`STEM-FIGURE.svg` in the folder, which is made. Raises CpbenchError where it cannot be written."""
    written = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, chart in charts.items():
            for kind in kinds:
                written.append(folder / f"{stem}-{name}.{kind}")
                write(chart, written[-1])
    except OSError as error:
        raise CpbenchError(f"{error.filename or folder} cannot be written: {error.strerror}.", "Choose another folder with -o.") from error
    return written


def _charts(results: Results, asked: Asked) -> dict[str, Chart]:
    if not asked.is_one:
        return figures(results, None if asked.names is None else _listed(asked.names, "figure", (*FIGURES, FOREST)), asked.where)
    if asked.names is not None:
        raise CpbenchError("--figure names figures, and --x, --y, --by and --facet describe one.", "Leave --figure out, or the others.")
    chart = versus(results, asked.x or "seq", asked.y, by=asked.by or (), facet=asked.facet, where=asked.where)
    return {f"{asked.y or 'time'}-{asked.x or 'seq'}": chart}


def _listed(text: str, kind: str, valid: Sequence[str]) -> list[str]:
    """The names in a comma list, each once. Raises CpbenchError where there is none, or one that is not valid."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    if not found:
        raise CpbenchError(f"{text!r} names no {kind}.", f"Valid: {', '.join(valid)}.")
    for name in found:
        if name not in valid:
            raise unknown(kind, name, valid)
    return list(dict.fromkeys(found))
