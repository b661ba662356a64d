"""Writing a result so that nothing measured is lost: an append-only journal while the sweep runs, one JSON file when it ends.

The journal lies beside the result (`x.json` -> `x.jsonl`), one JSON object per line, on disk before the next cell starts; reading.py
reads both. A finished file is never overwritten unless it is the one being resumed. What is written is decided in driver.py.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from cpbench.errors import SOME_FAILED, CpbenchError
from cpbench.results import SCHEMA, SCHEMA_VERSION, CellResult, ResultFile, Run


class Journal:
    """The open journal of one sweep. Opening it is the proof that the output folder can be written."""

    def __init__(self, output: Path, run: Run, environment: dict[str, Any], cells: Iterable[CellResult] = (), *, resume: bool = False) -> None:
        """Start a journal that already holds `cells`. Raises CpbenchError (exit code 2) where nothing can or may be written."""
        if output.suffix != ".json":
            raise CpbenchError(f"{output} does not end in .json.", f"Use -o {output.with_suffix('.json')}.")
        self.output = output
        self.path = output.with_suffix(".jsonl")
        header = {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, "run": run.model_dump(mode="json"), "environment": environment}
        entries = [{"type": "header", "result": header}, *({"type": "cell", "cell": cell.model_dump(mode="json")} for cell in cells)]
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._open("".join(_line(entry) for entry in entries), resume)
        except FileExistsError as error:
            raise (self._exists(self.path) if self.path.is_file() else _unwritable(output, error)) from error
        except OSError as error:
            raise _unwritable(output, error) from error

    def add_environment(self, environment: dict[str, Any]) -> None:
        """Record what the running ranks reported."""
        self._append({"type": "environment", "environment": environment})

    def add_cell(self, cell: CellResult) -> None:
        """Record a cell, all its rounds together; it replaces what was recorded of it before."""
        self._append({"type": "cell", "cell": cell.model_dump(mode="json")})

    def finish(self, result: ResultFile) -> None:
        """Write the JSON file in one step and remove the journal. Raises CpbenchError; then the journal stays."""
        text = result.model_dump_json(by_alias=True, indent=1) + "\n"
        try:
            _replace(self.output, text).close()
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise self._lost(error) from error
        finally:
            self.close()

    def close(self) -> None:
        """Close the file; what was added stays on disk."""
        self._file.close()

    def _open(self, text: str, resume: bool) -> BinaryIO:
        """Start the journal anew (a last line that was cut short must not be continued) and hold a lock on it.

        It is locked before anyone can see it, and of several that start at once one succeeds: a new journal takes the place of none, and
        one that is continued that of the journal whose lock is held. The file is looked at after the journal, in the order in which `finish` writes.
        """
        if not resume and self.output.exists():
            raise self._exists(self.output)
        holding: contextlib.AbstractContextManager[BinaryIO | None] = _locked(self.path) if resume else contextlib.nullcontext()
        with holding as old:
            file = _replace(self.path, text, new=old is None)
        if not resume and self.output.exists():  # another one has ended in between
            self.path.unlink()
            file.close()
            raise self._exists(self.output)
        return file

    def _exists(self, file: Path) -> CpbenchError:
        return CpbenchError(f"{file} exists.", f"Continue it with cpbench sweep --resume -o {self.output}, or choose another file.")

    def _append(self, entry: dict[str, Any]) -> None:
        good = self._file.tell()
        try:
            _write(self._file, _line(entry))
        except OSError as error:
            with contextlib.suppress(OSError):  # readers ignore a last line that was cut short
                self._file.truncate(good)
            raise self._lost(error) from error

    def _lost(self, error: OSError) -> CpbenchError:
        why = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else str(error.strerror)
        hint = f"What was finished is in {self.path}; then: cpbench sweep --resume -o {self.output}."
        return CpbenchError(f"The result cannot be written: {why}.", hint, SOME_FAILED)


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, allow_nan=False, separators=(",", ":")) + "\n"


def _write(file: BinaryIO, text: str) -> None:
    """All of it, on disk when this returns. The file has no buffer of its own that could fail later."""
    data = memoryview(text.encode())
    while data:
        data = data[file.write(data) :]
    os.fsync(file.fileno())


def _replace(path: Path, text: str, *, new: bool = False) -> BinaryIO:
    """Put `text` at `path` in one step; the file is locked and stays open for appending. Where it must be `new`, FileExistsError is raised if it is not."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")  # processes of two containers may have one number
    file = cast(BinaryIO, temporary.open("wb", buffering=0))
    try:
        _write(file, text)
        _lock(file, path)
        if new:
            _link(temporary, path)
        else:
            temporary.replace(path)
    except BaseException:
        file.close()
        temporary.unlink(missing_ok=True)
        raise
    return file


def _link(temporary: Path, path: Path) -> None:
    """Name a file as no other is named."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: what is there is seen, and only what appears in this moment is not
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        temporary.replace(path)
    else:
        temporary.unlink()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[BinaryIO | None]:
    """Hold the lock of the journal that is at `path`; None where there is none."""
    try:
        old = path.open("rb")
    except FileNotFoundError:
        yield None
        return
    with old:
        _lock(old, path)
        if not path.exists() or not os.path.samestat(os.fstat(old.fileno()), path.stat()):  # replaced between the two
            raise _taken(path)
        yield cast(BinaryIO, old)


def _lock(file: BinaryIO, path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _taken(path) from error


def _taken(path: Path) -> CpbenchError:
    return CpbenchError(f"{path} is being written by another cpbench.", "Wait until it has ended, or choose another file with -o.")


def _unwritable(output: Path, error: OSError) -> CpbenchError:
    return CpbenchError(f"{output} cannot be written: {error.strerror}.", "Choose another file with -o, in a folder that you can write.")
