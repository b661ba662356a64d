"""The pages in docs/ are true: their commands and their Python run, their outputs are what is printed, their names, links and messages exist."""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import cpbench.driver
from cpbench.strategies import STRATEGIES
from tests.unit.fakes import FakeLauncher

from .conftest import Cpbench
from .test_readme import ROOT, check_outputs, cpbench_commands

DOCS = sorted((ROOT / "docs").glob("*.md"))
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMANDS = [(file.name, command) for file in DOCS for command in cpbench_commands(file.read_text(encoding="utf-8"))]
WITH_PYTHON = [file for file in DOCS if PYTHON.search(file.read_text(encoding="utf-8"))]
PLACEHOLDER = "\0"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where readers are: samples and scenarios lie below."""
    (tmp_path / "results").mkdir()
    for name in ("scenarios", "results/samples"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_command_runs(page: str, command: str, folder: Path, cpbench_command: Cpbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpbench.driver, "Torchrun", FakeLauncher)
    before = (ROOT / "results/samples/cpu_36k.json").read_bytes()
    ran = cpbench_command(*shlex.split(command))
    assert ran.code == 0, ran.err
    assert (ROOT / "results/samples/cpu_36k.json").read_bytes() == before


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda file: file.stem)
def test_python_runs(page: Path, folder: Path) -> None:
    """All blocks of a page as one script, in a process of its own: pages may add to the registries."""
    script = folder / "page.py"
    script.write_text("\n".join(PYTHON.findall(page.read_text(encoding="utf-8"))), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, script], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("page", DOCS, ids=lambda file: file.stem)
def test_outputs_are_what_commands_print(page: Path, request: pytest.FixtureRequest, cpbench_command: Cpbench, monkeypatch: pytest.MonkeyPatch) -> None:
    check_outputs(page, cpbench_command, monkeypatch, regenerate=request.config.getoption("--regenerate", default=False))


@pytest.mark.parametrize("page", DOCS, ids=lambda file: file.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    assert {file.name for file in DOCS} - {"README.md"} == set(re.findall(r"\]\((\w+\.md)\)", index))


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_has_a_section_with_a_picture(name: str) -> None:
    sections = re.split(r"^## ", (ROOT / "docs/strategies.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    section = next((text for text in sections if f"`{name}`" in text.splitlines()[0]), "")
    assert "```text" in section, "docs/strategies.md: a heading with the name, what it sends, keeps and is for, and a picture"


@cache
def texts_of_the_program() -> list[str]:
    """Every text in the source but docstrings, with a placeholder for what is filled in."""
    found = []
    for file in (ROOT / "cpbench").rglob("*.py"):
        nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                found.append("".join(str(part.value) if isinstance(part, ast.Constant) else PLACEHOLDER for part in node.values))
    return found


def says(text: str, message: str) -> bool:
    """Whether a text of the program may be a message, in which `...` stands for what is filled in and for what goes on."""
    parts = [re.escape(part) for part in message.split("...")]
    return re.search(".*".join(parts), text, re.DOTALL) is not None


def test_messages_that_are_explained_exist() -> None:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^### `(.+)`$", prose, re.MULTILINE)
    inline = [span for span in re.findall(r"`([^`\n]+)`", prose) if "..." in span.strip(".")]
    assert len(headings) >= 30
    missing = [message for message in {*headings, *inline} if not any(says(text, message) for text in texts_of_the_program())]
    assert missing == []


def test_a_message_that_is_not_there_is_noticed() -> None:
    assert says(f"needs {PLACEHOLDER} GPUs, this machine has {PLACEHOLDER}", "needs ... GPUs, this machine has ...")
    assert not says(f"needs {PLACEHOLDER} GPUs, there are {PLACEHOLDER}", "needs ... GPUs, this machine has ...")


def test_the_figure_of_the_readme_shows_the_sample(folder: Path, cpbench_command: Cpbench) -> None:
    ran = cpbench_command("plot", "results/samples/cpu_36k.json", "--figure", "pareto", "-o", "docs")
    assert ran.code == 0, ran.err
    drawn, stored = ((place / "docs/cpu_36k-pareto.svg").read_text(encoding="utf-8") for place in (folder, ROOT))
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", stored)
    assert "cp4 ulysses" in texts and "hollow: more threads than cores" in texts
    assert texts == re.findall(r"<text[^>]*>([^<]+)</text>", drawn)
