"""A sweep through the command line with scripted ranks: streams, files, exit codes, continuing."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest

import cpbench.driver
from cpbench.reading import read
from cpbench.results import ResultFile
from tests.unit.fakes import FakeGroup, FakeLauncher, raises, well

from .conftest import CPU, CUDA, Cpbench, Pretend, Ran

SWEEP = ["sweep", "--seq", "256", "--cp", "2", "--strategy", "ring,ulysses"]


@pytest.fixture
def launcher(monkeypatch: pytest.MonkeyPatch) -> FakeLauncher:
    fake = FakeLauncher()
    monkeypatch.setattr(cpbench.driver, "Torchrun", lambda: fake)
    return fake


def only_file(folder: Path) -> Path:
    files = list(folder.glob("results/*"))
    assert len(files) == 1, files
    return files[0]


def statuses(ran: Ran) -> list[str]:
    return [cell.status for cell in ResultFile.model_validate_json(ran.out).cells]


def test_table_on_stdout_and_everything_else_on_stderr(cpbench_command: Cpbench, launcher: FakeLauncher, tmp_path: Path) -> None:
    ran = cpbench_command(*SWEEP)
    file = only_file(tmp_path)
    assert ran.code == 0
    assert file.name.startswith("sweep-20") and file.suffix == ".json"
    assert [line.split()[:2] for line in ran.out.splitlines() if line.startswith("cp")][:3] == [["cp1", "none"], ["cp2", "ring"], ["cp2", "ulysses"]]
    assert "256: fastest cp1 none 1.00 s (within noise: cp2 ring, cp2 ulysses); least memory" in ran.out
    assert ran.out.splitlines()[-2:] == [f"Result: results/{file.name}", f"See it again with: cpbench show results/{file.name}"]
    assert "model qwen3-tiny (default on cpu)" in ran.err
    assert "seq 256 tokens" in ran.err
    assert re.search(r"^3 cells, world sizes 1, 2: about \d+ s, up to [\d.]+ MiB per rank$", ran.err, re.MULTILINE)
    assert [line for line in ran.err.splitlines() if line[1:2] == "/"] == [
        "1/3 cp1 none 256: 1.00 s (n=3)",
        "2/3 cp2 ring 256: 1.00 s (n=3)",
        "3/3 cp2 ulysses 256: 1.00 s (n=3)",
    ]
    assert read(file).run.scenario["seq"] == [256]


def test_show_prints_what_the_sweep_did(cpbench_command: Cpbench, launcher: FakeLauncher, tmp_path: Path) -> None:
    swept = cpbench_command(*SWEEP).out
    shown = cpbench_command("show", str(only_file(tmp_path))).out
    assert swept.startswith(shown)
    assert len(swept.splitlines()) == len(shown.splitlines()) + 2


def test_json_and_quiet(cpbench_command: Cpbench, launcher: FakeLauncher, tmp_path: Path) -> None:
    ran = cpbench_command(*SWEEP, "--json", "-q", "-o", "r.json")
    assert (ran.code, ran.err) == (0, "")
    assert ResultFile.model_validate(json.loads(ran.out)) == read(tmp_path / "r.json")
    ran = cpbench_command(*SWEEP, "--json", "-o", "s.json")
    assert statuses(ran) == ["ok"] * 3
    assert "Result: s.json" in ran.err
    ran = cpbench_command(*SWEEP, "-q", "-o", "t.json")
    assert ran.err == ""
    assert "Result: t.json" in ran.out


def test_flags_override_the_scenario_and_settings_override_flags(cpbench_command: Cpbench, launcher: FakeLauncher, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("seq: 1k\ncp: [2, 4]\nseed: 7\nlimits: {budget: 1h}\n")
    command = ["sweep", "--scenario", "mine.yaml", "--cp", "2", "--cp", "2", "--layers", "2", "--budget", "9m", "--set", "layers=1", "--set", "baseline=false"]
    ran = cpbench_command(*command, "--json")
    scenario = json.loads(ran.out)["run"]["scenario"]
    assert (scenario["seq"], scenario["cp"], scenario["seed"], scenario["layers"]) == ([1024], [2, 2], 7, 1)
    assert scenario["limits"]["budget"] == 540
    assert only_file(tmp_path).name.startswith("mine-")
    assert [size for size, _, _ in launcher.jobs] == [2]


@pytest.mark.parametrize(("failing", "code"), [("ring", 5), ("256", 6)])
def test_failed_cells_set_the_exit_code_and_the_next_command(failing: str, code: int, cpbench_command: Cpbench, launcher: FakeLauncher, tmp_path: Path) -> None:
    launcher.actions = {failing: raises()}
    ran = cpbench_command(*SWEEP, "-o", "my file.json")
    assert ran.code == code
    assert "cp2 ring: crash: RuntimeError: boom" in ran.out
    assert "the end of the log of rank 1" in ran.out
    assert ran.out.splitlines()[-1] == "Try the failed cells again with: cpbench sweep --resume --retry crash -o 'my file.json'"
    launcher.actions = {}
    again = cpbench_command("sweep", "--resume", "--retry", "crash", "-o", "my file.json")
    assert again.code == 0
    assert {cell.status for cell in read(tmp_path / "my file.json").cells} == {"ok"}


def interrupts(group: FakeGroup, entry: dict[str, object]) -> bool:
    """Ctrl-C while the cell runs."""
    group.code = None
    os.kill(os.getpid(), signal.SIGINT)
    return False


def test_interrupt_and_resume(cpbench_command: Cpbench, launcher: FakeLauncher, tmp_path: Path) -> None:
    launcher.actions = {"ring": [interrupts]}
    ran = cpbench_command(*SWEEP)
    file = only_file(tmp_path)
    assert ran.code == 130
    assert "cp2 ring: interrupted: interrupted in round 1 of 1" in ran.out
    assert ran.out.splitlines()[-1] == f"Continue with: cpbench sweep --resume -o results/{file.name}"
    launcher.jobs.clear()
    ran = cpbench_command("sweep", "--resume")
    assert ran.code == 0
    assert "has 1 ok, 2 interrupted. Runs what is missing, and again what is interrupted." in " ".join(ran.err.split())
    assert launcher.jobs == [(2, 0, ["cp2 ring 256", "cp2 ulysses 256"])]
    assert only_file(tmp_path) == file and read(file).run.complete


def test_resume_reads_the_journal_of_a_sweep_that_was_killed(cpbench_command: Cpbench, launcher: FakeLauncher, tmp_path: Path) -> None:
    cpbench_command(*SWEEP, "-o", "results/r.json")
    done = json.loads((tmp_path / "results/r.json").read_text())
    cells = done.pop("cells")
    done["run"]["complete"] = False
    entries = [{"type": "header", "result": done}, {"type": "cell", "cell": cells[0]}]
    (tmp_path / "results/r.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"type": "ce')
    (tmp_path / "results/r.json").unlink()
    launcher.jobs.clear()
    ran = cpbench_command("sweep", "--resume", "--json")
    assert statuses(ran) == ["ok"] * 3
    assert [size for size, _, _ in launcher.jobs] == [2]
    assert only_file(tmp_path).name == "r.json"


def test_resume_takes_the_newest_unfinished_file(cpbench_command: Cpbench, launcher: FakeLauncher, tmp_path: Path) -> None:
    for age, name in ((300, "old"), (200, "new"), (100, "finished")):
        launcher.actions = {} if name == "finished" else {"ring": [interrupts]}
        cpbench_command(*SWEEP, "-o", f"results/{name}.json")
        changed = (tmp_path / f"results/{name}.json").stat().st_mtime - age
        os.utime(tmp_path / f"results/{name}.json", (changed, changed))
    (tmp_path / "results/foreign.json").write_text("{}")
    ran = cpbench_command("sweep", "--resume")
    assert ran.code == 0
    assert "Result: results/new.json" in ran.out


def test_resume_refuses_another_machine_unless_forced(cpbench_command: Cpbench, launcher: FakeLauncher, machine: Pretend, tmp_path: Path) -> None:
    launcher.actions = {"ring": [interrupts]}
    cpbench_command(*SWEEP, "-o", "r.json")
    before = (tmp_path / "r.json").read_bytes()
    machine(replace(CPU, cores=4))
    ran = cpbench_command("sweep", "--resume", "-o", "r.json")
    assert ran.code == 2
    assert "error: The file was measured in another environment: cores was 2, is 4." in ran.err
    assert "--force" in ran.err
    assert (tmp_path / "r.json").read_bytes() == before
    assert cpbench_command("sweep", "--resume", "--force", "-o", "r.json").code == 0


def test_resume_with_other_limits(cpbench_command: Cpbench, launcher: FakeLauncher, tmp_path: Path) -> None:
    launcher.actions = {"ring": [raises(status="oom")]}
    assert cpbench_command(*SWEEP, "--cell-timeout", "5s", "-o", "r.json").code == 5
    ran = cpbench_command("sweep", "--resume", "--retry", "oom", "--cell-timeout", "7m", "-o", "r.json", "--json")
    assert statuses(ran) == ["ok"] * 3
    assert launcher.groups[-1].job["cell_timeout"] == 420


def test_skipped_cells_are_no_failure(cpbench_command: Cpbench, launcher: FakeLauncher, machine: Pretend) -> None:
    machine(CUDA)
    ran = cpbench_command("sweep", "--seq", "1k", "--cp", "2,4", "--strategy", "ring", "--model", "qwen3-tiny")
    assert ran.code == 0
    assert "cp4 ring: skipped: needs 4 GPUs, this machine has 2" in ran.out


def test_a_batch_that_is_too_short_is_never_silent(cpbench_command: Cpbench, launcher: FakeLauncher, tmp_path: Path) -> None:
    reason = "context parallelism is off: a sequence of 3 new tokens is shorter than 2*cp = 4"
    launcher.actions = {"ring 3": well(cp_active=False, cp_off_reason=reason)}
    ran = cpbench_command("sweep", "--lengths", "3,256", "--lengths", "256", "--cp", "2", "--strategy", "ring", "-o", "r.json")
    assert ran.code == 0
    assert f"  in 1 cell {reason}" in ran.err  # before the start
    assert f"cp2 ring 3+256: 1.00 s (n=3); {reason}" in ran.err
    assert re.search(r"3\+256 .*cp2 +ring .* CP off 1$", ran.out, re.MULTILINE)
    assert f"1: {reason}" in ran.out.splitlines()
    assert [line for line in ran.out.splitlines() if "fastest" in line] == [next(line for line in ran.out.splitlines() if line.startswith("256: fastest"))]
    stored = {tuple(cell.key["lengths"]): (cell.cp_active, cell.cp_off_reason) for cell in read(tmp_path / "r.json").cells if cell.world_size == 2}
    assert stored == {(3, 256): (False, reason), (256,): (True, None)}


def test_batches_reach_the_ranks(cpbench_command: Cpbench, launcher: FakeLauncher) -> None:
    flags = ["--lengths", "1003,517", "--prefix", "500,0", "--lengths", "64", "--prefix", "1k", "--chunk", "256", "--set", "page_size=16"]
    ran = cpbench_command("sweep", *flags, "--cp", "4", "--strategy", "u2r2", "--set", "baseline=false", "--json", "-q")
    assert ran.code == 0
    cells = [entry["cell"] for entry in launcher.groups[0].job["cells"]]
    assert [(cell["layout"], cell["strategy"], cell["lengths"], cell.get("prefixes")) for cell in cells] == [
        ("cp4u2", "usp", [1003, 517], [500, 0]),
        ("cp4u2", "usp", [64], [1024]),
    ]
    assert all(cell["options"] == {"chunk": 256, "page_size": 16} for cell in cells)
    assert json.loads(ran.out)["run"]["scenario"]["batches"] == [{"lengths": [1003, 517], "prefixes": [500, 0]}, {"lengths": [64], "prefixes": [1024]}]


def test_flags_replace_the_batches_of_a_scenario(cpbench_command: Cpbench, launcher: FakeLauncher, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("seq: [1k, 2k]\nbatch: 3\nbaseline: false\n")
    (tmp_path / "batches.yaml").write_text("batches: [{lengths: [5, 6]}]\nbaseline: false\n")
    for command, expected in ((["mine.yaml", "--lengths", "7,8"], [[7, 8]]), (["batches.yaml", "--seq", "9"], [[9]]), (["batches.yaml"], [[5, 6]])):
        ran = cpbench_command("sweep", "--scenario", *command, "--json", "-q")
        assert [cell["key"]["lengths"] for cell in json.loads(ran.out)["cells"]] == expected
        next((tmp_path / "results").iterdir()).unlink()


AB = ["sweep", "--seq", "256", "--cp", "2", "--ab", "strategy=ring", "strategy=allgather"]


def test_two_variants_alternate_and_are_compared_below_the_table(cpbench_command: Cpbench, launcher: FakeLauncher, tmp_path: Path) -> None:
    launcher.actions = {"ring": well(samples=[1.0, 1.2], skew_samples=[]), "allgather": well(samples=[0.9, 1.08], skew_samples=[])}
    ran = cpbench_command(*AB, "-o", "r.json")
    assert ran.code == 0
    assert "  1 pair of variants, whose passes alternate A B B A: A strategy=ring, B strategy=allgather" in ran.err
    assert "strategies" not in ran.err
    assert "ring -> allgather: 0.900 of the time, 1 block (an interval takes 5)" in ran.out.splitlines()
    assert launcher.jobs == [(1, 0, ["cp1 none 256"]), (2, 0, ["cp2 ring 256 | cp2 allgather 256"])]
    stored = read(tmp_path / "r.json")
    assert stored.run.scenario["ab"] == ["strategy=ring", "strategy=allgather"]
    assert [cell.ab and cell.ab.variant for cell in stored.cells] == [None, "A", "B"]


def test_a_sweep_of_variants_is_resumed_with_them(cpbench_command: Cpbench, launcher: FakeLauncher, tmp_path: Path) -> None:
    launcher.actions = {"ring": [interrupts]}
    assert cpbench_command(*AB, "-o", "r.json").code == 130
    launcher.jobs.clear()
    ran = cpbench_command("sweep", "--resume", "-o", "r.json")
    assert ran.code == 0
    assert launcher.jobs == [(2, 0, ["cp2 ring 256 | cp2 allgather 256"])]
    assert read(tmp_path / "r.json").cells[2].ab is not None


def test_a_variant_that_cannot_run_has_a_row_that_says_so(cpbench_command: Cpbench, launcher: FakeLauncher) -> None:
    flags = ["--seq", "256", "--cp", "2,16", "--strategy", "ring,ulysses", "--set", "baseline=false", "--ab", "model=qwen3-tiny", "model=qwen3-0.6b"]
    ran = cpbench_command("sweep", *flags)
    assert ran.code == 0
    assert "cp16 ulysses: unsupported: " in ran.out
    assert "cp16 ulysses 256: qwen3-tiny -> qwen3-0.6b: not compared: cp16 ulysses is unsupported" in ran.out
