"""What `cpbench explain` prints: held against stored outputs, and its errors."""

import json

import pytest

CASES = {
    "tp4sp_layer": "--layout tp4sp --layer 0",
    "experts": "--layout cp2tp2sp/ep4 --model deepseek-v3-tiny --set layers=2 --seq 4k --rank 1",
    "nothing": "--layout cp1",
}


@pytest.mark.parametrize("name", CASES)
def test_exchanges(cpbench_command, golden, name):
    ran = cpbench_command("explain", *CASES[name].split())
    assert ran.code == 0
    golden(f"explain_{name}", ran.out)


def test_help(cpbench_command, golden):
    golden("help_explain", cpbench_command("explain", "--help").out)


def test_json(cpbench_command):
    found = json.loads(cpbench_command("explain", "--layout", "tp2sp", "--layer", "0", "--seq", "1k", "--json").out)
    assert [one["operation"] for one in found["transitions"]] == ["all_gather", "reduce_scatter"] * 2
    assert (found["rank"], found["layers"], found["cell"]["layout"]) == (0, [0], "tp2sp")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            "--layout tp4sp --layer 7",
            "error: Rank 0 of tp4sp runs no layer 7 of qwen3-tiny.\nhint:  The nearest it runs is --layer 0; --set layers=N runs more.\n",
        ),
        ("--layout tp4 --rank 9", "error: tp4 has no rank 9.\nhint:  Its ranks are 0 to 3; the nearest is 3.\n"),
        ("--layout tp3sp", "error: tp3sp cannot run: 8 query heads of qwen3-tiny do not divide over tp=3.\nhint:  The nearest valid layout is tp2sp.\n"),
        ("--layout cp2sp", "error: layouts: sp in cp2sp cuts rows over tp, and tp is 1.\nhint:  The nearest valid layouts are cp2 and cp2tp2sp.\n"),
    ],
)
def test_errors(cpbench_command, asked, message):
    ran = cpbench_command("explain", *asked.split())
    assert (ran.code, ran.err) == (2, message)
