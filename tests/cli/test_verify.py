"""`cpbench verify` on the command line: its table, exit codes, JSON, and what is refused before anything runs."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

import cpbench.verify
from cpbench.cell import Cell
from cpbench.distributed.traffic import Traffic
from cpbench.layout import Layout
from cpbench.numerics import Check, Counted
from cpbench.report.verification import Progress
from cpbench.strategies import STRATEGIES
from cpbench.strategies.ring import Ring
from cpbench.verify import CONFIGS, Row

from .conftest import Cpbench, Golden

# zigzag blocks of rank 0: 17 and 10 new tokens and 3 cached ones, K and V of 2 heads of 64 in fp32
MOST_BYTES = (17 + 10 + 3) * 2 * 2 * 64 * 4
ONE_BATCH = ("verify", "--cp", "2", "--lengths", "33,20", "--prefix", "5,0", "--dtype", "float32")


def cell(strategy: str, layout: str, partition: str, lengths: tuple[int, ...] = (101, 67, 130)) -> Cell:
    return Cell("attention", CONFIGS["8:2"], 1, Layout.parse(layout), strategy, partition, "auto", "bfloat16", "cpu", lengths)


def counted(calls: int, predicted: int, axis: str = "cp") -> Counted:
    return Counted(0, Traffic({(axis, "send_recv"): (calls, 4096 * calls)}), Traffic({("cp", "send_recv"): (predicted, 4096 * predicted)}))


def rows() -> list[Row]:
    right = Check(True, None, 1.03, 2.31e-3, "", True, None, 298, 5.9e-3, True, False, counted(7, 7))
    equal = replace(right, ratio=1.0, bitwise_equal=True, remote_tokens_used=None, collectives=counted(0, 0))
    far = replace(right, passed=False, ratio=412.7, relative_rmse=0.951, max_error=1.7, remote_tokens_used=False, reason="the answer is far off")
    chatty = replace(right, passed=False, collectives=counted(8, 7), reason="rank 0 counted too many")
    other = replace(right, passed=False, collectives=counted(7, 7, "tp"), reason="rank 0 counted others")
    nan = Check(False, "3 of 298 rows have values that are not finite", finite=False, bitwise_equal=False, collectives=counted(7, 7))
    off = "context parallelism is off: a sequence of 3 new tokens is shorter than 2*cp = 16"
    return [
        Row(cell("ring", "cp8", "zigzag"), "ok", None, right),
        Row(cell("ulysses", "cp8", "contiguous"), "ok", None, equal),
        Row(replace(cell("allgather", "cp8", "interleave"), head_groups=2), "wrong", far.reason, far),
        Row(cell("pass-q", "cp8", "zigzag"), "wrong", chatty.reason, chatty),
        Row(cell("usp", "cp8u2", "zigzag"), "wrong", other.reason, other),
        Row(cell("usp", "cp8u4", "zigzag"), "wrong", nan.reason, nan),
        Row(cell("usp", "cp8u4", "contiguous"), "wrong", "ValueError: a bug (usp.py:12)"),
        Row(cell("torch-cp", "cp8", "zigzag"), "skipped", "needs processes: checked by sweep"),
        Row(cell("ring", "cp8", "zigzag", (64, 3)), "off", off, equal),
    ]


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid whose rows are those above."""
    monkeypatch.setattr(cpbench.verify, "run", lambda entries, device, starting: iter(rows()))


def test_help(cpbench_command: Cpbench, golden: Golden) -> None:
    ran = cpbench_command("verify", "--help")
    assert (ran.code, ran.err) == (0, "")
    golden("help_verify", ran.out)


