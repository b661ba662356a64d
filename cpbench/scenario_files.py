"""Scenario files: which ones come with cpbench, what a name or a path means, and what `extends` inherits.

The files are those of `scenarios/` in the repository: a link beside this module leads there, and an installation has them in its place. A file
that extends another one has its fields wherever it says nothing itself. What the fields mean and whether they fit together is in scenario.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from cpbench.errors import CpbenchError, unknown
from cpbench.fields import group_of_fields
from cpbench.scenario import EXTENDS, Scenario, without_replaced
from cpbench.yaml_input import read_mapping

LIBRARY = Path(__file__).parent / "scenarios"
SUFFIXES = (".yaml", ".yml")
MOST_FILES = 8  # a scenario and all that it rests on
QUESTION = re.compile(r"[^?]*\?")


def library() -> dict[str, Path]:
    """The scenarios that come with cpbench, by name."""
    return {file.stem: file for file in sorted(LIBRARY.glob("*.yaml"))}


def find(asked: str | Path) -> Path:
    """The file that `--scenario` means: a name of the library, or a path. Raises CpbenchError for a word that is neither."""
    text = str(asked)
    files = library()
    if not _is_path(text) and text in files:
        return files[text]
    if _is_path(text) or _exists(Path(text)):
        return Path(text)
    error = unknown("scenario", text, files)
    raise CpbenchError(error.message, f"{error.hint} A file is named with its suffix, such as mine.yaml.")


def read_file(asked: str | Path) -> dict[str, Any]:
    """The fields in a scenario file and in those that it extends, not checked yet; `name` is the file's where it says none. Raises CpbenchError."""
    file = find(asked)
    stem = re.sub(r"[^A-Za-z0-9._-]", "-", file.stem).lstrip("._-")
    return {"name": stem[:80] or "sweep", **_with_bases(file, ())}


def question(file: Path) -> str:
    """What a scenario of the library answers: the comment below the schema's line, up to the question mark."""
    lines = file.read_text(encoding="utf-8").splitlines()[1:]
    text = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    found = QUESTION.match(text)
    return found[0] if found else ""


def _is_path(text: str) -> bool:
    return "/" in text or text.endswith(SUFFIXES)


def _exists(file: Path) -> bool:
    """Also False for what cannot be the name of a file."""
    try:
        return file.exists()
    except (OSError, ValueError):
        return False


def _with_bases(file: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The fields of a file over those of what it extends; `above` are the files that extend it, the first one first."""
    own = read_mapping(file)
    if EXTENDS not in own:
        return own
    base = _base(own.pop(EXTENDS), file)
    files = (*above, file)
    if base.resolve() in [one.resolve() for one in files]:
        chain = " extends ".join(one.name for one in (*files, base))
        raise CpbenchError(f"{chain}: a scenario cannot rest on itself.", f"Leave extends out of {file.name}, or name another scenario there.")
    if len(files) == MOST_FILES:
        hint = f"At most {MOST_FILES} files rest on each other: let {files[0].name} extend a file further down."
        raise CpbenchError(f"{files[0].name} rests on more than {MOST_FILES - 1} other scenarios.", hint)
    inherited = _with_bases(base, files)
    inherited.pop("name", None)  # a name is of one file
    return _over(inherited, own)


def _base(named: Any, file: Path) -> Path:
    """The file that `extends` means: a name of the library, or a path from the folder of the file that says it."""
    files = library()
    if not isinstance(named, str) or not named.strip():
        raise CpbenchError(f"{file.name}: extends: {str(named)[:40]!r} is not a scenario.", f"Name one, or a file: {', '.join(files)}.")
    name = named.strip()
    if not _is_path(name):
        if name not in files:
            error = unknown("scenario", name, files)
            raise CpbenchError(f"{file.name} extends {name[:40]!r}, which is no scenario.", f"{error.hint} A file is named with its suffix, such as mine.yaml.")
        return files[name]
    base = file.parent / name
    if not _exists(base):
        hint = f"A path starts at the folder of {file.name}; scenarios by name are {', '.join(files)}."
        raise CpbenchError(f"{file.name} extends {name[:80]!r}, which is not there.", hint)
    return base


def _over(inherited: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Own fields over inherited ones: groups field by field, lists as a whole; batches and layouts said another way are replaced."""
    merged = without_replaced(inherited, own)
    for name, value in own.items():
        below = merged.get(name)
        is_group = name in Scenario.model_fields and group_of_fields(Scenario, name) is not None
        merged[name] = {**below, **value} if is_group and isinstance(below, dict) and isinstance(value, dict) else value
    return merged
