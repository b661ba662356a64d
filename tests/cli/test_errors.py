"""Bad input: one sentence, one hint, the right exit code, and nothing started or written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import cpbench.driver

from . import samples
from .conftest import Cpbench, Golden

USAGE = {
    "no command": "",
    "unknown command": "swep",
    "unknown option": "sweep --sq 36k",
    "option without a value": "sweep --seq",
    "extra argument": "sweep 36k",
    "no file to show": "show",
    "unknown suffix": "sweep --seq 36q",
    "empty list": "sweep --seq ,",
    "zero ranks": "sweep --cp 0",
    "not a degree": "sweep --cp two",
    "too many ranks": "sweep --cp 4096",
    "unknown model": "sweep --model qwen3-tin",
    "no config.json": "sweep --model ./nowhere/config.json",
    "unknown strategy": "sweep --strategy rng",
    "unknown target": "sweep --target prefil",
    "unknown dtype": "sweep --dtype fp32",
    "unknown quant": "sweep --quant fp7",
    "quantised attention alone": "sweep --quant fp8 --target attention",
    "unknown kernel": "sweep --set kernel=flash",
    "unknown partition": "sweep --set partition=zigzg",
    "unknown field": "sweep --set timing.precison=1%",
    "not a setting": "sweep --set precision",
    "precision of 200%": "sweep --set timing.precision=200%",
    "kernel of another device": "sweep --set kernel=sdpa",
    "no cuda": "sweep --set device=cuda",
    "heads not divisible": "sweep --cp 3 --strategy ulysses",
    "tensor-parallel heads not divisible": "sweep --tp 3",
    "expert axes of another number of ranks": "sweep --layouts tp8/ep3",
    "a list with a name that is no layout": "sweep --layouts cp2,xx",
    "two ways to say layouts": "sweep --layouts tp2 --tp 2",
    "all layouts and a degree": "sweep --gpus 8 --cp 2",
    "layouts of no ranks": "sweep --gpus 0",
    "more stages than layers": "sweep --pp 8",
    "more context-parallel ranks than tokens": "sweep --cp 8 --seq 4",
    "experts of a dense model": "sweep --ep 4",
    "a layout with experts of a dense model": "sweep --layouts cp2,tp4/ep4",
    "columns not divisible over groups": "sweep --dp 3",
    "a layout that does not divide": "sweep --layouts tp3,cp2",
    "more ranks than there may be": "sweep --cp 1024 --tp 2",
    "hybrid that is not among the layouts": "sweep --layouts cp4 --strategy u4r2",
    "zero tokens": "sweep --seq 0",
    "negative length": "sweep --seq -5",
    "zero tokens in a batch": "sweep --lengths 0,5",
    "negative prefix": "sweep --prefix -1",
    "empty batch": "sweep --lengths ,",
    "prefixes that do not pair up": "sweep --lengths 1003,517,36k --prefix 500,0",
    "prefixes of another number of batches": "sweep --lengths 5,6 --lengths 7 --prefix 1,2",
    "two kinds of batches": "sweep --seq 36k --lengths 5,6",
    "a batch size for batches": "sweep --batch 2 --lengths 5,6",
    "axes that do not pair up": "sweep --seq 1k,2k --batch 1,2,3 --cp 2,4 --pair",
    "batches that do not pair up": "sweep --lengths 5,6 --lengths 7 --cp 2,4,8 --pair",
    "prefix longer than the cache": "sweep --seq 1k --prefix 32k --set cache_tokens=16k",
    "batch longer than the cache": "sweep --lengths 1003,517,36k --prefix 500,0,8k --cp 2 --set cache_tokens=32k --strategy allgather",
    "one batch longer than the cache": "sweep --lengths 5,6 --lengths 36k --cp 2 --set cache_tokens=1k",
    "cache of no tokens": "sweep --set cache_tokens=0",
    "pages of no tokens": "sweep --set page_size=0",
    "negative pages": "sweep --set page_size=-16",
    "chunk of no tokens": "sweep --chunk 0",
    "chunk shorter than 2*cp": "sweep --cp 8 --chunk 15",
    "chunk shorter than 2*cp of one degree": "sweep --cp 2,8 --chunk 15",
    "chunk without a cache": "sweep --chunk 8k --set kv_cache=drop",
    "partition that the strategy cannot do": "sweep --cp 2 --strategy ulysses-gather --partition zigzag",
    "partition that no strategy can do": "sweep --cp 2 --partition replicated",
    "unknown partition flag": "sweep --cp 2 --partition zigzg",
    "hybrid without its ranks": "sweep --cp 2,4 --strategy u4r2",
    "hybrid without ranks": "sweep --strategy u4r2",
    "hybrid of one rank": "sweep --cp 2 --strategy u1r1",
    "hybrid heads not divisible": "sweep --cp 6 --strategy u3r2",
    "hybrid that is none": "sweep --cp 4 --strategy u4r",
    "head groups not divisible": "sweep --cp 2 --strategy allgather --set head_groups=3",
    "head groups of another strategy": "sweep --cp 2 --strategy ring --set head_groups=2",
    "compile of another strategy": "sweep --cp 2 --strategy ring --set compile=inductor",
    "compile of one of several strategies": "sweep --cp 2 --strategy ring,local-map --set compile=inductor",
    "unknown compile": "sweep --cp 2 --strategy local-map --set compile=cudagraph",
    "negative head groups": "sweep --set head_groups=-1",
    "field of a batch": "sweep --set batches=[{lengths:[5],prefix:3}]",
    "too many layers": "sweep --layers 5",
    "negative seed": "sweep --seed -1",
    "not a duration": "sweep --budget soon",
    "scenario that is not there": "sweep --scenario nowhere.yaml",
    "scenario that is not YAML": "sweep --scenario broken.yaml",
    "scenario with an unknown field": "sweep --scenario misspelt.yaml",
    "scenario with an unknown name": "sweep --scenario smok",
    "scenario that extends itself": "sweep --scenario itself.yaml",
    "scenario that extends nothing": "sweep --scenario baseless.yaml",
    "one variant": "sweep --cp 2 --ab strategy=ring",
    "variants that are the same": "sweep --cp 2 --ab strategy=ring strategy=ring",
    "a variant that is no setting": "sweep --cp 2 --ab ring allgather",
    "a variant of an unknown field": "sweep --cp 2 --ab kernel=auto kernl=auto",
    "a variant of an unknown strategy": "sweep --cp 2 --ab strategy=ring strategy=rnig",
    "a variant of the run": "sweep --cp 2 --ab strategy=ring threads=1",
    "variants of different ranks": "sweep --ab cp=2 cp=4",
    "variants that do not pair up": "sweep --cp 2 --ab strategy=ring strategy=allgather,ulysses",
    "a variant that cannot run": "sweep --cp 3 --ab strategy=ring strategy=ulysses",
    "resume with variants": "sweep --resume --ab strategy=ring strategy=allgather",
    "output that exists": "sweep --seq 256 -o there.json",
    "output in a file": "sweep --seq 256 -o there.json/r.json",
    "output that is not json": "sweep --seq 256 -o r.csv",
    "retry without resume": "sweep --retry oom",
    "force without resume": "sweep --force",
    "nothing to resume": "sweep --resume",
    "resume with another length": "sweep --resume --seq 36k",
    "resume with another strategy": "sweep --resume --strategy ring",
    "resume with other batches": "sweep --resume --lengths 5,6",
    "resume with another chunk": "sweep --resume --chunk 8k",
    "resume with other layouts": "sweep --resume --layouts cp2",
    "resume with a dry run": "sweep --resume --dry-run",
    "unknown status": "sweep --resume --retry oom,crsh",
    "unknown list": "list kernel",
}
UNREADABLE = {
    "no such file": "show r.json",
    "a folder": "show .",
    "not JSON": "show broken.yaml",
    "truncated": "show truncated.json",
    "foreign": "show foreign.json",
    "newer": "show newer.json",
    "damaged": "show damaged.json",
    "empty journal": "show empty.jsonl",
    "foreign journal": "show foreign.jsonl",
    "resume of a foreign file": "sweep --resume -o foreign.json",
    "resume without a scenario": "sweep --resume -o damaged_scenario.json",
}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the commands name; and a driver that refuses to start ranks."""
    good = samples.healthy().model_dump_json(by_alias=True)
    data = json.loads(good)
    contents = {
        "there.json": good,
        "truncated.json": good[: len(good) // 2],
        "foreign.json": '{"results": [1, 2, 3]}',
        "newer.json": json.dumps({**data, "schema_version": 99}),
        "damaged.json": json.dumps({**data, "cells": [{**data["cells"][0], "status": "fine"}]}),
        "damaged_scenario.json": json.dumps({**data, "run": {**data["run"], "scenario": {"seq": "36q"}}}),
        "empty.jsonl": "",
        "foreign.jsonl": '{"a": 1}\n{"b": 2}\n',
        "broken.yaml": "seq: [36k\ncp: }",
        "misspelt.yaml": "sequence: 36k\n",
        "itself.yaml": "extends: itself.yaml\n",
        "baseless.yaml": "extends: base.yaml\n",
    }
    for name, text in contents.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cpbench.driver, "Torchrun", lambda: pytest.fail("ranks would have been started"))
    return tmp_path


