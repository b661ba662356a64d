"""maxseq without processes: which trials groups get, what ends a search, what is recorded, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpbench.errors import ALL_FAILED, SOME_FAILED, CpbenchError
from cpbench.maxseq import Longest, answers, exit_code, require_limit, run_maxseq
from cpbench.plan import make_plan
from cpbench.reading import read
from cpbench.results import CellResult, ResultFile
from cpbench.scenario import parse_scenario, resolve

from .fakes import CPU, Action, FakeGroup, FakeLauncher, hangs, raises, record, well

HISTORY = {"source": "live tensors", "levels": [[0.0, 5], [0.1, 99]], "paths": [], "phases": [], "peaks": {}, "owners": []}
OWNERS = [{"name": "layer/mlp aten::mm [9, 9]", "bytes": 70}, {"name": "weights", "bytes": 20}]


class Heard:
    """A progress that counts."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def starting(self, cell: Any) -> None:
        self.lines.append("group")

    def trying(self, cell: Any) -> None: ...

    def tried(self, result: CellResult) -> None:
        self.lines.append(f"{result.key['lengths'][0]} {result.status}")


def fits_up_to(longest: int) -> Action:
    def act(group: FakeGroup, entry: dict[str, Any]) -> bool:
        length = entry["cell"]["lengths"][0]
        if length <= longest:
            memory = {"rank": 0, "peak_live_bytes": length}
            group.event(event="done", index=entry["index"], record=record(timed=False, samples=[], memory=memory))
            return True
        group.rank_file(1, index=entry["index"], status="oom", reason="rank 1 ran out of memory", owners=OWNERS, history=HISTORY, log_tail=["x"])
        group.code = 1
        return False

    return act


def searched(folder: Path, actions: dict[str, Any], **fields: Any) -> tuple[ResultFile, FakeLauncher, Heard]:
    given = {"seq": "1k", "layouts": "cp2", "strategies": "ring", "baseline": False, "limits": {"memory": "1G"}, **fields}
    scenario, notes = resolve(parse_scenario(given), CPU)
    plan, launcher, heard = make_plan(scenario, CPU), FakeLauncher(actions), Heard()
    result = run_maxseq(scenario, plan, CPU, folder / "r.json", precision=0.01, argv=[], notes=notes, progress=heard, launcher=launcher)
    return result, launcher, heard


def only(result: ResultFile) -> Longest:
    found = answers(result)
    assert len(found) == 1
    return found[0]


def test_one_group_tries_what_fits_and_a_failure_starts_the_next(tmp_path: Path) -> None:
    result, launcher, heard = searched(tmp_path, {"": fits_up_to(2500)})
    assert heard.lines == ["group", "1024 ok", "2048 ok", "4096 oom", "group", "3072 oom", "group", "2560 oom", "group", "2304 ok", "2432 ok"]
    assert [entry["verify"] for group in launcher.groups for entry in group.job["cells"]].count(True) == 1, "only the first trial is verified"
    answer = only(result)
    assert (answer.tokens, answer.trials) == (2432, 7)
    assert answer.fails is not None and answer.fails.key["lengths"] == [2560]
    assert exit_code(result) == 0
    assert read(tmp_path / "r.json") == result and result.run.kind == "maxseq"
    assert all(not cell.metrics for cell in result.cells)


def test_the_limit_is_named_and_the_history_of_the_shortest_failure_is_kept(tmp_path: Path) -> None:
    result, _, _ = searched(tmp_path, {"": fits_up_to(2500)})
    failures = {cell.key["lengths"][0]: cell for cell in result.cells if cell.status == "oom"}
    assert [owner.name for owner in failures[2560].failure.owners] == ["layer/mlp aten::mm [9, 9]", "weights"]
    assert failures[2560].artifacts == ["r.memory/cp2-ring-rank1.json", "r.memory/cp2-ring-memory.svg"]
    assert all((tmp_path / file).exists() for file in failures[2560].artifacts)
    assert [cell.artifacts for length, cell in failures.items() if length != 2560] == [[], []]


def test_nothing_fits(tmp_path: Path) -> None:
    result, _, heard = searched(tmp_path, {"": fits_up_to(0)})
    assert heard.lines == ["group", "1024 oom", "group", "512 oom", "group", "256 oom", "group", "128 oom"]
    assert only(result).fits is None
    assert exit_code(result) == ALL_FAILED


def test_a_trial_that_takes_too_long_is_too_long_and_one_that_crashes_ends_its_layout(tmp_path: Path) -> None:
    result, _, _ = searched(tmp_path, {"1k": fits_up_to(9999), "2k": hangs, "": fits_up_to(9999)}, limits={"memory": "1G", "cell_timeout": "300ms"})
    assert only(result).tokens == 2048 - 128
    assert only(result).fails.status == "timeout"
    (tmp_path / "r.json").unlink()
    result, _, heard = searched(tmp_path, {"1k": fits_up_to(9999), "2k": raises()}, strategies="ring,allgather")
    assert heard.lines[:3] == ["group", "1024 ok", "2048 crash"]
    assert {answer.strategy: answer.fails.status for answer in answers(result)} == {"ring": "crash", "allgather": "crash"}


def test_a_wrong_answer_ends_its_layout(tmp_path: Path) -> None:
    result, _, _ = searched(tmp_path, {"": well(status="wrong", reason="off")})
    assert [cell.status for cell in result.cells] == ["wrong"]
    assert exit_code(result) == ALL_FAILED


def test_a_length_that_cannot_be_planned_is_too_long(tmp_path: Path) -> None:
    result, _, _ = searched(tmp_path, {"": fits_up_to(10**6)}, cache_tokens=3000, page_size=64)
    assert only(result).tokens is not None
    assert only(result).fails.status == "unsupported"
    assert "cache" in only(result).fails.reason


def test_what_has_no_end_or_no_beginning_is_refused() -> None:
    def refused(**fields: Any) -> CpbenchError:
        scenario, _ = resolve(parse_scenario({"seq": "1k", "layouts": "cp2,tp2", "strategies": "ring", "baseline": False, **fields}), CPU)
        with pytest.raises(CpbenchError) as error:
            require_limit(scenario, make_plan(scenario, CPU), CPU)
        return error.value

    assert "--memory-limit 4G" in refused().hint
    assert "4G" in refused(limits={"memory": "5G"}).hint
    assert "The weights of tp2 alone need" in refused(limits={"memory": "1M"}).message


def test_a_layout_whose_weights_are_too_large_is_a_row_where_another_fits(tmp_path: Path) -> None:
    result, _, _ = searched(tmp_path, {"": fits_up_to(2500)}, layouts="cp2,tp2", limits={"memory": "12M"})
    by_layout = {answer.layout: answer for answer in answers(result)}
    assert by_layout["tp2"].tokens == 2432
    assert by_layout["cp2"].fails.status == "unsupported" and "the weights alone need 18.1 MiB" in by_layout["cp2"].fails.reason
    assert by_layout["cp2"].trials == 0
    assert exit_code(result) == SOME_FAILED


def test_the_journal_has_every_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: object) -> None:
        journal = tmp_path / "r.jsonl"
        if journal.exists() and journal.read_text().count('"status":"ok"') == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("cpbench.stop.Stop.check", interrupted)
    result, _, _ = searched(tmp_path, {"": fits_up_to(2500)})
    assert not result.run.complete and exit_code(result) == 130
    assert [cell["status"] for cell in json.loads((tmp_path / "r.json").read_text())["cells"]][:2] == ["ok", "ok"]
