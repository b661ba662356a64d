"""How a file becomes a result: it is read, brought to the newest version, and checked against the models of results.py.

A run is an append-only journal (`.jsonl`) while it lasts and one JSON file when it ends; both read alike. Files are untrusted: their
size is limited, they are checked against the models, nothing in them is executed. Other files of cpbench's are read by the same rules.
"""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from cpbench.errors import UNREADABLE, CpbenchError
from cpbench.migrations import migrated
from cpbench.results import SCHEMA, SCHEMA_VERSION, ResultFile
from cpbench.summary import Comparable, ResultSummary

MAX_FILE_BYTES = 256 << 20
MAX_DIGITS = 30  # of an integer; no float has as many, and 300 digits would be more than a float can be
DIGITS_STEP = 6
MAX_SHOWN = 100  # characters of a name or a complaint in a message
SAME_DIGITS = bytes.maketrans(b"0123456789", b"0" * 10)
HALF_CHARACTER = re.compile(r"\\ud[89a-f]", re.IGNORECASE)  # escaped; most are halves of a pair

Stored = TypeVar("Stored", bound=BaseModel)
Wanted = TypeVar("Wanted", ResultFile, ResultSummary)


class ForeignFileError(CpbenchError):
    """JSON, but of something else."""


def read(path: str | Path) -> ResultFile:
    """Read a result file or a journal. Raises CpbenchError (exit code 4) for anything that is not one."""
    return _read(Path(path), ResultFile)


def read_summary(path: str | Path) -> Comparable:
    """As much of it as a comparison of times and memory needs, in half the time; all of a journal, and of a file of an older version.

    Raises CpbenchError (exit code 4) for what is no result, is no JSON anywhere, or is broken in what is read.
    """
    return _read(Path(path), ResultSummary)


def _read(file: Path, model: type[Wanted]) -> Wanted | ResultFile:
    """The fast way is from bytes to models at once. What is wrong there or of another version is for the slow way, and so is a journal."""
    data = _bytes(file)
    with without_collection():
        if file.suffix != ".jsonl" and not _holds_long_integer(data) and (result := _at_once(data, model)):
            return result
        return checked(migrated(_data(_text(data, file), file), file), file, ResultFile, SCHEMA, SCHEMA_VERSION)


def _at_once(data: bytes, model: type[Wanted]) -> Wanted | None:
    try:
        result = model.model_validate_json(data)
    except (ValidationError, RecursionError):
        return None
    return result if result.schema_version == SCHEMA_VERSION and "schema_version" in result.model_fields_set else None


def _holds_long_integer(data: bytes) -> bool:
    """Whether there are more than MAX_DIGITS digits in a row anywhere: milliseconds, where a regular expression takes seconds.

    So many have at least five of every sixth byte. A file of ours has one number in a line, and none so long; only others are looked at whole.
    """
    if b"0" * (MAX_DIGITS // DIGITS_STEP) not in data[::DIGITS_STEP].translate(SAME_DIGITS):
        return False
    return b"0" * (MAX_DIGITS + 1) in data.translate(SAME_DIGITS)


def _data(text: str, file: Path) -> Any:
    try:
        return _fold(text) if file.suffix == ".jsonl" else _parsed(text)
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        journal = file.with_suffix(".jsonl")
        beside = f"; {journal.name} beside it may hold the data" if journal != file and journal.exists() else ""
        raise CpbenchError(f"{file} is not a complete JSON file.", f"It was cut or is not from cpbench{beside}.", UNREADABLE) from error


@contextmanager
def without_collection() -> Iterator[None]:
    """No search for cycles: results are objects by the million and hold none, and looking takes longer than reading."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_text(file: Path) -> str:
    """A file of cpbench's as it is, if it is not too large. Raises CpbenchError (exit code 4) where it cannot be read."""
    return _text(_bytes(file), file)


def _bytes(file: Path) -> bytes:
    try:
        size = file.stat().st_size
        if size > MAX_FILE_BYTES:
            raise CpbenchError(f"{file} is larger than {MAX_FILE_BYTES >> 20} MiB.", "A result file is a few megabytes: is this the right file?", UNREADABLE)
        return file.read_bytes()
    except FileNotFoundError as error:
        raise CpbenchError(f"{file} does not exist.", _nearest_file(file), UNREADABLE) from error
    except OSError as error:
        raise CpbenchError(f"{file} cannot be read: {error.strerror}.", _nearest_file(file), UNREADABLE) from error


def _text(data: bytes, file: Path) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise CpbenchError(f"{file} is not text: {error.reason} at byte {error.start:,}.", "It was damaged, or is not from cpbench.", UNREADABLE) from error


def checked(data: Any, file: Path, model: type[Stored], schema: str, version: int) -> Stored:
    """The content of a file as its model. Raises CpbenchError (exit code 4) where it is of another schema, or breaks it."""
    kind = schema.removeprefix("cpbench.")
    if not isinstance(data, dict) or data.get("schema") != schema:
        raise ForeignFileError(f"{file} is not a cpbench {kind}.", f'A {kind} has "schema": "{schema}" at its top.', UNREADABLE)
    found = data.get("schema_version")
    if type(found) is not int or found != version:
        hint = "Install a newer cpbench." if isinstance(found, int) and found > version else "No cpbench wrote it: it was edited or damaged."
        raise CpbenchError(f"{file} has schema version {repr(found)[:MAX_SHOWN]}; this cpbench reads up to {version}.", hint, UNREADABLE)
    try:
        return model.model_validate(data)
    except (ValidationError, RecursionError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": ("?",), "msg": "too deeply nested"}
        where = ".".join(str(part)[:MAX_SHOWN] for part in first["loc"])
        what = str(first["msg"]).removeprefix("Value error, ")[:MAX_SHOWN]
        raise CpbenchError(f"{file} breaks the {kind} schema at {where}: {what}.", "The file was edited or damaged.", UNREADABLE) from error


def _parsed(text: str) -> Any:
    """JSON without what nothing else could hold: integers beyond all floats, and halves of characters. Raises ValueError for them too."""
    data = json.loads(text, parse_int=_integer)
    if HALF_CHARACTER.search(text):
        json.dumps(data, ensure_ascii=False).encode()
    return data


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits")
    return int(digits)


def _fold(text: str) -> dict[str, Any]:
    """Journal lines -> the dictionary of a result file. A last line that was cut short is ignored: it was never finished."""
    lines = text.splitlines()
    entries = []
    for number, line in enumerate(lines):
        try:
            entries.append(_parsed(line))
        except ValueError:
            if number + 1 < len(lines):
                raise
    data: dict[str, Any] = {}
    cells: dict[str, Any] = {}
    for entry in entries:
        kind = entry["type"]
        if kind == "header":
            data.update(entry["result"])
        elif kind == "environment":
            data["environment"] = entry["environment"]
        elif kind == "run":
            data["run"] = entry["run"]
        elif kind == "cell":
            cells[entry["cell"]["id"]] = entry["cell"]
    if not data:
        raise ValueError("no header")
    return {**data, "cells": list(cells.values())}


def _nearest_file(file: Path) -> str:
    import difflib

    try:
        names = [path.name for path in file.parent.iterdir() if path.suffix in (".json", ".jsonl")]
    except OSError:
        names = []
    names = [name for name in names if name != file.name]
    near = difflib.get_close_matches(file.name, names, n=1, cutoff=0.0)
    return f"The nearest file there is {file.parent / near[0]}." if near else "cpbench sweep writes results/<name>-<time>.json."
