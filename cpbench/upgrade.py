"""Rewriting a result file as one of the newest schema version. The steps are in migrations.py; a file that cannot be read stays as it is."""

from __future__ import annotations

import json
from pathlib import Path

from cpbench.atomic import replace_file
from cpbench.errors import UNREADABLE, CpbenchError
from cpbench.reading import read, read_text
from cpbench.results import SCHEMA_VERSION


def upgrade_file(file: Path) -> str:
    """Upgrade one file in one step, and say what was done. Raises CpbenchError for a journal, and for a file that cannot be read (exit code 4)."""
    result = read(file)
    if file.suffix == ".jsonl":
        hint = "Finish it with cpbench sweep --resume: the result that it then writes is of the newest version."
        raise CpbenchError(f"{file} is the journal of a run that has not ended.", hint, UNREADABLE)
    version = json.loads(read_text(file))["schema_version"]
    if version == SCHEMA_VERSION:
        return f"{file} has version {version}, the newest: unchanged."
    replace_file(file, f"{result.model_dump_json(by_alias=True, indent=1)}\n".encode(), "Its folder must be writable; nothing was changed.")
    return f"{file} had version {version} and has {SCHEMA_VERSION} now."
