"""Real sweeps with real ranks on this machine's CPU: tiny lengths, every stream, Ctrl-C, and what is left on disk."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cpbench.reading import read
from cpbench.results import ResultFile

ROOT = Path(__file__).parents[2]
CPBENCH = [sys.executable, "-m", "cpbench"]
ENVIRONMENT = {**os.environ, "COLUMNS": "120", "PYTHONPATH": str(ROOT)}
TINY = ["sweep", "--set", "device=cpu", "--model", "qwen3-tiny", "--seq", "256", "--cp", "2", "--set", "timing.max_samples=5"]


def cpbench(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CPBENCH, *arguments], capture_output=True, text=True, cwd=folder, env=ENVIRONMENT, timeout=200, check=False)


@pytest.mark.parametrize("target", ["prefill", "layer", "attention"])
def test_every_strategy_of_every_target_is_measured_and_right(target: str, tmp_path: Path) -> None:
    done = cpbench(*TINY, "--target", target, "-o", "r.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    result = read(tmp_path / "r.json")
    assert result.run.complete and not (tmp_path / "r.jsonl").exists()
    assert [(cell.key["layout"], cell.key["strategy"]) for cell in result.cells] == [
        ("cp1", "none"),
        ("cp2", "allgather"),
        ("cp2", "ring"),
        ("cp2", "ulysses"),
    ]
    name = {"prefill": "ttft_s", "layer": "layer_s", "attention": "attention_s"}[target]
    for cell in result.cells:
        assert (cell.status, cell.kernel) == ("ok", "cpu_flash")
        assert cell.metrics[name].n == 5 and cell.metrics[name].median > 0
        assert cell.memory and cell.memory.peak_live_bytes
        assert cell.numerics and cell.numerics.passed
        assert cell.tokens_per_rank == 256 // cell.world_size
    assert len({token.token for cell in result.cells for token in cell.first_tokens}) == (1 if target == "prefill" else 0)
    rows = [line.split()[:2] for line in done.stdout.splitlines() if line.startswith("cp")][:4]
    assert rows == [["cp1", "none"], ["cp2", "allgather"], ["cp2", "ring"], ["cp2", "ulysses"]]


def test_json_is_all_that_stdout_has(tmp_path: Path) -> None:
    done = cpbench(*TINY, "--strategy", "ring", "--rounds", "2", "--json", "-q", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    result = ResultFile.model_validate(json.loads(done.stdout))
    assert [len(cell.metrics["ttft_s"].rounds) for cell in result.cells] == [2, 2]
    assert [read(file) for file in tmp_path.glob("results/sweep-*.json")] == [result]


def test_interrupt_writes_what_is_done_and_prints_a_command_that_continues(tmp_path: Path) -> None:
    command = [*CPBENCH, *TINY, "--strategy", "ring", "-o", "r.json", "--set", "timing.max_samples=100000", "--set", "timing.max_seconds=10m"]
    process = subprocess.Popen(
        [*command, "--set", "timing.precision=0.0001%"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=ENVIRONMENT
    )
    try:
        _wait_until_a_cell_runs(tmp_path / "r.jsonl", process)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    before = read(tmp_path / "r.json")
    assert not before.run.complete
    assert [cell.status for cell in before.cells] == ["interrupted"] * 2
    assert _ranks_of(process.pid) == []
    line = out.splitlines()[-1]
    assert line == "Continue with: cpbench sweep --resume -o r.json"
    _make_short(tmp_path / "r.json")
    done = cpbench(*shlex.split(line.partition("cpbench ")[2]), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [cell.status for cell in read(tmp_path / "r.json").cells] == ["ok"] * 2


def _wait_until_a_cell_runs(journal: Path, process: subprocess.Popen[str]) -> None:
    """The ranks report their environment just before the first cell."""
    deadline = time.monotonic() + 120
    while not (journal.exists() and '"environment","environment"' in journal.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(1.0)


def _ranks_of(parent: int) -> list[int]:
    """Ranks that are alive and belong to no driver any more. Other sweeps on this machine have drivers of their own."""
    import psutil

    ranks = [p for p in psutil.process_iter(["cmdline"]) if "cpbench.worker" in (p.info["cmdline"] or [])]
    return [rank.pid for rank in ranks if parent in [p.pid for p in rank.parents()] or rank.ppid() == 1]


def _make_short(file: Path) -> None:
    """Continue with a sweep that ends: sample counts are part of the stored scenario."""
    data = json.loads(file.read_text())
    data["run"]["scenario"]["timing"] = {"min_samples": 3, "max_samples": 3, "max_seconds": 1, "precision": 0.5}
    file.write_text(json.dumps(data))


def test_an_impossible_sweep_starts_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for arguments, code in ((["--cp", "3", "--strategy", "ulysses"], 2), (["-o", "file/r.json"], 2), (["--model", "qwen3"], 2)):
        done = cpbench(*TINY, "-q", *arguments, folder=tmp_path)
        assert done.returncode == code
        assert [line.split(":")[0] for line in done.stderr.splitlines()] == ["error", "hint"]
        assert (done.stdout, os.listdir(tmp_path)) == ("", ["file"])  # noqa: PTH208
