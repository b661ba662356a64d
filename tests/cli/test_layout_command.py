"""What `cpbench layout` prints: pictures held against stored outputs, their ranks against layout.py, and the same as JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest

from cpbench.layout import Layout
from cpbench.report.layout_view import rank_lists

from .conftest import Cpbench, Golden

PICTURES = {
    "one_rank": "cp1",
    "eight_ranks": "cp2tp4/ep4tp2 tp2cp4 dp2cp4u2 pp2cp2tp2/dp2ep2",
    "many_ranks": "tp64 cp64u8 pp4dp2cp4tp2/dp2ep4tp2 dp2cp64 cp16tp8/ep128 pp32",
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name: str, cpbench_command: Cpbench, golden: Golden) -> None:
    ran = cpbench_command("layout", *PICTURES[name].split())
    assert (ran.code, ran.err) == (0, "")
    golden(f"layout_{name}", ran.out)


def test_help(cpbench_command: Cpbench, golden: Golden) -> None:
    ran = cpbench_command("layout", "--help")
    assert (ran.code, ran.err) == (0, "")
    golden("help_layout", ran.out)


@pytest.mark.parametrize("columns", [60, 80, 100, 120])
@pytest.mark.parametrize("name", " ".join(PICTURES.values()).split())
def test_a_picture_is_as_wide_as_the_terminal(name: str, columns: int, cpbench_command: Cpbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = cpbench_command("layout", name).out.splitlines()
    assert max(map(len, lines)) <= columns
    assert len(lines) <= 80


def grids(out: str) -> dict[str, dict[str, list[str]]]:
    """The grids of one picture by title, their rows by label."""
    found: dict[str, dict[str, list[str]]] = {}
    for block in out.split("\n\n"):
        title, *rows = block.splitlines()
        if "ranks by" in title:
            found[title] = {" ".join(re.findall(r"[a-z_]+\d+|^rank", row)): re.findall(r" (\d+|\.\.\.)(?= |$)", row) for row in rows[2:]}
    return found


@pytest.mark.parametrize("name", ["cp2tp4/ep4tp2", "dp2cp2tp2/dp2ep4", "cp4u2tp2", "pp2cp2tp4/ep2tp4"])
def test_every_rank_stands_at_its_place(name: str, cpbench_command: Cpbench) -> None:
    layout, found = Layout.parse(name), grids(cpbench_command("layout", name).out)
    assert len(found) == (2 if "/" in name else 1)
    for title, rows in found.items():
        across = title.rpartition(" ")[2]
        assert [rank for row in rows.values() for rank in row] == [str(rank) for rank in range(layout.world_size)]
        for label, row in rows.items():
            for column, rank in enumerate(map(int, row)):
                at = {axis: rank // layout.stride(axis) % layout.size(axis) for axis in (*re.findall(r"[a-z_]+", label), across)}
                assert " ".join(f"{axis}{place}" for axis, place in at.items()) == f"{label} {across}{column}"


def test_what_does_not_fit_is_cut_with_its_count(cpbench_command: Cpbench) -> None:
    (title, rows), *_ = grids(cpbench_command("layout", "dp32tp32").out).items()
    assert title == "Attention: ranks by dp and tp"
    assert len(rows) == 16
    shown = len(rows["dp0"]) - 1
    assert rows["dp0"] == [*map(str, range(shown - 1)), "...", "31"]
    assert rows["dp31"][-1] == "1023"
    out = cpbench_command("layout", "dp32tp32").out
    assert f"+{32 - shown}  tp31" in out
    assert "... +17 rows" in out


def test_stages_of_many_ranks_follow_from_the_first(cpbench_command: Cpbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    out = cpbench_command("layout", "pp4cp4tp2").out
    assert out.startswith("pp4cp4tp2: 32 ranks in 4 pipeline stages of 8\n")
    assert list(grids(out)) == ["Attention, stage 0: ranks by cp and tp"]
    assert "The other stages are alike: add 8*k for stage k, up to 3.\n" in out
    assert "[0,8,16,24] [1,9,17,25] ... [7,15,23,31]" in out


def test_rank_lists_are_cut_where_they_are_long() -> None:
    assert rank_lists(Layout.parse("cp2tp4").groups("cp")) == "[0,4] [1,5] [2,6] [3,7]"
    assert rank_lists(Layout.parse("cp16tp8").groups("cp")) == "[0,8,...,120] [1,9,...,121] ... [7,15,...,127]"
    assert rank_lists(Layout.parse("cp16tp8").groups("tp")) == "[0-7] [8-15] ... [120-127]"
    assert rank_lists(Layout.parse("cp2tp32").groups("tp")) == "[0-31] [32-63]"
    assert rank_lists(Layout.parse("cp2tp8").groups("cp")) == "[0,8] [1,9] ... [7,15]"


def test_notes_and_defaults_are_said(cpbench_command: Cpbench) -> None:
    assert "Experts would be cut over all 8 ranks of a stage: moe_tp=8.\n" in cpbench_command("layout", "pp2tp8").out
    assert "Experts would be cut" not in cpbench_command("layout", "tp8/ep8").out
    assert cpbench_command("layout", "pp2cp8").out.endswith("Note: SGLang 0.5.9 needs pp=1 with cp > 1; 0.5.12 and later do not.\n")
    assert "Note:" not in cpbench_command("layout", "cp8").out


def test_json(cpbench_command: Cpbench) -> None:
    ran = cpbench_command("layout", "pp2cp2u2/ep2", "tp1", "--json")
    assert (ran.code, ran.err) == (0, "")
    hybrid, single = json.loads(ran.out)
    assert hybrid == {
        "name": "pp2cp2u2/ep2",
        "ranks": 4,
        "ranks_per_stage": 2,
        "sizes": {"pp": 2, "dp": 1, "cp": 2, "tp": 1, "ring": 1, "ulysses": 2, "moe_dp": 1, "ep": 2, "moe_tp": 1},
        "strides": {"pp": 2, "dp": 2, "cp": 1, "tp": 1, "ring": 2, "ulysses": 1, "moe_dp": 2, "ep": 1, "moe_tp": 1},
        "coordinates": [
            {"pp": 0, "dp": 0, "cp": 0, "tp": 0, "ring": 0, "ulysses": 0, "moe_dp": 0, "ep": 0, "moe_tp": 0},
            {"pp": 0, "dp": 0, "cp": 1, "tp": 0, "ring": 0, "ulysses": 1, "moe_dp": 0, "ep": 1, "moe_tp": 0},
            {"pp": 1, "dp": 0, "cp": 0, "tp": 0, "ring": 0, "ulysses": 0, "moe_dp": 0, "ep": 0, "moe_tp": 0},
            {"pp": 1, "dp": 0, "cp": 1, "tp": 0, "ring": 0, "ulysses": 1, "moe_dp": 0, "ep": 1, "moe_tp": 0},
        ],
        "groups": {
            "pp": [[0, 2], [1, 3]],
            "dp": [[0], [1], [2], [3]],
            "cp": [[0, 1], [2, 3]],
            "tp": [[0], [1], [2], [3]],
            "ring": [[0], [1], [2], [3]],
            "ulysses": [[0, 1], [2, 3]],
            "moe_dp": [[0], [1], [2], [3]],
            "ep": [[0, 1], [2, 3]],
            "moe_tp": [[0], [1], [2], [3]],
            "stage": [[0, 1], [2, 3]],
        },
        "notes": ["SGLang 0.5.9 needs pp=1 with cp > 1; 0.5.12 and later do not."],
    }
    assert (single["name"], single["ranks"], single["groups"]["stage"]) == ("cp1", 1, [[0]])


@pytest.mark.parametrize(
    ("arguments", "err"),
    [
        ("cp4/ep3", "error: cp4 has 4 ranks, and the expert axes /ep3 are 3 ranks.\nhint:  The nearest valid layout is cp4/ep4.\n"),
        ("cp8 cp8u3", "error: u=3 does not divide cp=8.\nhint:  The nearest valid value is u=2.\n"),
        ("", "error: Missing argument 'NAME'.\nhint:  See cpbench layout --help.\n"),
    ],
)
def test_bad_names_are_refused(arguments: str, err: str, cpbench_command: Cpbench) -> None:
    assert cpbench_command("layout", *arguments.split()) == (2, "", err)


def test_no_torch_is_imported() -> None:
    code = "import sys; from cpbench.cli import run; assert run(['layout', 'cp2tp4/ep8']) == 0; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "False"
