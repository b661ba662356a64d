"""The profile command with scripted ranks: what it prints, stores, and refuses; and Nsight Systems as a script that does as it does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import cpbench.driver
from cpbench.reading import read
from cpbench.results import CellResult, ResultFile
from cpbench.tracing.chrome import SUFFIX, write_trace
from cpbench.tracing.profile import profile_of
from cpbench.tracing.record import NvtxRange, Profile
from tests.unit.fakes import Action, FakeGroup, FakeLauncher, raises, well
from tests.unit.traces import CLOCK, rank, steps

from . import samples
from .conftest import Cpbench, Golden

PROFILE = ["profile", "--seq", "256", "--cp", "2", "--strategy", "ring"]


def traces(*ranks: dict[str, Any]) -> Action:
    """Ranks that leave these traces."""

    def act(group: FakeGroup, entry: dict[str, Any]) -> bool:
        for number, one in enumerate(ranks):
            write_trace(Path(group.job["trace"]) / f"rank{number}{SUFFIX}", one)
        return well(traced_s=CLOCK)(group, entry)

    return act


def use(action: Action, monkeypatch: pytest.MonkeyPatch) -> FakeLauncher:
    launcher = FakeLauncher({"ring": action})
    monkeypatch.setattr(cpbench.driver, "Torchrun", lambda: launcher)
    return launcher


def profiled(profile: Profile, *artifacts: str) -> ResultFile:
    """A healthy result whose cell with two ranks has a profile."""
    result = samples.healthy()
    cell = next(cell for cell in result.cells if cell.world_size == 2)
    result.cells = [cell.model_copy(update={"profile": profile, "artifacts": list(artifacts)})]
    return result


def by_torch() -> ResultFile:
    peaks = {1: {"layer/attention": 300 << 20, "harness/traced": 1 << 20}}
    profile = profile_of(steps(rank(), rank(attention=40)), CLOCK, peaks)
    kernel = profile.kernels[0].model_copy(update={"name": "void cutlass::Kernel2<" + "a" * 80})
    profile = profile.model_copy(update={"kernels": [*profile.kernels, kernel]})
    return profiled(profile, "p.traces/rank0.pt.trace.json.gz", "p.traces/rank1.pt.trace.json.gz", "p.timeline.json.gz")


def by_nsys() -> ResultFile:
    ranges = [NvtxRange(range="harness/traced", rank=rank, calls=2, seconds=0.2) for rank in range(2)]
    ranges += [NvtxRange(range="layer/attention", rank=1, calls=8, seconds=0.1, gpu_seconds=0.09)]
    return profiled(Profile(tool="nsys", steps=2, nvtx=ranges), "p.traces/rank0.nsys-rep", "p.traces/rank1.nsys-rep")


@pytest.mark.parametrize("columns", [80, 100, 120])
@pytest.mark.parametrize("result", [by_torch, by_nsys], ids=lambda result: result.__name__)
def test_show(result: Any, columns: int, cpbench_command: Cpbench, golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "p.json").write_text(result().model_dump_json(by_alias=True))
    ran = cpbench_command("show", "results/p.json")
    assert (ran.code, ran.err) == (0, "")
    assert max(len(line.rstrip()) for line in ran.out.splitlines()) <= columns
    golden(f"show_profile_{result.__name__}_{columns}", ran.out.partition("\n\n")[2])  # below the table


def test_a_profile_is_printed_stored_and_shown_again(cpbench_command: Cpbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = use(traces(rank(), rank(attention=40)), monkeypatch)
    ran = cpbench_command(*PROFILE)
    assert ran.code == 0
    assert launcher.jobs == [(2, 0, ["cp2 ring 256"])]
    (file,) = (tmp_path / "results").glob("*.json")
    assert file.name.startswith("profile-20")
    (cell,) = read(file).cells
    assert cell.profile and cell.profile.steps == 2
    assert cell.artifacts == [f"{file.stem}.traces/rank{rank}{SUFFIX}" for rank in range(2)] + [f"{file.stem}.timeline.json.gz"]
    assert "Phases of rank 1, which is slowest" in ran.out
    assert f"Traces of 2 ranks: tensorboard --logdir results/{file.stem}.traces" in ran.out
    assert ran.out.splitlines()[:-2] == cpbench_command("show", str(file.relative_to(tmp_path))).out.splitlines()


def test_json_is_the_result(cpbench_command: Cpbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(traces(rank(), rank()), monkeypatch)
    ran = cpbench_command(*PROFILE, "--json", "-q", "-o", "p.json")
    assert (ran.code, ran.err) == (0, "")
    assert ResultFile.model_validate(json.loads(ran.out)) == read(tmp_path / "p.json")


def test_a_cell_that_fails_leaves_no_folder(cpbench_command: Cpbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(raises(), monkeypatch)
    assert cpbench_command(*PROFILE, "-o", "p.json").code == 6
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]
    assert read(tmp_path / "p.json").cells[0].profile is None


ERRORS = {
    "several strategies": "profile --seq 256 --cp 2",
    "several cells": "profile --seq 256,512 --cp 2,4 --strategy ring",
    "several rounds": "profile --cp 2 --strategy ring --set rounds=3",
    "a flag of sweep": "profile --cp 2 --resume",
    "a folder that cannot be made": "profile --cp 2 --strategy ring -o file/p.json",
    "a folder that is in use": "profile --cp 2 --strategy ring -o used.json",
    "a file that exists": "profile --cp 2 --strategy ring -o there.json",
    "nsys is not here": "profile --cp 2 --strategy ring -o p.json --nsys",
}


def test_errors(cpbench_command: Cpbench, golden: Golden, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sys.executable", "python")
    launcher = use(traces(rank(), rank()), monkeypatch)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "there.json").write_text("{}")
    (tmp_path / "used.traces").mkdir()
    (tmp_path / "used.traces" / "rank0.pt.trace.json.gz").write_text("of another one")
    before = sorted(path.name for path in tmp_path.iterdir())
    said = []
    for name, line in ERRORS.items():
        ran = cpbench_command(*line.split(), "-q")
        assert (ran.code, ran.out) == (2, ""), name
        said.append(f"{name}: cpbench {line}\n{ran.err}")
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert not launcher.jobs
    golden("errors_profile", "\n".join(said).replace(str(tmp_path), "HERE"))


def test_a_result_with_a_profile_can_be_read_by_whoever_knows_the_schema() -> None:
    cell = by_torch().cells[0]
    assert CellResult.model_validate_json(cell.model_dump_json()) == cell
