"""The driver with pairs of variants: one entry for both, and a failure of one costs the other nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cpbench.reading import read
from tests.unit.fakes import FakeGroup, FakeLauncher, hangs, raises, statuses, well
from tests.unit.test_driver import ALLGATHER, RING, Run, Watched, interrupts

AB = {"ab": ["strategy=ring", "strategy=allgather"]}
BOTH = f"{RING} | {ALLGATHER}"


def takes(*samples: float, **changes: Any) -> Any:
    return well(samples=list(samples), skew_samples=[], **changes)


def test_a_pair_is_one_entry_and_two_cells(tmp_path: Path) -> None:
    run = Run(tmp_path, FakeLauncher({"ring": takes(1.0, 1.2), "allgather": takes(0.9, 1.08)}), **AB)
    assert run.launcher.jobs == [(1, 0, ["cp1 none 256"]), (2, 0, [BOTH])]
    entry = run.launcher.groups[1].job["cells"][0]
    assert (entry["index"], entry["verify"], entry["other"]["index"], entry["other"]["verify"]) == (1, True, 2, True)
    assert statuses(run.result.cells) == ["ok"] * 3 and run["cp1 none 256"].ab is None
    a, b = run[RING], run[ALLGATHER]
    assert (a.ab.variant, a.ab.other, a.ab.rounds, a.ab.ratio) == ("A", b.id, [0], None)
    assert (b.ab.variant, b.ab.other, b.ab.rounds, b.ab.blocks) == ("B", a.id, [0], 1)
    assert b.ab.ratio == pytest.approx(0.9) and b.ab.ratio_ci95 is None
    assert read(run.output) == run.result


def test_pairs_stay_together_through_shuffled_rounds(tmp_path: Path) -> None:
    run = Run(tmp_path, FakeLauncher({"": takes(1.0, 1.0)}), rounds=4, seq="256,512,1k,2k", baseline=False, **AB)
    assert all(" | " in label and label.startswith("cp2 ring") for _, _, labels in run.launcher.jobs for label in labels)
    assert len({tuple(labels) for _, _, labels in run.launcher.jobs}) > 2
    assert run[RING].ab.rounds == run[ALLGATHER].ab.rounds == [0, 1, 2, 3] and run[ALLGATHER].ab.blocks == 4


def test_a_variant_that_fails_leaves_the_other_to_run_alone(tmp_path: Path) -> None:
    for failing, other in ((RING, ALLGATHER), (ALLGATHER, RING)):
        run = Run(tmp_path / failing[4:8], FakeLauncher({failing[4:8]: raises()}), **AB)
        assert run[failing].status == "crash" and run[other].status == "ok"
        assert run.launcher.jobs[-1] == (2, 0, [other]) and run[other].ab.rounds == [None]
        assert run[ALLGATHER].ab.ratio is None and run[failing].ab.rounds == []


def test_a_variant_that_is_wrong_costs_the_other_nothing(tmp_path: Path) -> None:
    run = Run(tmp_path, FakeLauncher({"ring": well(status="wrong", reason="ratio 2.0", samples=[]), "allgather": well(alternated=False)}), **AB)
    assert (run[RING].status, run[ALLGATHER].status, run[ALLGATHER].ab.rounds) == ("wrong", "ok", [None])
    assert len(run.launcher.jobs) == 2


def test_a_pair_has_twice_the_time_and_a_hang_is_that_of_the_one_at_work(tmp_path: Path) -> None:
    run = Run(tmp_path, FakeLauncher({"allgather": hangs}), limits={"cell_timeout": 0.05}, **AB)
    assert (run[ALLGATHER].status, run[ALLGATHER].reason) == ("timeout", "not done after 0.1 s")
    assert run[RING].status == "ok"


def test_a_failure_in_a_later_round_keeps_the_rounds_in_which_they_alternated(tmp_path: Path) -> None:
    run = Run(tmp_path, FakeLauncher({"ring": [takes(1.0, 1.0), raises()], "allgather": takes(2.0, 2.0)}), rounds=3, baseline=False, **AB)
    assert [labels for _, _, labels in run.launcher.jobs] == [[BOTH], [BOTH], [ALLGATHER], [ALLGATHER]]
    assert (run[RING].status, run[RING].ab.rounds, run[ALLGATHER].ab.rounds) == ("crash", [0], [0, None, None])


def test_an_interrupt_marks_both_and_a_resume_runs_them_together(tmp_path: Path) -> None:
    run = Run(tmp_path, FakeLauncher({"allgather": [takes(2.0, 2.0), interrupts], "ring": [takes(1.0, 1.0), nothing, takes(1.0, 1.0)]}), rounds=2, **AB)
    assert (run[RING].status, run[ALLGATHER].status) == ("interrupted", "interrupted")
    assert run[RING].ab.rounds == run[ALLGATHER].ab.rounds == [0]
    resumed = Run(tmp_path, FakeLauncher({"ring": takes(1.0, 1.0), "allgather": takes(3.0, 3.0)}), resume=read(run.output), rounds=2, **AB)
    assert [labels for _, number, labels in resumed.launcher.jobs if number] == [[BOTH]]
    assert resumed[ALLGATHER].ab.rounds == [0, 1] and resumed[ALLGATHER].ab.ratio == pytest.approx(2.5)


def nothing(group: FakeGroup, entry: dict[str, Any]) -> bool:
    """The cell is prepared, and its passes are still to come."""
    return True


def test_a_pair_that_was_never_run_says_what_it_is(tmp_path: Path) -> None:
    run = Run(tmp_path, FakeLauncher({"none": interrupts}), **AB)
    assert {cell.id: cell.ab.variant for cell in run.result.cells if cell.ab} == {run[RING].id: "A", run[ALLGATHER].id: "B"}


def test_a_pair_fits_into_the_budget_as_a_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpbench.pace.Pace.fits", lambda self, together, starting: len(together) == 1)
    run = Run(tmp_path, FakeLauncher(), limits={"budget": "1h"}, **AB)
    assert (run[RING].status, run[ALLGATHER].status, run["cp1 none 256"].status) == ("skipped", "skipped", "ok")


def test_both_variants_have_the_clocks_of_their_common_window(tmp_path: Path) -> None:
    def prepared(group: FakeGroup, entry: dict[str, Any]) -> bool:
        for event in ("timed", "sampled"):
            group.event(event=event, index=entry["index"])
        return takes(1.0, 1.0)(group, entry)

    run = Run(tmp_path, FakeLauncher({"ring": prepared, "allgather": takes(1.0, 1.0)}), clocks=Watched(), **AB)
    assert run[RING].clocks == run[ALLGATHER].clocks and len(run[RING].clocks.rounds) == 1
    assert run["cp1 none 256"].clocks.rounds == []
