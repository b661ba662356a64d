"""What a shell is offered for the values of flags, asked as bash asks; no answer imports torch or anything else that takes long."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cpbench import completion
from cpbench.experts import RULES
from cpbench.models.presets import PRESETS
from cpbench.partition import PARTITIONS
from cpbench.plot import FIGURES, FOREST
from cpbench.report.listing import LISTS
from cpbench.resume import RETRIED
from cpbench.scenario import Scenario
from cpbench.strategies import STRATEGIES

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "pandas", "matplotlib", "scipy", "numpy")


def asked(line: str, *options: str) -> subprocess.CompletedProcess[str]:
    """What bash gets for the last word of a line, empty behind a space."""
    variables = {"_CPBENCH_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(f"{line}.".split()) - 1)}
    command = [sys.executable, *options, "-m", "cpbench"]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT), **variables}, capture_output=True, text=True, check=False)


def test_strategies_are_offered_and_nothing_heavy_is_imported() -> None:
    ran = asked("cpbench sweep --strategy ", "-X", "importtime")
    assert set(STRATEGIES) - {"none"} <= set(ran.stdout.split())
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in ran.stderr.splitlines() if line.startswith("import time:")}
    assert "cpbench" in imported
    assert imported.isdisjoint(HEAVY)


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("cpbench verify --strategy ring,ul", {"ring,ulysses", "ring,ulysses-gather"}),
        ("cpbench project --model llama3-7", {"llama3-70b"}),
        ("cpbench sweep --set timing.max_s", {"timing.max_samples=", "timing.max_seconds="}),
    ],
)
def test_values_begin_with_what_was_typed(line: str, offered: set[str]) -> None:
    assert set(asked(line).stdout.split()) == offered


def test_what_is_offered_is_what_there_is() -> None:
    assert set(completion.models()) == set(PRESETS)
    assert set(completion.partitions()) == set(PARTITIONS)
    assert set(completion.figures()) == {*FIGURES, FOREST}
    assert set(completion.LISTED()) == set(LISTS)
    assert set(completion.RETRIED()) == set(RETRIED)
    assert set(completion.ROUTERS()) == set(RULES)
    assert {name.partition("=")[0].partition(".")[0] for name in completion.settings()} == set(Scenario.model_fields)
    assert completion.choices("target")() == ["prefill", "layer", "attention"]
    assert completion.choices("dtype")() == ["float32", "bfloat16", "float16", "float64"]


def test_of_a_list_the_last_name_is_completed_and_none_twice() -> None:
    complete = completion.list_of(completion.words("ring", "usp"))
    assert complete("") == ["ring", "usp"]
    assert complete("usp,") == ["usp,ring"]
    assert complete("ring,u") == ["ring,usp"]


def test_the_script_for_a_shell_is_printed() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [sys.executable, "-m", "cpbench", "--show-completion", "bash"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0
    assert "_CPBENCH_COMPLETE=complete_bash" in ran.stdout