@pytest.mark.parametrize(("cases", "code", "name"), [(USAGE, 2, "errors_usage"), (UNREADABLE, 4, "errors_unreadable")])
def test_bad_input(cases: dict[str, str], code: int, name: str, files: Path, cpbench_command: Cpbench, golden: Golden) -> None:
    before = {path: path.read_bytes() for path in files.iterdir()}
    said = []
    for what, command in cases.items():
        arguments = command.split()
        ran = cpbench_command(*arguments[:1], *(["-q"] if arguments[:1] == ["sweep"] else []), *arguments[1:])
        lines = ran.err.splitlines()
        assert (ran.code, ran.out, len(lines)) == (code, "", 2), f"{what}: {ran}"
        assert lines[0].startswith("error: ") and lines[0].endswith("."), what
        assert lines[1].startswith("hint:  ") and len(lines[1]) > len("hint:  "), what
        said.append(f"# {what}\n$ cpbench {command}\n{ran.err}")
    golden(name, "\n".join(said))
    assert {path: path.read_bytes() for path in files.iterdir()} == before


def test_interrupt_before_anything_is_started(cpbench_command: Cpbench, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cpbench.environment.detect_machine", interrupted)
    ran = cpbench_command("sweep")
    assert (ran.code, ran.out, ran.err) == (130, "", "")


def test_a_bug_keeps_its_traceback(cpbench_command: Cpbench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("cpbench.environment.detect_machine", broken)
    with pytest.raises(ZeroDivisionError):
        cpbench_command("list", "models")


def test_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text(samples.healthy().model_dump_json(by_alias=True))
    for arguments in (["show", str(file)], ["show", "--json", str(file)]):
        process = subprocess.Popen([sys.executable, "-m", "cpbench", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.close()
        _, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (141, b"")


HEAVY = {"torch", "pandas", "matplotlib", "scipy", "numpy", "yaml", "psutil", "cpbench.results", "cpbench.scenario"}


@pytest.mark.parametrize("arguments", [["--help"], ["sweep", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = f"import sys; from cpbench.cli import run; run({arguments!r}); sys.stderr.write(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert "cpbench.cli" in done.stderr.split()
    assert not HEAVY & set(done.stderr.split())
