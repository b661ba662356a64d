"""Text files from people, read up to a limit. What a file means, and what is said of one that is too long, is its reader's part."""

from __future__ import annotations

from pathlib import Path


def read_at_most(file: Path, most: int) -> str | None:
    """The text of a file of at most so many characters; None if it has more, whatever its size is said to be: a device has no end.

    Raises OSError and UnicodeDecodeError.
    """
    with file.open(encoding="utf-8") as stream:
        text = stream.read(most + 1)
    return text if len(text) <= most else None
