"""What a launch says of a process, how processes are numbered and refused, what ranks are told, and what the plan makes of several nodes."""

from __future__ import annotations

import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from cpbench.cluster import inside
from cpbench.cluster.inside import Group, Launch
from cpbench.cluster.member import Order, environment_of
from cpbench.cluster.place import PORTS, Place, first_host, place_of
from cpbench.cluster.roster import Roster, Seat, join, numbered
from cpbench.distributed.store import await_listener, connect
from cpbench.environment import Machine
from cpbench.errors import CpbenchError
from cpbench.launch import LAUNCH, LostRank, inside_launch
from cpbench.layout import Layout
from cpbench.plan import make_plan
from cpbench.report.listing import plan_echo
from cpbench.scenario import parse_scenario, resolve

TORCHRUN = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "GROUP_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}
SRUN = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "41"}


def test_torchrun_keeps_the_store_and_under_srun_rank_0_opens_it_on_the_first_host() -> None:
    assert place_of(TORCHRUN | {"TORCHELASTIC_USE_AGENT_STORE": "True"}) == Place(9, 16, 1, 1, "a", 29500, False)
    assert place_of(SRUN | {"SLURM_STEP_ID": "1"}) == Place(0, 16, 0, 0, "gpu07", PORTS[42], True)
    assert place_of(SRUN | {"SLURM_PROCID": "3", "MASTER_ADDR": "b", "MASTER_PORT": "5"}) == Place(3, 16, 0, 0, "b", 5, False)
    assert place_of(SRUN | TORCHRUN) == Place(9, 16, 1, 1, "a", 29500, False), "torchrun, started by srun on every node"


def test_a_shell_a_batch_script_and_a_launch_of_one_are_no_launch() -> None:
    assert place_of({}) is None
    assert place_of({name: value for name, value in SRUN.items() if name != "SLURM_STEP_NODELIST"}) is None
    assert place_of(TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}) is None


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not"),
        (TORCHRUN | {"RANK": "16"}, "rank 16 of 16"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
        (TORCHRUN | {"RANK": "first"}, "RANK='first'"),
    ],
)
def test_a_description_that_is_not_whole_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(CpbenchError, match=message) as caught:
        place_of(environment)
    assert caught.value.hint


@pytest.mark.parametrize(("nodes", "host"), [("gpu[03-05,9],b", "gpu03"), ("n7", "n7"), ("a,b[1-2]", "a"), ("r1n[2,4]-ib", "r1n2-ib")])
def test_the_first_host_of_a_node_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def seats(*nodes: int, world_size: int | None = None) -> list[Seat]:
    """One for each entry: its node. Local ranks count per node."""
    return [Seat(rank, world_size or len(nodes), node, nodes[:rank].count(node), f"10.0.0.{node}") for rank, node in enumerate(nodes)]


def test_ranks_are_numbered_node_by_node_however_tasks_were_dealt_out() -> None:
    roster = numbered(seats(1, 0, 1, 0))
    assert [seat.launch_rank for seat in roster.seats] == [0, 2, 1, 3], "the first process stays first"
    assert (roster.nodes, roster.ranks_per_node, roster.rank_of(1), roster.elsewhere(0)) == (2, 2, 2, "10.0.0.0")
    assert [roster.local_world_size(rank, 3) for rank in (0, 2)] == [2, 1]
    assert Roster.from_json(roster.to_json()).seats == roster.seats


@pytest.mark.parametrize(
    ("wrong", "message", "hint"),
    [
        (seats(0, 0, 1), "The nodes have 2, 1 ranks", "Start 1 on each"),
        ([*seats(0, world_size=2), Seat(1, 4, 1, 0, "b")], "Rank 1 was started as one of 4 ranks, rank 0 as one of 2", "same number"),
        ([*seats(0, world_size=2), Seat(1, 2, 1, 0, "b", "0.0.9")], "Rank 1 has cpbench 0.0.9", "Install cpbench"),
    ],
)
def test_processes_that_do_not_fit_together_are_refused(wrong: list[Seat], message: str, hint: str) -> None:
    with pytest.raises(CpbenchError, match=message) as caught:
        numbered(wrong)
    assert hint in caught.value.hint


