"""Memory histories on disk, beside the result file they belong to: `x.json` -> `x.memory/NAME.json`, and a drawing of it.

Files are JSON, size-limited and checked when they are read, like results. What a history holds is in measure/history.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cpbench.errors import UNREADABLE, CpbenchError
from cpbench.measure.history import History
from cpbench.reading import read_text

SCHEMA: Final = "cpbench.memory"


def folder_of(output: Path) -> Path:
    """Where the histories of a result file are."""
    return output.with_suffix(".memory")


def keep(histories: Mapping[int, History], output: Path, name: str = "", capacity: int | None = None) -> list[str]:
    """Store histories by rank, and draw them together. Returns the files, relative to the result file's folder.

    `name`: what comes before `rank0` in the names; `capacity`: bytes that a rank may have, for the drawing. Raises OSError where nothing can
    be written.
    """
    from cpbench.report.memory_plot import draw

    folder = folder_of(output)
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}rank{rank}.json" for rank in histories]
    for file, (rank, history) in zip(files, histories.items(), strict=True):
        file.write_text(json.dumps({"schema": SCHEMA, "rank": rank, **history.to_dict()}, separators=(",", ":")) + "\n", encoding="utf-8")
    files.append(folder / f"{name}memory.svg")
    draw(histories, files[-1], capacity)
    return [str(file.relative_to(output.parent)) for file in files]


def read_history(path: str | Path) -> History:
    """A stored history. Raises CpbenchError (exit code 4) for anything that is not one."""
    file = Path(path)
    try:
        data: Any = json.loads(read_text(file))
        if data["schema"] == SCHEMA:
            return History.from_dict(data)
    except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError):
        pass
    raise CpbenchError(
        f"{file} is not a memory history.", f'One has "schema": "{SCHEMA}" at its top; they are in the folder x.memory beside x.json.', UNREADABLE
    )
