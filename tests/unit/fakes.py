"""A launcher without processes, and a progress that takes notes: what drives the driver in milliseconds.

The fake does what ranks would do, by the same files: it writes events line by line, and rank files where a rank raised.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from cpbench.cell import Cell
from cpbench.environment import Machine
from cpbench.plan import Plan, make_plan
from cpbench.results import CellResult, ResultFile
from cpbench.scenario import Scenario, parse_scenario, resolve

CPU = Machine("cpu", 0, 2, 8 << 30, "a CPU")
SUMMARY = "Root Cause (first observed failure):\n[0]:\n  rank      : {rank} (local_rank: {rank})\n  exitcode  : -{signal} (pid: 7)\n"


def record(seconds: float = 1.0, **changes: Any) -> dict[str, Any]:
    """What a worker reports of a cell that went well."""
    return {
        "status": "ok",
        "reason": None,
        "samples": [seconds, seconds * 1.01, seconds * 0.99],
        "stop": "max_seconds",
        "skew_samples": [1.0, 1.1, 1.0],
        "first_call_s": seconds * 2,
        "flops_per_rank": 1e12,
        "kernel": "cpu_flash",
        "tokens_per_rank": 128,
        "cp_active": True,
        "cp_off_reason": None,
        "threads_per_rank": 1,
        "oversubscribed": False,
        "memory": {"rank": 0, "peak_live_bytes": 1000},
        "ranks": [{"rank": 0, "coordinates": {"cp": 0, "tp": 0}, "tokens": 128, "score_pairs": 5}],
        "traffic": {"bytes": 10, "calls": 1},
        "numerics": {"ratio": 1.0, "logits_max_error": 0.01},
        "first_tokens": [{"token": 17, "margin": 0.3}],
        "warnings": [],
        **changes,
    }


Action = Callable[["FakeGroup", dict[str, Any]], bool]  # does a cell's part; returns whether the group lives on


class FakeGroup:
    """The files and the exit code of one group."""

    def __init__(self, job: dict[str, Any], log_dir: Path) -> None:
        self.job, self.log_dir = job, log_dir
        self.code: int | None = 0
        self.text = ""
        self.killed = 0
        self.held: list[dict[str, Any]] | None = None  # of two cells that alternate, what is said when both are done

    def event(self, **fields: Any) -> None:
        if fields["event"] == "done" and self.held is not None:
            self.held.append(fields)
            return
        with Path(self.job["events"]).open("a") as file:
            file.write(json.dumps(fields) + "\n")

    def rank_file(self, rank: int, **fields: Any) -> None:
        Path(f"{self.job['events']}.rank{rank}.json").write_text(json.dumps({"rank": rank, **fields}))

    def log(self, rank: int, text: str) -> None:
        file = self.log_dir / "run" / "attempt_0" / str(rank) / "stderr.log"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def poll(self) -> int | None:
        return self.code

    def kill(self) -> None:
        self.killed += 1
        self.code = -9 if self.code is None else self.code

    def output(self) -> str:
        return self.text


class FakeLauncher:
    """`actions` maps a part of a cell's label to what happens in it, once per entry of a list, or always."""

    def __init__(self, actions: dict[str, Action | list[Action]] | None = None, start: list[Action] | None = None) -> None:
        self.actions, self.start_actions = dict(actions or {}), list(start or [])
        self.groups: list[FakeGroup] = []
        self.jobs: list[tuple[int, int, list[str]]] = []  # world size, round, labels

    def start(self, job: Path, world_size: int, threads: int, log_dir: Path) -> FakeGroup:
        data = json.loads(job.read_text())
        assert (data["world_size"], data["threads"]) == (world_size, threads)
        group = FakeGroup(data, log_dir)
        self.groups.append(group)
        self.jobs.append((world_size, data["round"], [" | ".join(Cell.from_dict(one["cell"]).label for one in variants(entry)) for entry in data["cells"]]))
        if self.start_actions and not self.start_actions.pop(0)(group, {}):
            return group
        group.event(event="ready", environment={"torch": "9.9", "ranks": world_size})
        for entry in data["cells"]:
            group.event(event="start", index=entry["index"])
            group.held = [] if "other" in entry else None
            for one in variants(entry):
                group.event(event="turn", index=one["index"])
                if not self._action(Cell.from_dict(one["cell"]).label)(group, {**one, "alternated": "other" in entry}):
                    return group
            done, group.held = group.held, None
            for fields in done or []:
                group.event(**fields)
        group.event(event="end")
        return group

    def _action(self, label: str) -> Action:
        for part, action in self.actions.items():
            if part in label:
                return action if callable(action) else action.pop(0) if action else well()
        return well()


def variants(entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells of an entry: one, or two that alternate."""
    return [entry, *([entry["other"]] if "other" in entry else [])]


def well(seconds: float = 1.0, **changes: Any) -> Action:
    def act(group: FakeGroup, entry: dict[str, Any]) -> bool:
        for n in range(1, 4):
            group.event(event="sample", index=entry["index"], n=n, seconds=seconds)
        numerics = {} if entry["verify"] else {"numerics": None}
        group.event(event="done", index=entry["index"], record=record(seconds, **numerics | {"alternated": entry["alternated"]} | changes))
        return True

    return act


def raises(rank: int = 1, status: str = "crash", reason: str = "RuntimeError: boom") -> Action:
    def act(group: FakeGroup, entry: dict[str, Any]) -> bool:
        group.rank_file(rank, index=entry.get("index"), status=status, reason=reason, log_tail=["Traceback", reason])
        group.code = 1
        return False

    return act


def dies(rank: int = 1, signal: int = 9) -> Action:
    def act(group: FakeGroup, entry: dict[str, Any]) -> bool:
        group.rank_file(0, index=entry.get("index"), status="crash", reason="Connection closed by peer", log_tail=[])
        group.log(rank, "last words\n")
        group.text, group.code = SUMMARY.format(rank=rank, signal=signal), 1
        return False

    return act


def hangs(group: FakeGroup, entry: dict[str, Any]) -> bool:
    group.log(0, "waiting in all_gather\n")
    group.log(1, "stuck in line 7\n")
    group.code = None
    return False


class Notes:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def begin(self, plan: Plan, output: Path) -> None:
        self.calls.append(("begin", len(plan.cells)))

    def launching(self, world_size: int, round: int) -> None:  # noqa: A002
        self.calls.append(("launching", world_size, round))

    def cell_started(self, cell: Cell, round: int) -> None:  # noqa: A002
        self.calls.append(("started", cell.label, round))

    def sample(self, cell: Cell, n: int, samples: list[float], seconds_left: float) -> None:
        assert n == len(samples) and seconds_left >= 0
        self.calls.append(("sample", cell.label, n))

    def cell_finished(self, result: CellResult) -> None:
        self.calls.append(("finished", result.id, result.status))

    def warn(self, text: str) -> None:
        self.calls.append(("warn", text))

    def end(self, result: ResultFile) -> None:
        self.calls.append(("end", result.run.complete))

    def of(self, kind: str) -> list[tuple[Any, ...]]:
        return [call for call in self.calls if call[0] == kind]


def made(**fields: Any) -> tuple[Scenario, Plan]:
    """A small scenario, resolved and planned on a machine with two cores."""
    scenario, _ = resolve(parse_scenario({"seq": "256", "cp": "2", "strategies": "ring,allgather", **fields}), CPU)
    return scenario, make_plan(scenario, CPU)


def statuses(cells: Iterable[CellResult]) -> list[str]:
    return [cell.status for cell in cells]