def test_a_rank_is_told_its_place_in_the_group_and_nothing_of_the_launcher() -> None:
    roster, order = numbered(seats(0, 0, 1, 1)), Order("{}", 3, 2, "m", "head", 77)
    told = environment_of(order, 2, roster, {"RANK": "3", "TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_RANK": "1", "GLOO_SOCKET_IFNAME": "ib0"})
    assert {name: told[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")} == {
        "RANK": "2",
        "WORLD_SIZE": "3",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "head",
        "MASTER_PORT": "77",
        "OMP_NUM_THREADS": "2",
    }
    assert told["GLOO_SOCKET_IFNAME"] == "ib0", "what the user chose stays"
    assert not {"TORCHELASTIC_USE_AGENT_STORE", "GROUP_RANK"} & told.keys()
    assert environment_of(order, 1, roster, {"CUDA_VISIBLE_DEVICES": "5"})["LOCAL_RANK"] == "0", "the only GPU that it sees"
    assert environment_of(order, 1, roster, {"CUDA_VISIBLE_DEVICES": "0,1"})["LOCAL_RANK"] == "1"


class Words(dict[str, str]):
    """A store without processes."""

    def set(self, name: str, text: str) -> None:
        self[name] = text


class Ended:
    """A rank of this host that never ends by itself."""

    killed = False

    def code(self) -> int | None:
        return None

    def kill(self) -> None:
        self.killed = True


def group_of(words: Words, tmp_path: Path) -> tuple[Group, Ended]:
    job = tmp_path / "job.json"
    job.write_text(f'{{"events": "{tmp_path / "events.jsonl"}"}}')
    own = Ended()
    return Group(words, 1, 2, own, job, tmp_path / "logs"), own  # type: ignore[arg-type]


def test_what_a_rank_elsewhere_leaves_is_put_where_the_driver_looks(tmp_path: Path) -> None:
    words = Words()
    group, own = group_of(words, tmp_path)
    assert group.poll() is None
    words["1/ended/1"] = '{"code": -9, "left": false, "failure": {"rank": 1, "status": "oom"}, "log": "the end"}'
    group._next_look = 0.0
    assert group.poll() is None, "the rank of this host has been told to end, and has not ended"
    assert own.killed and words["1/stop"] == "1"
    assert (tmp_path / "logs" / "1" / "stderr.log").read_text() == "the end"
    assert '"oom"' in (tmp_path / "events.jsonl.rank1.json").read_text()
    assert "rank      : 1\n  exitcode  : -9" in group.output()


def test_a_silent_process_and_one_that_was_told_to_end_are_the_end_of_the_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inside, "SILENT_SECONDS", 0.0)
    group, _ = group_of(Words(), tmp_path)
    with pytest.raises(LostRank, match="rank 1 has not been heard of for 0 s"):
        group.poll()
    group, _ = group_of(Words({"1/ended/1": '{"code": null, "left": true, "failure": null, "log": ""}'}), tmp_path)
    with pytest.raises(LostRank, match="rank 1 was ended from outside"):
        group.poll()


def test_a_rank_that_cannot_reach_the_first_one_says_where_it_tried() -> None:
    port = inside.free_port()
    with pytest.raises(ConnectionError, match=f"cannot meet the other ranks at 127.0.0.1:{port}, .*refused"):
        await_listener("127.0.0.1", port, seconds=0.2)
    with socket.create_server(("127.0.0.1", port)):
        await_listener("127.0.0.1", port, seconds=0.2)


def test_where_the_store_cannot_be_reached_or_opened_one_sentence_says_so() -> None:
    port = inside.free_port()
    with pytest.raises(CpbenchError, match=f"cannot be reached at 127.0.0.1:{port} within 1 s"):
        connect("127.0.0.1", port, serve=False, seconds=1.0)
    with socket.create_server(("", port)), pytest.raises(CpbenchError, match=f"Port {port} is in use"):
        connect("127.0.0.1", port, serve=True, seconds=1.0)


def test_ranks_that_do_not_come_are_named() -> None:
    store = connect("127.0.0.1", port := inside.free_port(), serve=True, seconds=5.0)
    with pytest.raises(CpbenchError, match=r"Of 3 ranks 1 came within 0\.1 s; missing: 1, 2"):
        join(store, Place(0, 3, 0, 0, "127.0.0.1", port, True), seconds=0.1)
    with pytest.raises(CpbenchError, match="Two processes say that they are rank 0"):
        join(store, Place(0, 3, 0, 0, "127.0.0.1", port, True), seconds=0.1)


def test_a_process_whose_store_is_deaf_ends_itself() -> None:
    script = """
import time
from cpbench.cluster import member, roster
class Deaf:
    def get(self, name): time.sleep(60)
    def set(self, name, text): time.sleep(60)
member.DEAF_SECONDS = 0.2
member.Member(Deaf(), roster.Roster(()), 3).serve()
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (ran.returncode, ran.stderr) == (130, "error: Rank 3 has not heard of rank 0 for 0.2 s.\n")


def test_inside_a_launch_its_processes_are_the_ranks() -> None:
    assert inside_launch() is None
    token = LAUNCH.set(Launch(Words(), numbered(seats(0, 1))))  # type: ignore[arg-type]
    try:
        assert isinstance(inside_launch(), inside.Inside)
    finally:
        LAUNCH.reset(token)


def test_a_plan_divides_the_cores_of_a_node_and_knows_how_many_ranks_there_are() -> None:
    machine = replace(Machine("cpu", 0, 8, 8 << 30, "a CPU"), nodes=2, ranks_per_node=4)
    scenario, notes = resolve(parse_scenario({"device": "cpu", "seq": "256", "layouts": "cp2,tp4,cp2tp4,tp8,cp16", "strategies": "ring"}), machine)
    plan = make_plan(scenario, machine)
    assert [plan.threads_per_rank(size) for size in (2, 4, 8)] == [4, 2, 2] and plan.cores_of(8) == 16
    assert {str(planned.cell.layout): planned.reason for planned in plan.cells if planned.status == "skipped"} == {"cp16": "needs 16 ranks, this launch has 8"}
    echo = plan_echo(scenario, plan, notes, machine)
    assert "2 nodes, each: 8 cores" in echo[0]
    assert {"  in 1 cell cp crosses nodes", "  in 1 cell tp crosses nodes"} <= set(echo), "cp2tp4 and tp8 on nodes of 4 ranks"


def test_tp_stays_inside_a_node_where_it_fits() -> None:
    assert Layout(cp=2, tp=8).axes_between(8) == ("cp",)
    assert Layout(cp=4, tp=4).axes_between(8) == ("cp",)
    assert Layout(tp=16).axes_between(8) == ("tp",)
    assert Layout(cp=8).axes_between(8) == ()
