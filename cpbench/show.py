"""What `cpbench show` does: read files, keep the cells that a filter names, and print them or write them to a file in one of the formats."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from cpbench.atomic import refuse_existing, replace_file
from cpbench.export import Format, chosen_format, to_csv, to_json, to_parquet
from cpbench.frame import Results, kept_cells, short_names
from cpbench.reading import read
from cpbench.report.console import PIPE_WIDTH, messages, output, plain, show, show_json
from cpbench.report.whole import markdown, to_markdown, whole_view
from cpbench.results import ResultFile
from cpbench.where import parse_where

if TYPE_CHECKING:
    from rich.console import ConsoleRenderable


@dataclass(frozen=True)
class Chosen:
    """What is to be shown: files, where they are, and the cells that a filter keeps (None: all)."""

    results: Results
    paths: tuple[Path, ...]
    kept: set[tuple[str, str]] | None

    def files(self) -> Iterator[tuple[str, ResultFile, Path, set[str] | None]]:
        """Name, content, folder and kept cells of each file of which something is left. The name is empty where there is one only."""
        for name, file, path in zip(self.results.names, self.results.files, self.paths, strict=True):
            ids = None if self.kept is None else {cell for of, cell in self.kept if of == name}
            if ids is None or ids:
                yield name if len(self.results) > 1 else "", file, path.parent, ids

    def view(self, console: Console) -> Iterator[ConsoleRenderable]:
        """The tables of all files."""
        for number, (name, file, folder, ids) in enumerate(self.files()):
            yield from [plain("")] * bool(number)
            yield from [plain(name, "bold underline")] * bool(name)
            yield from whole_view(file, folder, console, ids)

    def as_text(self, width: int) -> str:
        console = Console(width=width, file=io.StringIO(), highlight=False, color_system=None)
        with console.capture() as capture:
            show(console, self.view(console))
        return "".join(f"{line.rstrip()}\n" for line in capture.get().splitlines())

    def as_markdown(self) -> str:
        return "\n".join((f"## {markdown(name)}\n\n" if name else "") + to_markdown(file, folder, ids) for name, file, folder, ids in self.files())

    def as_bytes(self, form: Format) -> bytes:
        """What a file in this format holds, or what is printed: text in UTF-8, but for Parquet."""
        only = self.results if self.kept is None else self.results.only(self.kept)
        if form == "parquet":
            return to_parquet(only)
        made = {"csv": to_csv, "json": to_json}
        text = made[form](only) if form in made else self.as_markdown() if form == "md" else self.as_text(PIPE_WIDTH)
        return f"{text.rstrip()}\n".encode()


def run(files: list[Path], where: str | None, asked: str | None, as_json: bool, file: Path | None) -> None:
    """Print the files, or write them to `file`. Raises CpbenchError for what cannot be read (4), filtered (2; 3 where nothing is left) or written."""
    form = chosen_format(asked, as_json, file)
    parsed = None if where is None else parse_where(where)
    if file:
        refuse_existing(file)
    paths = tuple(dict.fromkeys(files))
    results = Results(tuple(map(read, paths)), short_names([str(path) for path in paths]))
    chosen = Chosen(results, paths, kept_cells(results, parsed) if parsed else None)
    if file:
        replace_file(file, chosen.as_bytes(form))
        show(messages(), [f"Written: {file}"])
    elif form == "text":
        out = output()
        show(out, chosen.view(out))
    else:
        show_json(chosen.as_bytes(form).decode().rstrip("\n"))