@pytest.mark.parametrize("columns", [80, 100, 120])
def test_table(columns: int, planted: None, cpbench_command: Cpbench, golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    ran = cpbench_command("verify", "-q")
    assert (ran.code, ran.err) == (1, "")
    assert max(len(line) for line in ran.out.splitlines()) <= columns
    golden(f"verify_{columns}", ran.out)


def test_a_grid_that_is_right(cpbench_command: Cpbench) -> None:
    ran = cpbench_command(*ONE_BATCH, "--strategy", "ring,ulysses")
    assert ran.code == 0, ran
    assert ran.err.startswith("8 rows on cpu, kernel cpu_flash: ranks as threads of one process")
    assert "attention of 8:2 heads, 33@5+20, float32" in ran.out
    assert ran.out.splitlines()[-1] == "8 rows: all right"


def test_json(cpbench_command: Cpbench) -> None:
    ran = cpbench_command(*ONE_BATCH, "--strategy", "ring", "--json", "-q")
    assert (ran.code, ran.err) == (0, "")
    data = json.loads(ran.out)
    assert data["counts"] == {"ok": 4}
    row = data["rows"][0]
    assert (row["key"]["strategy"], row["key"]["layout"], row["verdict"]) == ("ring", "cp2", "ok")
    assert 0 < row["relative_rmse"] < 1e-5 and row["remote_tokens_used"] is True and row["finite"] is True
    assert row["collectives"]["counted"] == row["collectives"]["predicted"] == {"cp": {"send_recv": {"bytes": MOST_BYTES, "calls": 1}}}
    assert row["collectives"]["rank"] == 1


def test_a_wrong_strategy_gives_exit_code_1(cpbench_command: Cpbench, monkeypatch: pytest.MonkeyPatch) -> None:
    class Zeros(Ring):
        def attend(self, *arguments):  # type: ignore[no-untyped-def]
            return super().attend(*arguments).zero_()

    monkeypatch.setitem(STRATEGIES, "ring", Zeros())
    ran = cpbench_command(*ONE_BATCH, "--strategy", "ring,ulysses", "--set", "target=attention")
    assert ran.code == 1
    found = [line for line in ran.out.splitlines() if line.startswith("wrong:")]
    assert len(found) == 3
    assert found[0].startswith("wrong: cp2 ring zigzag, attention of 8:2 heads, 33@5+20, float32: the answer is all")
    assert ran.err.count("wrong: cp2 ring") == 3, "said as soon as it is known"
    assert ran.out.splitlines()[-1] == "6 rows: 3 wrong"


def test_interrupted_shows_what_has_run(cpbench_command: Cpbench, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(entries, device, starting):  # type: ignore[no-untyped-def]
        yield rows()[0]
        raise KeyboardInterrupt

    monkeypatch.setattr(cpbench.verify, "run", interrupted)
    ran = cpbench_command("verify", "-q")
    assert ran.code == 130
    assert ran.out.splitlines()[-1] == "1 row: all right; interrupted"


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ("--strategy rng", "Unknown strategy 'rng'.", "'ring'"),
        ("--cp 3 --strategy ulysses", "do not divide over cp=3.", "cp=2"),
        ("--cp 2 --strategy u4r2", "needs cp=8", "cp=8"),
        ("--cp two", "'two'", "whole number"),
        ("--cp 128", "128 ranks", "Sweeps"),
        ("--strategy torch-cp", "torch-cp needs processes.", "cpbench sweep"),
        ("--lengths 0,5", "0 is not possible", "1"),
        ("--lengths 40k", "40,960 new and cached tokens", "16,384"),
        ("--lengths 5,6 --prefix 1,2,3", "do not pair up", "1,2"),
        ("--prefix 4", "--lengths", "Add --lengths"),
        ("--dtype fp32", "Unknown dtype 'fp32'.", "float32"),
        ("--model qwn", "Unknown model 'qwn'.", "qwen"),
        ("--set rounds=2", "Unknown field of verify 'rounds'.", "Valid"),
        ("--set kernel=flash3", "flash3 cannot run here", "cpbench list"),
        ("--set partition=spiral", "Unknown partition 'spiral'.", "zigzag"),
        ("--seed -1", "-1 is not possible", "0"),
        ("--dep", "No such option: --dep.", "--deep"),
    ],
)
def test_bad_input(arguments: str, message: str, hint: str, cpbench_command: Cpbench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpbench.verify, "run", lambda *_: pytest.fail("something would have run"))
    ran = cpbench_command("verify", *arguments.split())
    error, told = ran.err.splitlines()
    assert (ran.code, ran.out) == (2, "")
    assert error.startswith("error: ") and message in error
    assert told.startswith("hint:  ") and hint in told


def test_progress_on_a_pipe_is_a_line_now_and_then_and_every_wrong_row() -> None:
    now, text = [0.0], StringIO()
    with Progress(Console(file=text, width=200), 540, clock=lambda: now[0]) as progress:
        for number, row in enumerate(rows(), 1):
            now[0] += 4.0
            progress.starting(number, row.cell)
            progress.done(row)
    lines = text.getvalue().splitlines()
    assert lines[0] == "wrong: cp8 allgather/2 interleave, attention of 8:2 heads, 101+67+130, bfloat16: the answer is far off"
    assert [line for line in lines if line.startswith("row")] == [
        "row 4/540 · cp8 pass-q 101+67+130 zigzag attention bfloat16 · 1 wrong",
        "row 8/540 · cp8 torch-cp 101+67+130 zigzag attention bfloat16 · 5 wrong",
    ]
