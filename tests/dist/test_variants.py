"""A real pair: two programs alive in one gloo group, their passes in turn, each with its own answer, memory and traffic."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpbench.clock_record import JUDGED_SECONDS
from cpbench.clocks import Watcher
from cpbench.driver import run_sweep
from cpbench.environment import detect_machine
from cpbench.results import CellResult, ResultFile
from tests.dist.sweeps import planned, sweep
from tests.unit.fakes import Notes


def cell(result: ResultFile, strategy: str) -> CellResult:
    return next(cell for cell in result.cells if cell.key["strategy"] == strategy)


def test_variants_alternate_and_each_has_what_it_has_alone(tmp_path: Path) -> None:
    fields = {"seq": "515", "cp": "2", "baseline": False, "timing": {"min_samples": 3, "max_samples": 4, "precision": "0.1%"}}
    alone = sweep(tmp_path / "alone.json", strategies="ring,allgather", **fields)
    scenario, plan = planned(ab=["strategy=ring", "strategy=allgather"], **fields)
    notes, machine = Notes(), detect_machine()
    pair = run_sweep(scenario, plan, machine, tmp_path / "pair.json", argv=[], notes=[], progress=notes, clocks=Watcher(machine.cores))
    a, b = cell(pair, "ring"), cell(pair, "allgather")
    assert [(one.status, one.metrics["ttft_s"].n, one.metrics["ttft_s"].stop) for one in (a, b)] == [("ok", 4, ["max_samples"])] * 2
    order = "".join("A" if "ring" in label else "B" for _, label, _ in notes.of("sample"))
    assert order == "ABBAABBA"
    assert b.ab is not None and b.ab.blocks == 2 and b.ab.ratio is not None and b.ab.ratio > 0
    for one in (a, b):
        known = cell(alone, one.key["strategy"])
        assert one.memory and known.memory and one.memory.peak_live_bytes == known.memory.peak_live_bytes
        assert one.memory.by_category == known.memory.by_category
        assert one.traffic == known.traffic and [first.token for first in one.first_tokens] == [first.token for first in known.first_tokens]
        assert one.numerics and one.numerics.passed
        assert one.split and known.split and one.split.collectives and len(one.split.collectives) == len(known.split.collectives)
        assert len(one.clocks.rounds) == 1
    assert a.clocks == b.clocks


def test_a_sweep_is_watched_while_it_is_timed(tmp_path: Path) -> None:
    scenario, plan = planned(seq="1k", cp="1", timing={"min_samples": 3, "max_samples": 100, "max_seconds": 2 * JUDGED_SECONDS, "precision": "0.1%"})
    machine = detect_machine()
    result = run_sweep(scenario, plan, machine, tmp_path / "r.json", argv=[], notes=[], progress=Notes(), clocks=Watcher(machine.cores))
    (watched,) = result.cells[0].clocks.rounds
    timed = sum(result.cells[0].metrics["ttft_s"].rounds[0])
    assert watched.cpu is not None and watched.cpu.samples >= 2 and watched.gpus == []
    assert watched.seconds == pytest.approx(timed, rel=0.5)
    assert 0.2 < watched.cpu.own_cores < watched.cpu.cores + 0.5
