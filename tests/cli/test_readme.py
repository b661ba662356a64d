"""The README is true: its commands run, its table is what `show` prints, its links and names exist.

Long measurements are run with a short sequence instead, and installing and testing are checked by `.ci/run`; what is replaced is below.
"""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from rich.console import Console
from typer.main import get_command

import cpbench.driver
from cpbench.cli import app
from cpbench.options import MORE
from cpbench.reading import read
from cpbench.report.listing import LISTS
from cpbench.report.rows import group_rows
from cpbench.report.table import Notes, table
from cpbench.results import Status
from tests.unit.fakes import FakeLauncher

from . import samples
from .conftest import Cpbench

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLE = re.compile(r"<!-- table: (\S+) -->\n(.*?)<!-- end of table -->", re.DOTALL)
OUTPUT = re.compile(r"<!-- output: (.*?) -->\n(.*?)<!-- end of output -->", re.DOTALL)
TABLE_COLUMNS = "120"
MAIN = "pip install -c constraints.txt . && cpbench sweep --seq 36k --cp 2,4,8"
TESTS = "pip install -c constraints.txt -e '.[dev]' && pytest"
REPLACED = {  # real ranks, minutes less
    "sweep --seq 36k --cp 2,4,8": "sweep --seq 256 --cp 2,4",
    "profile --seq 36k --cp 2 --strategy ring -o results/ring.json": "profile --seq 256 --cp 2 --strategy ring -o results/ring.json",
    "sweep --seq 8k --cp 2 --ab strategy=ring strategy=allgather": "sweep --seq 256 --cp 2 --ab strategy=ring strategy=allgather",
    "project --seq 4k --cp 2 --compute measured": "project --seq 512 --cp 2 --compute measured",
    "maxseq --layouts cp2,tp2 --memory-limit 64M": "maxseq --layouts cp2 --strategy ring --memory-limit 32M --precision 50%",
}


def commands(page: str = README) -> list[list[str]]:
    """Every command of a page's sh blocks, comments removed."""
    lines = "".join(re.findall(r"^```sh\n(.*?)^```", page, re.DOTALL | re.MULTILINE)).splitlines()
    return [shlex.split(part, comments=True) for line in lines for part in line.split("&&")]


def cpbench_commands(page: str = README) -> list[str]:
    return [shlex.join(command[1:]) for command in commands(page) if command[0] == "cpbench"]


def test_the_two_commands_stand_there_as_they_are() -> None:
    assert README.count(f"\n{MAIN}\n") == README.count(f"\n{TESTS}\n") == 1
    assert {command[0] for command in commands()} == {"pip", "cpbench", "pytest"}


def test_what_pip_is_given_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for command in (command for command in commands() if command[0] == "pip"):
        assert command[:3] == ["pip", "install", "-c"]
        assert (ROOT / command[3]).is_file()
        assert command[4:] in (
            [
                ".",
            ],
            ["-e", ".[dev]"],
        )
    assert "dev" in project["optional-dependencies"]
    pins = (ROOT / "constraints.txt").read_text()
    for requirement in project["dependencies"]:
        assert re.search(rf"^{re.match(r'[A-Za-z0-9-]+', requirement)[0]}==", pins, re.MULTILINE), requirement  # type: ignore[index]


@pytest.mark.parametrize("command", cpbench_commands())
def test_command_runs(command: str, cpbench_command: Cpbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("scenarios", "results/samples"):
        (tmp_path / folder).parent.mkdir(exist_ok=True)
        (tmp_path / folder).symlink_to(ROOT / folder)
    if command not in REPLACED:
        monkeypatch.setattr(cpbench.driver, "Torchrun", FakeLauncher)
    ran = cpbench_command(*shlex.split(REPLACED.get(command, command)))
    assert ran.code == 0, ran.err
    assert ran.out


def test_the_main_command_is_run_with_real_ranks() -> None:
    assert set(REPLACED) <= set(cpbench_commands())


def test_table_is_what_show_prints(request: pytest.FixtureRequest, cpbench_command: Cpbench, monkeypatch: pytest.MonkeyPatch) -> None:
    found = TABLE.search(README)
    assert found
    monkeypatch.setenv("COLUMNS", TABLE_COLUMNS)
    ran = cpbench_command("show", str(ROOT / found[1]))
    lines = [line.rstrip() for line in ran.out.splitlines()]
    block = "\n".join(["```text", *lines, "```", ""])
    if request.config.getoption("--regenerate", default=False):
        text = (ROOT / "README.md").read_text(encoding="utf-8")  # which another test may have written
        (ROOT / "README.md").write_text(TABLE.sub(lambda one: one[0].replace(one[2], block), text))
        pytest.skip("wrote the README's table")
    assert found[2] == block


def check_outputs(page: Path, cpbench_command: Cpbench, monkeypatch: pytest.MonkeyPatch, *, regenerate: bool) -> int:
    """Hold the outputs of a page against what its commands print, or write them anew. Returns how many there are."""
    monkeypatch.setenv("COLUMNS", TABLE_COLUMNS)
    monkeypatch.chdir(ROOT)
    text = page.read_text(encoding="utf-8")
    found = list(OUTPUT.finditer(text))
    for one in reversed(found):
        assert one[1] in cpbench_commands(text)
        ran = cpbench_command(*shlex.split(one[1]))
        assert ran.code == 0, ran.err
        block = "\n".join(["```text", *(line.rstrip() for line in ran.out.splitlines()), "```", ""])
        if regenerate:
            text = text[: one.start(2)] + block + text[one.end(2) :]
            continue
        assert one[2] == block
    if regenerate and found:
        page.write_text(text, encoding="utf-8")
        pytest.skip(f"wrote the outputs of {page.name}")
    return len(found)


def test_outputs_are_what_commands_print(request: pytest.FixtureRequest, cpbench_command: Cpbench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_outputs(ROOT / "README.md", cpbench_command, monkeypatch, regenerate=request.config.getoption("--regenerate", default=False))


def test_every_flag_is_explained() -> None:
    flags = {name for option in get_command(app).commands["sweep"].params for name in option.opts if name.startswith("--")}  # type: ignore[attr-defined]
    hidden = {name for option in get_command(app).commands["sweep"].params if getattr(option, "hidden", False) for name in option.opts}  # type: ignore[attr-defined]
    assert "--pair" in hidden and hidden < flags
    assert {name for name in hidden if name not in MORE or name not in README} == set()


def test_every_column_and_status_is_explained() -> None:
    wide = Console(width=1000)
    tables = [table(group, Notes(), wide) for group in group_rows(samples.troubled().cells, samples.CORES)]
    heads = {re.sub(r"\W", "", str(column.header)) for made in tables for column in made.columns}
    explained = {re.sub(r"\W", "", row.split("|")[1]) for row in README.splitlines() if row.startswith("| ")}
    assert heads <= explained
    for status in get_args(Status):
        assert f"`{status}`" in README


def test_names_and_links_exist() -> None:
    for link in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / link).exists(), link
    assert set(re.findall(r"cpbench list (\w+)", README)) <= set(LISTS)
    sample = TABLE.search(README)
    assert sample and read(ROOT / sample[1]).run.complete
