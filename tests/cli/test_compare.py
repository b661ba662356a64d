"""`cpbench compare`: every format, the exit codes, and files that are no results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpbench.records import not_measured
from cpbench.results import CellResult, Metric, ResultFile
from cpbench.stats import median, median_interval
from cpbench.tracing.record import KernelTime, PhaseTime, Profile, RankTime

from .conftest import Cpbench, Golden
from .samples import SEQ, make_cell, measured, result, variants

ROUNDS = (0.99, 1.0, 1.005, 0.995, 1.01)


def rounds(layout: str, strategy: str, seconds: float, spread: float = 1.0, count: int = 5, **changes: Any) -> CellResult:
    """A cell with `count` rounds of three passes around `seconds`."""
    memory = changes.pop("memory", 200 << 20)
    cell = measured(make_cell(layout, strategy, **changes), [seconds], memory=memory)
    samples = [[seconds * (1 + (one - 1) * spread) * passes for passes in (0.998, 1.0, 1.001)] for one in ROUNDS[:count]]
    every = [sample for one in samples for sample in one]
    metric = Metric(unit="s", rounds=samples, median=median(every), ci95=median_interval(every), n=len(every))
    return cell.model_copy(update={"metrics": {**cell.metrics, "ttft_s": metric}})


def before() -> ResultFile:
    return result(
        [
            rounds("cp1", "none", 4.5, spread=0.3),
            rounds("cp2", "ring", 4.6),
            rounds("cp2", "allgather", 4.6),
            rounds("cp4", "ring", 4.7),
            rounds("cp8", "ring", 4.7, count=2),
            not_measured(make_cell("cp4", "ulysses"), "oom", "DefaultCPUAllocator: can't allocate memory"),
            rounds("cp2", "ulysses", 4.6),
        ]
    )


def after() -> ResultFile:
    file = result(
        [
            rounds("cp1", "none", 4.51, spread=0.3),
            rounds("cp2", "ring", 4.1, memory=150 << 20),
            rounds("cp2", "allgather", 4.7, spread=2.0),
            not_measured(make_cell("cp4", "ring"), "crash", "RuntimeError: [bold]injected\x1b[31m | <b>@all</b>"),
            rounds("cp8", "ring", 5.7, count=2),
            rounds("cp4", "ulysses", 4.6),
            rounds("cp2", "usp", 4.6),
        ]
    )
    file.environment["variables"] = {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    return file


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    """a.json and b.json in the folder of the command."""
    for name, file in (("a.json", before()), ("b.json", after())):
        save(tmp_path / name, file)
    return "a.json", "b.json"


def save(path: Path, file: ResultFile) -> None:
    path.write_text(file.model_dump_json(by_alias=True), encoding="utf-8")


@pytest.mark.parametrize("form", ["text", "md", "json", "csv"])
def test_every_format(form: str, files: tuple[str, str], cpbench_command: Cpbench, golden: Golden) -> None:
    ran = cpbench_command("compare", *files, "--format", form)
    assert (ran.code, ran.err) == (0, "")
    assert "\x1b" not in ran.out
    golden(f"compare_{form}", ran.out)


def test_all_rows_and_the_whole_table(files: tuple[str, str], cpbench_command: Cpbench, golden: Golden) -> None:
    golden("compare_all", cpbench_command("compare", *files, "--all", "--strict", "--metric", "time").out)


@pytest.mark.parametrize("field", ["strategy", "layout", "cp"])
def test_inside_one_file(field: str, files: tuple[str, str], cpbench_command: Cpbench, golden: Golden) -> None:
    ran = cpbench_command("compare", "a.json", "--by", field)
    assert ran.code == 0
    golden(f"compare_by_{field}", ran.out)


def test_variants_of_one_file(tmp_path: Path, cpbench_command: Cpbench, golden: Golden) -> None:
    save(tmp_path / "ab.json", variants())
    golden("compare_variants", cpbench_command("compare", "ab.json", "--metric", "time").out)


def test_profiles(tmp_path: Path, cpbench_command: Cpbench, golden: Golden) -> None:
    for name, factor in (("a.json", 1.0), ("b.json", 1.5)):
        ranks = [RankTime(rank=rank, step_s=factor + rank, compute_s=0.5, comm_s=0.1, exposed_comm_s=0.1, idle_s=0.1) for rank in (0, 1)]
        phases = [
            PhaseTime(phase=phase, rank=1, time_s=factor, compute_s=0.5, comm_s=0, exposed_comm_s=0, idle_s=0) for phase in ("attention", f"mlp {factor}")
        ]
        kernels = [KernelTime(name=f"aten::{op}", rank=0, calls=3, seconds=seconds * factor, share=0.5) for op, seconds in (("mm", 0.4), ("add", 0.01))]
        profile = Profile(tool="torch", steps=3, ranks=ranks, phases=phases, kernels=kernels)
        save(tmp_path / name, result([measured(make_cell("cp2", "ring"), [1.0]).model_copy(update={"profile": profile})]))
    golden("compare_profile", cpbench_command("compare", "a.json", "b.json", "--metric", "profile").out)


def test_several_files_are_compared_with_the_first(files: tuple[str, str], tmp_path: Path, cpbench_command: Cpbench) -> None:
    save(tmp_path / "c.json", before())
    entries = json.loads(cpbench_command("compare", *files, "c.json", "--format", "json").out)["comparisons"]
    assert [entry["files"] for entry in entries] == [["a.json", "b.json"], ["a.json", "c.json"]]
    assert entries[1]["counts"].keys() == {"same", "n/a"}


@pytest.mark.parametrize("form", ["text", "md", "json", "csv"])
def test_the_report_is_written_before_a_failing_exit(form: str, files: tuple[str, str], cpbench_command: Cpbench) -> None:
    ran = cpbench_command("compare", *files, "--fail-on", "regression", "--format", form)
    assert ran.code == 1
    assert ran.out.startswith(cpbench_command("compare", *files, "--format", form).out.splitlines()[0])
    if form != "json":
        assert "FAIL: broke: cp4 ring 36k" in (ran.err if form == "csv" else ran.out)
    else:
        failing = [row["cell"] for row in json.loads(ran.out)["comparisons"][0]["rows"] if row["failure"]]
        assert failing == ["cp4 ring 36k", "cp8 ring 36k"]


def test_what_fails(files: tuple[str, str], tmp_path: Path, cpbench_command: Cpbench) -> None:
    save(tmp_path / "slow.json", result([rounds("cp2", "ring", 5.0)]))
    assert cpbench_command("compare", "a.json", "slow.json", "--fail-on", "broke").code == 0
    assert cpbench_command("compare", "a.json", "slow.json", "--fail-on", "regression").code == 1
    assert cpbench_command("compare", "a.json", "slow.json", "--fail-on", "regression", "--noise", "10%").code == 0


def test_nothing_in_common(files: tuple[str, str], tmp_path: Path, cpbench_command: Cpbench, golden: Golden) -> None:
    save(tmp_path / "long.json", result([rounds("cp2", "ring", 9.0, seq=4 * SEQ)]))
    ran = cpbench_command("compare", "a.json", "long.json", "--fail-on", "regression")
    assert ran.code == 3
    golden("compare_nothing", ran.out + ran.err)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": "cpbench.result", "schema_ver', "not a complete JSON file"),
        ('{"schema": "somebody.else"}', "is not a cpbench result"),
        ('{"schema": "cpbench.result", "schema_version": 99}', "schema version 99"),
        ("[" * 100_000, "not a complete JSON file"),
        ("\x00\x01", "not a complete JSON file"),
    ],
)
def test_bad_files(text: str, message: str, files: tuple[str, str], tmp_path: Path, cpbench_command: Cpbench) -> None:
    (tmp_path / "bad.json").write_text(text, encoding="utf-8")
    for names in (("bad.json", "a.json"), ("a.json", "bad.json")):
        ran = cpbench_command("compare", *names)
        assert ran.code == 4 and message in ran.err and "Traceback" not in ran.err


def test_a_newer_schema_is_refused_though_it_looks_known(tmp_path: Path, files: tuple[str, str], cpbench_command: Cpbench) -> None:
    save(tmp_path / "newer.json", before().model_copy(update={"schema_version": 2}))
    ran = cpbench_command("compare", "a.json", "newer.json")
    assert ran.code == 4 and "schema version 2" in ran.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.json"], "There is one file"),
        (["a.json", "b.json", "--metric", "tfft_s"], "Did you mean 'ttft_s'?"),
        (["a.json", "--by", "layuot"], "Did you mean 'layout'?"),
        (["a.json", "b.json", "--fail-on", "regresion"], "Did you mean 'regression'?"),
        (["a.json", "b.json", "--format", "markdown"], "Valid: csv, json, md, text"),
        (["a.json", "b.json", "--noise", "lots"], "not a percentage"),
        (["a.json", "b.json", "--across", "kinds"], "Did you mean 'kind'?"),
        (["compare"], "does not exist"),
    ],
)
def test_bad_flags(arguments: list[str], message: str, files: tuple[str, str], cpbench_command: Cpbench) -> None:
    ran = cpbench_command("compare", *arguments)
    assert ran.code == (4 if arguments == ["compare"] else 2) and message in ran.err


def test_large_tables_say_what_they_leave_out(tmp_path: Path, cpbench_command: Cpbench) -> None:
    for name, factor in (("a.json", 1.0), ("b.json", 1.1)):
        cells = [rounds("cp2", "ring", factor if number < 70 else 1.0, spread=0.3, seq=1024 + number) for number in range(150)]
        save(tmp_path / name, result(cells))
    ran = cpbench_command("compare", "a.json", "b.json", "--metric", "time")
    assert ran.out.count(" slower ") == 60 and "90 rows are not listed" in ran.out
    assert cpbench_command("compare", "a.json", "b.json", "--metric", "time", "--all").out.count(" same ") >= 80
