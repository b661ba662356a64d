"""Which file a resumed sweep continues, and what is to be measured according to it. Running it is driver.py's part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cpbench.environment import Machine, capture, check_same
from cpbench.errors import UNREADABLE, CpbenchError, unknown
from cpbench.reading import read
from cpbench.results import FAILED, ResultFile
from cpbench.scenario import Scenario, parse_scenario

RESULTS = Path("results")
RETRIED = (*FAILED, "skipped")  # what a run can turn out otherwise: `ok` and `unsupported` cannot


def find(output: Path | None) -> tuple[Path, ResultFile]:
    """The result to continue: the named one, or the newest unfinished one in results/; its .json path and what is known of it.

    Raises CpbenchError (exit code 2 where there is nothing to continue, 4 where the file cannot be read).
    """
    if output is not None:
        named = read(_newest_form(output))
        if named.run.kind != "sweep":
            raise CpbenchError(f"{output} is of {named.run.kind}, which is not continued.", f"Run cpbench {named.run.kind} again, with another file.")
        return output.with_suffix(".json"), named
    for file in _newest_first(RESULTS):
        try:
            result = read(_newest_form(file))
        except CpbenchError:  # not a result: what to do about it is not the question here
            continue
        if not result.run.complete and result.run.kind == "sweep":
            return file, result
    raise CpbenchError(f"There is no unfinished result in {RESULTS}/.", "Name the file to continue: cpbench sweep --resume -o FILE.")


def scenario_of(result: ResultFile, file: Path, limits: dict[str, str]) -> Scenario:
    """The resolved scenario of a file, with other limits where given. Raises CpbenchError (exit code 4) where it is damaged."""
    stored: dict[str, Any] = dict(result.run.scenario)
    try:
        scenario = parse_scenario(stored)
    except CpbenchError as error:
        raise CpbenchError(f"{file} does not say what was measured: {error.message}", error.hint, UNREADABLE) from error
    changed = {**scenario.model_dump(mode="json"), "limits": {**scenario.limits.model_dump(mode="json"), **limits}}
    return parse_scenario(changed) if limits else scenario


def retried(names: str) -> tuple[str, ...]:
    """`oom,crash` -> statuses that are run again. Raises CpbenchError for a status that cannot be."""
    statuses = tuple(name.strip() for name in names.split(",") if name.strip())
    for status in statuses:
        if status not in RETRIED:
            raise unknown("status to retry", status, RETRIED)
    return statuses


def require_same_machine(result: ResultFile, machine: Machine) -> None:
    """Raises CpbenchError where the file was measured in another environment."""
    try:
        check_same(result.environment, capture(machine))
    except CpbenchError as error:
        raise CpbenchError(error.message, "Start a new file with -o, or continue this one anyway with --force.") from error


def describe(result: ResultFile, file: Path, retry: tuple[str, ...]) -> str:
    """`results/x.json has 7 ok, 1 crash; runs what is missing, and again: interrupted`."""
    counts = Counter(cell.status for cell in result.cells)
    known = ", ".join(f"{count} {status}" for status, count in counts.items()) or "no cell"
    return f"{file} has {known}. Runs what is missing" + (f", and again what is {', '.join(retry)}." if retry else ".")


def _newest_form(file: Path) -> Path:
    """The journal where there is one: it holds all that the finished file does, and more."""
    journal = file.with_suffix(".jsonl")
    return journal if journal.exists() else file.with_suffix(".json")


def _newest_first(folder: Path) -> Iterator[Path]:
    """Result files of a folder by their last change, a journal and its file as one."""
    files = [path for path in folder.glob("*.json*") if path.suffix in (".json", ".jsonl")]
    newest = sorted(files, key=lambda path: (path.stat().st_mtime, path.name), reverse=True)
    return iter(dict.fromkeys(path.with_suffix(".json") for path in newest))
