"""The one error that users see: what is wrong, what to do about it, and the exit code.

A module that finds bad input raises CpbenchError; the command line prints it in two lines and exits. A bug stays an ordinary
exception with its traceback. This module decides no wording beyond the spelling hint.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

USAGE, NOTHING_COMPARABLE, UNREADABLE, SOME_FAILED, ALL_FAILED, INTERRUPTED = 2, 3, 4, 5, 6, 130
MAX_NAME = 80  # characters of an unknown name that are shown


class CpbenchError(Exception):
    """A user's mistake: one sentence (`message`), one hint with the nearest valid value (`hint`), and the exit code of the command (`exit_code`)."""

    def __init__(self, message: str, hint: str = "", exit_code: int = USAGE) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code


def unknown(kind: str, name: str, valid: Iterable[str]) -> CpbenchError:
    """The error for a name that is not in `valid`; the hint names the nearest one first."""
    names = sorted(valid)
    near = difflib.get_close_matches(name[:MAX_NAME], names, n=1, cutoff=0.4)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return CpbenchError(f"Unknown {kind} {name[:MAX_NAME]!r}.", f"{hint}Valid: {', '.join(names)}.")
