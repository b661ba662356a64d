"""What commands print, held against stored outputs (see conftest.py for how to renew them)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cpbench.doctor
from cpbench.doctor import Finding
from cpbench.environment import Machine
from cpbench.reading import read
from cpbench.results import ResultFile
from cpbench.strategies import STRATEGIES

from . import samples
from .conftest import CUDA, Cpbench, Golden, Pretend

SAMPLES = {"healthy": samples.healthy, "troubled": samples.troubled, "on_gpus": samples.on_gpus, "batches": samples.batches, "variants": samples.variants}


def write(result: ResultFile, file: Path) -> Path:
    file.write_text(result.model_dump_json(by_alias=True))
    return file


@pytest.mark.parametrize("command", ["", "sweep", "profile", "show", "upgrade", "list", "doctor"])
def test_help(command: str, cpbench_command: Cpbench, golden: Golden) -> None:
    ran = cpbench_command(*command.split(), "--help")
    assert (ran.code, ran.err) == (0, "")
    golden(f"help_{command or 'cpbench'}", ran.out)


@pytest.mark.parametrize("columns", [80, 100, 120])
@pytest.mark.parametrize("name", SAMPLES)
def test_show(name: str, columns: int, cpbench_command: Cpbench, golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    ran = cpbench_command("show", str(write(SAMPLES[name](), tmp_path / "r.json")))
    assert (ran.code, ran.err) == (0, "")
    assert max(len(line) for line in ran.out.splitlines()) <= columns
    golden(f"show_{name}_{columns}", ran.out)


def test_a_file_cannot_write_on_the_terminal(cpbench_command: Cpbench, tmp_path: Path) -> None:
    result = samples.troubled()
    result.cells[2].reason = "[red]red[/red] \x1b]0;title\x07"
    ran = cpbench_command("show", str(write(result, tmp_path / "r.json")))
    assert "[red]red[/red]" in ran.out
    assert "\x1b" not in ran.out and "\x07" not in ran.out


def test_show_json_is_the_file(cpbench_command: Cpbench, tmp_path: Path) -> None:
    ran = cpbench_command("show", "--json", str(write(samples.healthy(), tmp_path / "r.json")))
    assert (ran.code, ran.err) == (0, "")
    assert ResultFile.model_validate(json.loads(ran.out)) == samples.healthy()


def test_show_reads_a_journal_that_was_cut(cpbench_command: Cpbench, tmp_path: Path) -> None:
    result = samples.healthy()
    header = {**json.loads(result.model_dump_json(by_alias=True))}
    cells = header.pop("cells")
    lines = [{"type": "header", "result": header}, *({"type": "cell", "cell": cell} for cell in cells)]
    journal = tmp_path / "r.jsonl"
    journal.write_text("\n".join(map(json.dumps, lines))[:-50])
    ran = cpbench_command("show", str(journal))
    assert ran.code == 0
    assert "cp4" in ran.out and "cp8" not in ran.out
    assert len(read(journal).cells) == len(cells) - 1


@pytest.mark.parametrize("what", ["strategies", "models", "partitions", "kernels", "scenarios"])
def test_list(what: str, cpbench_command: Cpbench, golden: Golden) -> None:
    ran = cpbench_command("list", what)
    assert (ran.code, ran.err) == (0, "")
    golden(f"list_{what}", ran.out)


def test_list_shows_everything(cpbench_command: Cpbench) -> None:
    ran = cpbench_command("list")
    assert [line.split(":")[0] for line in ran.out.splitlines() if ": " in line and line[0].isupper()] == [
        "Strategies",
        "Kernels",
        "Models",
        "Partitions",
        "Scenarios",
    ]


def test_list_says_what_a_small_machine_lacks(cpbench_command: Cpbench, machine: Pretend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    machine(Machine("cuda", 1, 16, 64 << 30, gpus=("NVIDIA H200",), gpu_memory_bytes=16 << 30))
    assert cpbench_command("list", "strategies").out.count("needs 2 GPUs, this machine has 1") == len(STRATEGIES) - 1
    assert "none: one needs" not in cpbench_command("list", "models").out
    machine(Machine("cpu", 0, 2, 1 << 30))
    assert "none: one needs" in cpbench_command("list", "models").out


GOOD = [Finding("python", True, "3.11.7"), Finding("gpu", True, "none: cpbench measures on the CPU")]
BAD = [Finding("torch", False, "not installed", "Run pip install torch.")]


@pytest.mark.parametrize(("name", "found", "code"), [("good", GOOD, 0), ("bad", GOOD + BAD, 1)])
def test_doctor(name: str, found: list[Finding], code: int, cpbench_command: Cpbench, golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpbench.doctor, "findings", lambda machine: found)
    ran = cpbench_command("doctor")
    assert (ran.code, ran.err) == (code, "")
    golden(f"doctor_{name}", ran.out)


def test_doctor_finds_this_machine_usable(cpbench_command: Cpbench) -> None:
    ran = cpbench_command("doctor")
    assert ran.code == 0, ran.out
    assert ran.out.splitlines()[-1] == "Sweeps can run here."


def test_dry_run(cpbench_command: Cpbench, golden: Golden, tmp_path: Path) -> None:
    ran = cpbench_command("sweep", "--seq", "36k", "--cp", "2,3,4,8", "--dry-run")
    assert (ran.code, ran.err) == (0, "")
    assert not list(tmp_path.iterdir())
    golden("dry_run_cpu", ran.out)


def test_dry_run_on_gpus(cpbench_command: Cpbench, golden: Golden, machine: Pretend) -> None:
    machine(CUDA)
    ran = cpbench_command("sweep", "--seq", "128k,2M", "--cp", "2,4", "--tp", "1,2", "--strategy", "ring", "--rounds", "4", "--dry-run")
    assert (ran.code, ran.err) == (0, "")
    golden("dry_run_cuda", ran.out)


def test_dry_run_of_batches(cpbench_command: Cpbench, golden: Golden, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    one = [
        "sweep",
        "--lengths",
        "1003,517,36k",
        "--prefix",
        "500,0,32k",
        "--cp",
        "2,4",
        "--strategy",
        "ring,usp,ulysses-gather,pass-q",
        "--chunk",
        "8k",
        "--dry-run",
    ]
    two = [
        "sweep",
        "--lengths",
        "9,8",
        "--lengths",
        "4k",
        "--prefix",
        "1k",
        "--cp",
        "8",
        "--strategy",
        "ring,u4r2,allgather",
        "--set",
        "head_groups=2",
        "--dry-run",
    ]
    pairs = ["sweep", "--seq", "4k,8k", "--batch", "4,2", "--cp", "2,4", "--pair", "--partition", "interleave", "--dry-run"]
    ran = [cpbench_command(*command) for command in (one, two, pairs)]
    assert [(code, err) for code, _, err in ran] == [(0, "")] * 3
    golden("dry_run_batches", "\n".join(out for _, out, _ in ran))


def test_dry_run_of_layouts(cpbench_command: Cpbench, golden: Golden) -> None:
    crossed = "sweep --tp 1,2 --cp 1,2,4 --dp 1,2 --pp 1,2 --ep 1,4 --dry-run"
    named = "sweep --layouts tp8,cp8,tp2cp4,cp8u4,dp4,pp2dp2 --batch 3 --seq 4k --chunk 1k --strategy ring --dry-run"
    every = "sweep --gpus 8 --seq 4k --strategy ring --dry-run"
    ran = [cpbench_command(*command.split()) for command in (crossed, named, every)]
    assert [(code, err) for code, _, err in ran] == [(0, "")] * 3
    golden("dry_run_layouts", "\n".join(out for _, out, _ in ran))


def test_what_is_left_out_is_in_the_json(cpbench_command: Cpbench) -> None:
    plan = json.loads(cpbench_command("sweep", "--tp", "1,4", "--ep", "1,4", "--dry-run", "--json").out)
    assert [cell["key"]["layout"] for cell in plan["cells"]] == ["cp1", "tp4"]
    assert [(entry["layout"], entry["nearest"]) for entry in plan["left_out"]] == [("cp1/ep4", "cp1"), ("tp4/ep4", "tp4")]
    assert plan["left_out"][1]["reason"] == "qwen3-tiny has no experts to divide"


def test_dry_run_as_json(cpbench_command: Cpbench) -> None:
    ran = cpbench_command("sweep", "--seq", "1k", "--cp", "2,3", "--dry-run", "--json")
    plan = json.loads(ran.out)
    assert ran.code == 0
    assert [cell["status"] for cell in plan["cells"]] == ["runs"] * 6 + ["unsupported"]
    assert plan["scenario"]["seq"] == [1024]
    assert all(cell["estimated_s"] > 0 and cell["estimated_live_bytes"] > 0 for cell in plan["cells"] if cell["status"] == "runs")


def test_version(cpbench_command: Cpbench) -> None:
    assert cpbench_command("--version") == (0, f"cpbench {cpbench.__version__}\n", "")
