"""The two streams that cpbench writes to: results on stdout, everything else on stderr; errors in two lines.

A terminal has its own width; a pipe or a file gets 120 columns unless COLUMNS says otherwise. What is printed is made in the other
modules of this package.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import NoReturn

from rich.console import Console, ConsoleRenderable
from rich.text import Text

from cpbench.errors import CpbenchError

PIPE_WIDTH = 120


class _Stream(Console):
    """A console that leaves a closed pipe to the command line, which ends quietly."""

    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError  # a new one without errno: typer turns the original into exit code 1


def output() -> Console:
    """For results."""
    return _Stream(width=_width(sys.stdout.isatty()), highlight=False)


def messages() -> Console:
    """For progress, notes and errors."""
    return _Stream(width=_width(sys.stderr.isatty()), highlight=False, stderr=True)


def show(console: Console, view: Iterable[ConsoleRenderable | str]) -> None:
    """Print each item on lines of its own. Strings are printed as they are."""
    for item in view:
        console.print(plain(item) if isinstance(item, str) else item)


def show_json(text: str) -> None:
    """Exactly this text on stdout."""
    try:
        sys.stdout.write(f"{text}\n")  # megabytes, which rich would take apart
    except BrokenPipeError as error:
        raise BrokenPipeError from error  # see _Stream


def show_error(error: CpbenchError) -> None:
    """`error:` and `hint:`, one line each however narrow the terminal is, so that both can be searched for and copied."""
    console = messages()
    console.print(Text("error: ", style="bold red") + plain(error.message), soft_wrap=True)
    if error.hint:
        console.print(Text("hint:  ", style="bold") + plain(error.hint), soft_wrap=True)


def plain(text: str, style: str = "") -> Text:
    """Text from a file or a user: no markup, and nothing that a terminal would obey."""
    shown = text if text.isprintable() else "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    return Text(shown, style=style)


def _width(terminal: bool) -> int | None:
    return None if terminal or "COLUMNS" in os.environ else PIPE_WIDTH
