"""Writing a file in one step: whoever reads it finds the old content or the new one, never a part. Journals, which grow, are in journal.py."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from cpbench.errors import CpbenchError

ANOTHER = "Choose another file with -o, in a folder that is there and that you can write."


def refuse_existing(file: Path) -> None:
    """Raise CpbenchError where a file would be overwritten."""
    if file.exists():
        raise CpbenchError(f"{file} exists.", "Choose another file with -o.")


def replace_file(file: Path, content: bytes, hint: str = ANOTHER) -> None:
    """Put `content` at `file`. Raises CpbenchError where that cannot be done, and leaves nothing behind."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CpbenchError(f"{file} cannot be written: {error.strerror}.", hint) from error
