"""The driver with ranks that are scripts: every way in which a cell can go wrong costs that cell only."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cpbench.clock_record import ClockRound, CpuClocks
from cpbench.driver import exit_code, run_sweep
from cpbench.errors import CpbenchError
from cpbench.reading import read
from cpbench.results import ResultFile
from tests.unit.fakes import CPU, Action, FakeGroup, FakeLauncher, Notes, dies, hangs, made, raises, statuses, well

RING, ALLGATHER = "cp2 ring 256", "cp2 allgather 256"


class Run:
    """One run of the driver and everything that can be asked about it."""

    def __init__(
        self,
        folder: Path,
        launcher: FakeLauncher,
        *,
        clocks: Watched | None = None,
        resume: ResultFile | None = None,
        retry: tuple[str, ...] = ("interrupted",),
        **fields: Any,
    ) -> None:
        self.scenario, self.plan = made(**fields)
        self.notes, self.launcher, self.output = Notes(), launcher, folder / "r.json"
        self.result = run_sweep(
            self.scenario,
            self.plan,
            CPU,
            self.output,
            argv=["sweep"],
            notes=["a note"],
            progress=self.notes,
            launcher=launcher,
            clocks=clocks,
            resume=resume,
            retry=retry,
        )

    def __getitem__(self, label: str) -> Any:
        cell = next(planned.cell for planned in self.plan.cells if planned.cell.label == label)
        found = self.result.cell(cell.id)
        assert found is not None
        return found


def test_a_sweep_that_goes_well(tmp_path: Path) -> None:
    run = Run(tmp_path, FakeLauncher())
    assert statuses(run.result.cells) == ["ok"] * 3
    assert [cell.key["layout"] for cell in run.result.cells] == ["cp1", "cp2", "cp2"]
    assert run.launcher.jobs == [(1, 0, ["cp1 none 256"]), (2, 0, [RING, ALLGATHER])]
    assert exit_code(run.result) == 0 and run.result.run.complete
    assert read(run.output) == run.result
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]  # neither journal nor temporary files
    assert all(group.killed for group in run.launcher.groups)
    assert run.result.environment["running"] == {"1": {"torch": "9.9", "ranks": 1}, "2": {"torch": "9.9", "ranks": 2}}
    kinds = [call[0] for call in run.notes.calls]
    assert kinds[:3] == ["begin", "launching", "started"] and kinds[-1] == "end" and kinds.count("sample") == 9
    assert run.result.run.defaults == ["a note"] and run.result.run.scenario["seq"] == [256]


def test_the_job_says_what_the_ranks_need(tmp_path: Path) -> None:
    run = Run(tmp_path, FakeLauncher(), cp="4", strategies="ring", limits={"cell_timeout": "5s"})
    job = run.launcher.groups[1].job
    assert (job["world_size"], job["round"], job["device"], job["threads"], job["cores"]) == (4, 0, "cpu", 1, 2)
    assert job["oversubscribed"] is True and job["cell_timeout"] == 5.0
    assert job["timing"] == {"min_samples": 3, "max_samples": 30, "max_seconds": 10.0, "precision": 0.02}
    assert job["cells"][0]["verify"] is True and job["cells"][0]["cell"]["layout"] == "cp4"


@pytest.mark.parametrize(
    ("action", "status", "rank", "words"),
    [
        (raises(1), "crash", 1, "RuntimeError: boom"),
        (raises(0, "oom", "CUDA out of memory"), "oom", 0, "out of memory"),
        (dies(1, 9), "crash", 1, "rank 1 was killed by SIGKILL"),
        (dies(1, 11), "crash", 1, "rank 1 was killed by SIGSEGV"),
        (dies(1, 6), "crash", 0, "Connection closed by peer"),  # an abort follows from what the other rank reported
    ],
)
def test_a_rank_that_fails_costs_its_cell_only(tmp_path: Path, action: Action, status: str, rank: int, words: str) -> None:
    run = Run(tmp_path, FakeLauncher({"ring": action}))
    failed = run[RING]
    assert (failed.status, failed.failure.rank) == (status, rank)
    assert words in failed.reason
    assert run[ALLGATHER].status == "ok"
    assert [job[2] for job in run.launcher.jobs[1:]] == [[RING, ALLGATHER], [ALLGATHER]]  # a fresh group for what remained
    assert exit_code(run.result) == 5


def test_the_log_of_a_killed_rank_is_in_the_record(tmp_path: Path) -> None:
    assert Run(tmp_path, FakeLauncher({"ring": dies(1)}))[RING].failure.log_tail == ["last words"]


def test_a_rank_that_ran_out_of_memory_is_the_cause_even_if_another_spoke_first(tmp_path: Path) -> None:
    def act(group: FakeGroup, entry: dict[str, Any]) -> bool:
        group.rank_file(0, index=entry["index"], status="crash", reason="Connection closed by peer", log_tail=[])
        return raises(1, "oom", "no memory")(group, entry)

    failed = Run(tmp_path, FakeLauncher({"ring": act}))[RING]
    assert (failed.status, failed.failure.rank, failed.reason) == ("oom", 1, "no memory")


def test_a_hang_becomes_a_timeout_with_what_every_rank_last_said(tmp_path: Path) -> None:
    run = Run(tmp_path, FakeLauncher({"ring": hangs}), limits={"cell_timeout": 0.05})
    assert run[RING].status == "timeout" and "0.05 s" in run[RING].reason
    assert run[RING].failure.log_tail == ["[rank 0] waiting in all_gather", "[rank 1] stuck in line 7"]
    assert run[ALLGATHER].status == "ok"
    assert run.launcher.groups[1].killed


def test_a_group_that_ends_without_a_word_is_a_crash(tmp_path: Path) -> None:
    def act(group: FakeGroup, entry: dict[str, Any]) -> bool:
        group.code = 3
        return False

    run = Run(tmp_path, FakeLauncher({"ring": act}))
    assert run[RING].status == "crash" and "exit code 3" in run[RING].reason and run[ALLGATHER].status == "ok"


def test_a_group_that_does_not_start_is_tried_twice(tmp_path: Path) -> None:
    def act(group: FakeGroup, _: dict[str, Any]) -> bool:
        group.text, group.code = "no such module\n", 1
        return False

    once = Run(tmp_path / "a", FakeLauncher(start=[act]))
    assert statuses(once.result.cells) == ["ok"] * 3 and "trying once more" in once.notes.of("warn")[0][1]
    twice = Run(tmp_path / "b", FakeLauncher(start=[well_start, act, act]))
    assert statuses(twice.result.cells) == ["ok", "crash", "crash"]
    assert twice[RING].failure.log_tail == ["no such module"] and "before they were ready" in twice[RING].reason
    assert len(twice.launcher.groups) == 3


def well_start(group: FakeGroup, _: dict[str, Any]) -> bool:
    return True


def test_ranks_that_never_get_ready_are_given_up_at_the_start_timeout(tmp_path: Path) -> None:
    run = Run(tmp_path, FakeLauncher(start=[hangs, hangs]), cp="1", limits={"start_timeout": 0.05})
    assert statuses(run.result.cells) == ["crash"] and "not ready for 0.05 s" in run.result.cells[0].reason
    assert exit_code(run.result) == 6


def test_a_group_that_stops_between_two_cells_is_restarted_for_the_rest(tmp_path: Path) -> None:
    def act(group: FakeGroup, entry: dict[str, Any]) -> bool:
        well()(group, entry)
        return raises(0)(group, {"index": None})

    run = Run(tmp_path, FakeLauncher({"ring": act}))
    assert statuses(run.result.cells) == ["ok"] * 3
    assert [job[2] for job in run.launcher.jobs[1:]] == [[RING, ALLGATHER], [ALLGATHER]]


def test_a_group_that_ends_early_without_an_error_does_not_lose_cells(tmp_path: Path) -> None:
    def act(group: FakeGroup, entry: dict[str, Any]) -> bool:
        well()(group, entry)
        group.event(event="end")
        return False

    assert statuses(Run(tmp_path, FakeLauncher({"ring": act})).result.cells) == ["ok"] * 3


@pytest.mark.parametrize(
    "record", [{"samples": []}, {"samples": [float("nan")]}, {"samples": [0.0]}, {"status": "fine"}, {"memory": {"rank": "x"}}, {"skew_samples": "ab"}]
)
def test_a_record_that_cannot_be_read_is_a_crash_of_its_cell(tmp_path: Path, record: dict[str, Any]) -> None:
    run = Run(tmp_path, FakeLauncher({"ring": well(**record)}))
    assert run[RING].status == "crash" and "record" in run[RING].reason and run[ALLGATHER].status == "ok"


def test_a_line_that_is_not_json_is_a_crash(tmp_path: Path) -> None:
    def act(group: FakeGroup, entry: dict[str, Any]) -> bool:
        with Path(group.job["events"]).open("a") as file:
            file.write("{oops\n")
        return False

    run = Run(tmp_path, FakeLauncher({"ring": act}))
    assert run[RING].status == "crash" and "not JSON" in run[RING].reason and run[ALLGATHER].status == "ok"


def test_wrong_numerics_leave_no_time(tmp_path: Path) -> None:
    run = Run(tmp_path, FakeLauncher({"ring": well(status="wrong", reason="ratio 2.0 is above 1.3", samples=[])}))
    assert run[RING].status == "wrong" and run[RING].metrics == {} and run[RING].reason == "ratio 2.0 is above 1.3"


def test_another_first_token_beyond_the_error_is_wrong(tmp_path: Path) -> None:
    tokens = [{"token": 18, "margin": 0.2}]
    run = Run(tmp_path, FakeLauncher({"ring": well(first_tokens=tokens), "allgather": well(first_tokens=[{"token": 18, "margin": 0.001}])}))
    assert run[RING].status == "wrong" and run[RING].metrics == {} and "in cp1 it is 17" in run[RING].reason
    assert run[ALLGATHER].status == "ok" and "within the error" in run[ALLGATHER].warnings[0]


def test_rounds_are_fresh_passes_and_later_ones_are_shuffled(tmp_path: Path) -> None:
    run = Run(tmp_path, FakeLauncher(), rounds=4, seq="256,512,1k,2k", cp="2", baseline=False)
    jobs = run.launcher.jobs
    assert [job[:2] for job in jobs] == [(2, number) for number in range(4)]
    assert jobs[0][2][0] == RING and len({tuple(job[2]) for job in jobs}) > 2
    assert {tuple(sorted(job[2])) for job in jobs} == {tuple(sorted(jobs[0][2]))}
    assert [len(one) for one in run[RING].metrics["ttft_s"].rounds] == [3] * 4
    assert run[RING].metrics["ttft_s"].n == 12 and run[RING].metrics["ttft_s"].ci95 is not None
    verified = [entry["verify"] for group in run.launcher.groups for entry in group.job["cells"]]
    assert verified == [True] * 8 + [False] * 24
    assert run[RING].numerics.ratio == 1.0
    again = Run(tmp_path / "again", FakeLauncher(), rounds=4, seq="256,512,1k,2k", cp="2", baseline=False)
    assert again.launcher.jobs == jobs


def test_a_cell_that_fails_in_a_later_round_keeps_the_earlier_ones(tmp_path: Path) -> None:
    run = Run(tmp_path, FakeLauncher({"ring": [well(1.0), well(2.0), raises()]}), rounds=5)
    assert run[RING].status == "crash"
    assert [one[0] for one in run[RING].metrics["ttft_s"].rounds] == [1.0, 2.0]
    assert all(RING not in job[2] for job in run.launcher.jobs if job[1] > 2)  # it is not tried again in this sweep
    assert len(run[ALLGATHER].metrics["ttft_s"].rounds) == 5


def test_cells_that_do_not_fit_into_the_budget_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpbench.pace.Pace.ratio", 1.0)  # the fake ranks take no time
    run = Run(tmp_path, FakeLauncher(), seq="256,256k", limits={"budget": "20s"})
    found = {cell.key["lengths"][0]: cell.status for cell in run.result.cells}
    assert found == {256: "ok", 256 * 1024: "skipped"}
    assert "budget of 20.0 s" in (run.result.cells[1].reason or "")
    assert exit_code(run.result) == 0
    resumed = Run(tmp_path, FakeLauncher(), seq="256,256k", resume=run.result)
    assert set(statuses(resumed.result.cells)) == {"ok"} and len(resumed.launcher.jobs) == 2


def test_a_round_that_does_not_fit_keeps_the_earlier_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpbench.pace.Pace.fits", lambda self, planned, starting: self._estimated < 2.5)
    run = Run(tmp_path, FakeLauncher(), rounds=2, limits={"budget": "1h"})
    assert statuses(run.result.cells) == ["ok"] * 3
    assert run[RING].metrics["ttft_s"].n == 3 and "round 2 of 2 did not fit" in run[RING].warnings[0]


def interrupts(group: FakeGroup, entry: dict[str, Any]) -> bool:
    os.kill(os.getpid(), signal.SIGINT)
    return hangs(group, entry)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_is_done_and_a_resume_runs_the_rest(tmp_path: Path, number: signal.Signals) -> None:
    def act(group: FakeGroup, entry: dict[str, Any]) -> bool:
        os.kill(os.getpid(), number)
        return hangs(group, entry)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run = Run(tmp_path, FakeLauncher({"ring": act}))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert statuses(run.result.cells) == ["ok", "interrupted", "interrupted"]
    assert run.launcher.groups[1].killed and run.notes.calls[-1] == ("end", False)
    assert exit_code(run.result) == 130 and not read(run.output).run.complete
    resumed = Run(tmp_path, FakeLauncher(), resume=read(run.output))
    assert resumed.launcher.jobs == [(2, 0, [RING, ALLGATHER])]
    assert statuses(resumed.result.cells) == ["ok"] * 3 and exit_code(resumed.result) == 0
    assert resumed.result.run.id == run.result.run.id and resumed.result.run.complete
    assert resumed.result.cells[0] == run.result.cells[0]


def test_a_resume_in_the_middle_of_rounds_runs_the_missing_ones(tmp_path: Path) -> None:
    run = Run(tmp_path, FakeLauncher({"ring": [well(), interrupts]}), rounds=3)
    assert run[RING].status == "interrupted" and len(run[RING].metrics["ttft_s"].rounds) == 1
    resumed = Run(tmp_path, FakeLauncher(), resume=read(run.output), rounds=3)
    assert {len(cell.metrics["ttft_s"].rounds) for cell in resumed.result.cells} == {3}
    assert resumed.result.run.complete and all(job[1] > 0 for job in resumed.launcher.jobs)


def test_a_resume_retries_what_it_is_told_to(tmp_path: Path) -> None:
    run = Run(tmp_path, FakeLauncher({"ring": raises(), "allgather": hangs}), limits={"cell_timeout": 0.05})
    assert statuses(run.result.cells) == ["ok", "crash", "timeout"]
    same = Run(tmp_path, FakeLauncher(), resume=run.result)
    assert same.launcher.jobs == [] and same.result.cells == run.result.cells
    crash = Run(tmp_path, FakeLauncher(), resume=run.result, retry=("crash",))
    assert crash.launcher.jobs == [(2, 0, [RING])]
    assert statuses(crash.result.cells) == ["ok", "ok", "timeout"] and crash[RING].failure is None


def test_unsupported_and_skipped_cells_are_rows_and_no_failures(tmp_path: Path) -> None:
    run = Run(tmp_path, FakeLauncher(), cp="2,3", strategies="ring,ulysses")
    assert statuses(run.result.cells) == ["ok", "ok", "ok", "ok", "unsupported"]
    assert "nearest degree" in (run.result.cells[-1].reason or "") and exit_code(run.result) == 0


def test_nothing_is_started_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    launcher = FakeLauncher()
    with pytest.raises(CpbenchError) as caught:
        Run(tmp_path / "file" / "folder", launcher)
    assert caught.value.exit_code == 2 and launcher.groups == []


def test_a_finished_file_is_not_overwritten(tmp_path: Path) -> None:
    Run(tmp_path, FakeLauncher())
    with pytest.raises(CpbenchError, match="exists"):
        Run(tmp_path, FakeLauncher())


def test_a_full_disk_ends_the_ranks_and_keeps_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cpbench import journal

    write, calls = journal._write, []

    def failing(file: Any, text: str) -> None:
        calls.append(text)
        if len(calls) > 4:  # header, environment and cell of cp1, environment of cp2
            file.write(text.encode()[:10])
            raise OSError(28, "No space left on device")
        write(file, text)

    monkeypatch.setattr(journal, "_write", failing)
    launcher = FakeLauncher()
    with pytest.raises(CpbenchError) as caught:
        Run(tmp_path, launcher)
    assert caught.value.message == "The result cannot be written: the disk is full." and "--resume" in caught.value.hint
    assert all(group.killed for group in launcher.groups)
    kept = read(tmp_path / "r.jsonl")
    assert statuses(kept.cells) == ["ok"] and not kept.run.complete
    monkeypatch.setattr(journal, "_write", write)
    assert statuses(Run(tmp_path, FakeLauncher(), resume=kept).result.cells) == ["ok"] * 3


def test_a_resume_elsewhere_says_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path, FakeLauncher({"ring": interrupts}))
    monkeypatch.setenv("NCCL_ALGO", "Tree")
    resumed = Run(tmp_path, FakeLauncher(), resume=run.result)
    assert resumed.result.environment["resumed_with_changes"] == [["variables.NCCL_ALGO", None, "Tree"]]


class Watched:
    """Clocks that note when they are asked, and say how often they were."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.ended = 0

    def group(self, gpus: Sequence[str]) -> None:
        self.calls.append(f"group {','.join(gpus)}")

    def begin(self) -> None:
        self.calls.append("begin")

    def end(self) -> ClockRound | None:
        begun = self.calls[-1] == "begin"
        self.calls.append("end")
        self.ended += begun
        cores = CpuClocks(cores=2, usable_cores=2, own_cores=1.0, others_cores=0.3 * self.ended, samples=5)
        return ClockRound(seconds=2.0, cpu=cores) if begun else None


def times(group: FakeGroup, entry: dict[str, Any]) -> bool:
    for event in ("timed", "sampled"):
        group.event(event=event, index=entry["index"])
    return well()(group, entry)


def test_clocks_are_read_while_passes_are_timed(tmp_path: Path) -> None:
    watched = Watched()
    run = Run(tmp_path, FakeLauncher({"": times}), clocks=watched, cp="1", rounds=2)
    assert watched.calls == ["group ", "begin", "end", "end"] * 2
    assert [one.cpu.others_cores for one in run.result.cells[0].clocks.rounds] == pytest.approx([0.3, 0.6])
    assert run.result.cells[0].warnings == ["other processes used 0.6 of 2 cores"]  # of both rounds the worse


def test_a_cell_that_fails_while_it_is_timed_ends_the_reading(tmp_path: Path) -> None:
    def act(group: FakeGroup, entry: dict[str, Any]) -> bool:
        group.event(event="timed", index=entry["index"])
        return raises()(group, entry)

    watched = Watched()
    run = Run(tmp_path, FakeLauncher({"": act}), clocks=watched, cp="1")
    assert watched.calls == ["group ", "begin", "end"] and run.result.cells[0].clocks.rounds == []
