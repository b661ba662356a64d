"""Running the command line in this process, and stored outputs.

`pytest tests/cli --regenerate` writes the stored outputs anew: read the difference before you commit it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import cpbench.environment
from cpbench.cli import run
from cpbench.environment import Machine

GOLDEN = Path(__file__).parent / "golden"
CPU = Machine("cpu", 0, 2, 8 << 30, "Example CPU")
CUDA = Machine("cuda", 2, 16, 64 << 30, "Example CPU", ("NVIDIA H200", "NVIDIA H200"), 139 << 30, "580.1")
Golden = Callable[[str, str], None]
Pretend = Callable[[Machine], None]


class Ran(NamedTuple):
    """What one command left."""

    code: int
    out: str
    err: str


Cpbench = Callable[..., Ran]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--regenerate", action="store_true", help="write the stored outputs of tests/cli anew")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """Compare a text with the stored one of that name. Spaces at line ends are how rich pads, and do not count."""

    def check(name: str, text: str) -> None:
        file = GOLDEN / f"{name}.txt"
        plain = "".join(f"{line.rstrip()}\n" for line in text.splitlines())
        if request.config.getoption("--regenerate", default=False):
            file.parent.mkdir(exist_ok=True)
            file.write_text(plain, encoding="utf-8")
        assert file.exists(), "no stored output: pytest tests/cli --regenerate"
        assert plain == file.read_text(encoding="utf-8")

    return check


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Pretend:
    """Let commands believe that they run on another machine."""

    def use(pretended: Machine) -> None:
        monkeypatch.setattr(cpbench.environment, "detect_machine", lambda: pretended)

    use(CPU)
    return use


@pytest.fixture
def cpbench_command(machine: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cpbench:
    """Run a command in this process, in an empty folder, on a CPU machine with two cores and 100 columns without colours."""
    for variable in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS", "TERMINAL_WIDTH", "TTY_COMPATIBLE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)

    def command(*arguments: str) -> Ran:
        capsys.readouterr()
        code = run(list(arguments))
        return Ran(code, *capsys.readouterr())

    return command
