"""How a result of an older schema version becomes one of the newest: a step for each version. Files that are read pass through here.

A new version adds one function, `STEPS[old] = function`, that takes the dictionary of a file of version `old` and returns one of `old + 1`.
What the newest one must look like is checked in reading.py; rewriting files is upgrade.py's part.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from cpbench.errors import UNREADABLE, CpbenchError

Step = Callable[[dict[str, Any]], dict[str, Any]]
STEPS: dict[int, Step] = {}  # version 1 is the first one, and the newest


def migrated(data: Any, file: Path) -> Any:
    """The content of a file after all steps that its version needs; anything that is no result stays as it is.

    Raises CpbenchError (exit code 4) where a step cannot read what it finds.
    """
    while isinstance(data, dict) and type(version := data.get("schema_version")) is int and version in STEPS:
        try:
            data = {**STEPS[version](data), "schema_version": version + 1}
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CpbenchError(f"{file} breaks version {version} of the result schema.", "The file was edited or damaged.", UNREADABLE) from error
    return data
