"""The longest sequence, and who had the memory when it ran out, with real ranks under a small limit."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpbench.cell import Cell
from cpbench.environment import detect_machine
from cpbench.formulas import live_bytes
from cpbench.launch import Torchrun
from cpbench.maxseq import MULTIPLE, answers, of_length, run_maxseq
from cpbench.memory_record import read_history
from cpbench.results import CellResult
from tests.dist.sweeps import planned, sweep

LIMIT = 32 << 20


class Quiet:
    """A progress that says nothing."""

    def starting(self, cell: Cell) -> None: ...
    def trying(self, cell: Cell) -> None: ...
    def tried(self, result: CellResult) -> None: ...


@pytest.mark.parametrize("strategy", ["ring", "allgather"])
def test_the_longest_sequence_is_the_one_that_the_formula_predicts(strategy: str, tmp_path: Path) -> None:
    scenario, plan = planned(layouts="cp2", strategies=strategy, baseline=False, seq="2k", limits={"memory": LIMIT})
    result = run_maxseq(
        scenario, plan, detect_machine(), tmp_path / "r.json", precision=0.05, argv=[], notes=[], progress=Quiet(), launcher=Torchrun()
    )
    answer = answers(result)[0]
    cell = plan.cells[0].cell
    predicted = max(n for n in range(MULTIPLE, 65536, MULTIPLE) if max(live_bytes(of_length(cell, n), rank) for rank in range(2)) <= LIMIT)
    assert answer.tokens == pytest.approx(predicted, rel=0.08)
    assert answer.fits is not None and answer.fits.memory is not None
    assert 0.9 * LIMIT < answer.fits.memory.peak_live_bytes <= LIMIT
    assert answer.fits.memory.peak_live_bytes == pytest.approx(answer.fits.memory.predicted_live_bytes, rel=0.05)
    numerics = [trial.numerics for trial in result.cells if trial.numerics]
    assert len(numerics) == 1 and numerics[0].passed, "a layout is verified once"
    assert answer.fails is not None and answer.fails.status == "oom"
    assert "weights" in [owner.name for owner in answer.fails.failure.owners]
    assert read_history(tmp_path / answer.fails.artifacts[0]).peak > LIMIT


def test_a_sweep_under_a_limit_names_who_has_the_memory_and_keeps_the_history(tmp_path: Path) -> None:
    result = sweep(tmp_path / "r.json", seq="256,16k", cp="2", baseline=False, strategies="ring", limits={"memory": LIMIT})
    short, long = result.cells
    assert (short.status, short.artifacts, short.failure) == ("ok", [], None)
    assert long.status == "oom" and not long.metrics
    assert long.reason.startswith(f"rank {long.failure.rank} ran out of memory: tried to allocate ")
    assert "of the limit of 32.0 MiB in use; largest: " in long.reason
    owners = {owner.name: owner.bytes for owner in long.failure.owners}
    assert owners["weights"] > 18 << 20
    assert any(name.startswith("layer/") and "aten::" in name for name in owners), owners
    history = read_history(tmp_path / long.artifacts[0])
    assert history.peak > LIMIT
    assert history.peak_by_phase()["layer"] == history.peak
    assert (tmp_path / long.artifacts[1]).suffix == ".svg" and (tmp_path / long.artifacts[1]).exists()
