"""A profile from rows as ranks write them: it prices what was measured, keeps the rows, and borrows links that one device cannot measure."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from cpbench.environment import Machine
from cpbench.errors import ALL_FAILED, CpbenchError
from cpbench.projection import calibrating
from cpbench.projection.calibrated import contention_of, nearest, profile_of
from cpbench.projection.calibrating import Asked, asked, calibrate
from cpbench.projection.calibration_sizes import BEFORE, BEHIND, SIZES, Sizes, attentions_of, gemms_of
from cpbench.projection.links import Inside, Links, Topology
from cpbench.projection.profile import load_profile
from cpbench.report.calibration import calibration_view

CPU = Machine("cpu", 0, 2, 8 << 30, "Example CPU")
CUDA = Machine("cuda", 1, 16, 64 << 30, "Example CPU", ("NVIDIA H200",), 139 << 30, "580.1")
RATE, PAIR_RATE, COPY, WIRE, FIRST, LATE = 4e10, 2e10, 1e10, 1e9, 1e-4, 0.01


def rows_of(ranks, device="cpu", name="cpu", compute=True):
    """What ranks of a machine with constant rates write."""
    rows = []
    if compute:
        rows.append({"what": "environment", "device": device, "torch": "2.13.0", "device_name": name, "threads": 1})
        rows.append({"what": "launch", "seconds": 1e-6})
        rows += [{"what": "moved", "bytes": size, "seconds": size / COPY + 1e-6} for size in (1 << 16, 1 << 20, 1 << 24)]
        for m, n, k in gemms_of((64, 256, 1024)):
            rows.append({"what": "gemm", "dtype": "float32", "m": m, "n": n, "k": k, "seconds": 2 * m * n * k / RATE + 1e-6})
        for dim in (32, 128):
            for q, k, causal in attentions_of((128, 512)):
                shape = {"q_rows": q, "k_rows": k, "causal": causal, "heads": 4, "kv_heads": 2, "dim": dim}
                pairs = q * (q + 1) // 2 if causal else q * k
                rows.append({"what": "attention", "dtype": "float32", **shape, "kernel": "cpu_flash", "seconds": 16 * dim * pairs / PAIR_RATE + 1e-6})
    if ranks > 1:
        for operation in Inside.model_fields:
            rows += [{"what": "collective", "operation": operation, "bytes": 4096 << at, "seconds": FIRST + (4096 << at) / WIRE} for at in range(12)]
        if compute:
            rows.append({"what": "contention", "work_s": 0.01, "transfer_s": 0.04, "work_during_s": 0.02, "both_s": 0.045})
            for operation in ("send_recv", "all_reduce"):
                behind = {"what": "behind", "operation": operation, "bytes": 4096}
                rows += [{**behind, "work_s": work_s, "seconds": FIRST + LATE * (work_s - BEFORE)} for work_s in BEHIND]
    return [{"ranks": ranks, **row} for row in rows]


def test_the_profile_gives_back_what_was_measured(tmp_path):
    profile = profile_of(rows_of(2), CPU, 2, 1, False)
    assert profile.gemm(300, 300, 300, "float32") == pytest.approx(2 * 300**3 / RATE + 1e-6, rel=1e-3)
    assert profile.attention(256, 700, 256 * 700, 8, 2, 64, 64, "float32") == pytest.approx(4 * 64 * 8 * 256 * 700 / PAIR_RATE, rel=1e-3)
    assert profile.moved(1 << 22) == pytest.approx((1 << 22) / COPY, rel=1e-3)
    links = Links(profile.links, Topology(2, profile.gpus_per_node))
    assert links.seconds("all_gather", [0, 1], 1e6) == pytest.approx(FIRST + 1e6 / WIRE, rel=1e-3)
    assert links.kappa([0, 1]) == pytest.approx(0.5)
    within = [BEHIND[0], BEFORE, 5e-3, BEHIND[-1]]
    assert [links.late(work_s) for work_s in within] == pytest.approx([LATE * (work_s - BEFORE) for work_s in within])
    assert (links.late(0.0), links.late(9.0)) == (links.late(BEHIND[0]), links.late(BEHIND[-1]))
    assert profile.memory_bytes == 4 << 30
    assert profile.name == "cpu"
    assert profile.title == "Example CPU, calibrated: 2 ranks busy, 1 thread each"
    file = tmp_path / "mine.json"
    file.write_text(profile.model_dump_json(by_alias=True, exclude_none=True), encoding="utf-8")
    assert load_profile(file) == profile
    assert any(row["what"] == "gemm" for row in profile.measured_with["rows"])


def test_what_was_not_measured_between_nodes_is_refused():
    profile = profile_of(rows_of(2), CPU, 2, 1, False)
    with pytest.raises(CpbenchError, match="nothing is known between nodes"):
        Links(profile.links, Topology(4, profile.gpus_per_node)).seconds("all_gather", range(4), 1e6)


def test_several_world_sizes_are_in_one_fit():
    profile = profile_of([*rows_of(2, compute=False), *rows_of(4)], CPU, 4, 1, False)
    assert sorted(profile.links.inside.all_gather.by_ranks) == [2, 4]
    assert sorted(profile.links.inside.send_recv.by_ranks) == [4]


def test_a_single_known_gpu_has_the_links_of_its_shipped_profile():
    profile = profile_of(rows_of(1, "cuda", "NVIDIA H200"), CUDA, 1, 16, False)
    assert profile.links.inside == load_profile("h200").links.inside
    assert "preset" in profile.links.title
    assert profile.name == "nvidia-h200"
    assert profile.reserved(2) == load_profile("h200").reserved(2)


def test_a_single_unknown_gpu_has_the_links_of_its_slot():
    profile = profile_of(rows_of(1, "cuda", "NVIDIA RTX 9999"), CUDA, 1, 16, False)
    assert profile.links.title.startswith("PCIe 4 x16 (preset")


@pytest.mark.parametrize(
    ("ranks", "there", "not_there"),
    [
        (2, "Beside a transfer work slows by 50%", "preset"),
        (2, "Behind 30.0 ms of work a collective takes 290 us more", "preset"),
        (1, "Links: gloo on this machine (preset", "all_gather"),
    ],
)
def test_the_table_has_what_was_measured_here_alone(ranks, there, not_there):
    console = Console(width=120, record=True, file=io.StringIO())
    for item in calibration_view(profile_of(rows_of(ranks), CPU, ranks, 1, False), console):
        console.print(item)
    text = console.export_text()
    assert there in text
    assert not_there not in text
    assert "40 GFLOP/s" in text


@pytest.mark.parametrize(("name", "found"), [("NVIDIA H200", "h200"), ("NVIDIA H20", "h20"), ("NVIDIA H800 SXM", "h800"), ("Tesla V100", None)])
def test_the_longest_name_that_fits_is_the_nearest(name, found):
    assert nearest(name, "cuda") == found


def test_contention_is_the_part_by_which_each_slows():
    assert contention_of({"work_s": 1.0, "transfer_s": 4.0, "work_during_s": 1.0, "both_s": 4.0}) == (0.0, 0.0)
    assert contention_of({"work_s": 1.0, "transfer_s": 4.0, "work_during_s": 2.0, "both_s": 5.0}) == pytest.approx((0.5, 0.5))
    assert contention_of({"work_s": 2.0, "transfer_s": 4.0, "work_during_s": 1.0, "both_s": 2.0}) == (0.0, 0.0)


@pytest.mark.parametrize(("ranks", "worlds"), [(1, [1]), (2, [2]), (3, [2, 3]), (8, [2, 4, 8])])
def test_worlds_are_powers_of_two_and_all(ranks, worlds):
    assert Asked("cpu", ranks, True).worlds == worlds


def test_what_is_asked_for_is_what_the_machine_has():
    assert asked(CPU, None, None, True) == Asked("cpu", 2, True)
    assert asked(CUDA, None, None, False) == Asked("cuda", 1, False)
    assert asked(CUDA, "cpu", None, False) == Asked("cpu", 16, False)
    for machine, device, ranks in ((CPU, "cuda", None), (CPU, "tpu", None), (CUDA, None, 2), (CPU, None, 0), (CPU, None, 65)):
        with pytest.raises(CpbenchError) as caught:
            asked(machine, device, ranks, False)
        assert caught.value.hint


class Scripted:
    """A launcher whose ranks have written these rows, or failed with this log."""

    def __init__(self, rows, code=0, log=""):
        self.rows, self.code, self.log, self.worlds, self.killed = rows, code, log, [], 0

    def start(self, job, world_size, threads, log_dir):
        data = json.loads(job.read_text())
        self.worlds.append((world_size, data["compute"], threads))
        Path(data["rows"]).write_text("".join(f"{json.dumps(row)}\n" for row in self.rows(world_size, data["compute"])))
        (log_dir / "0").mkdir(parents=True)
        (log_dir / "0" / "stderr.log").write_text(self.log)
        return self

    def poll(self):
        return self.code

    def kill(self):
        self.killed += 1


def test_the_largest_world_measures_compute(monkeypatch):
    launcher = Scripted(lambda world, compute: rows_of(world, compute=compute))
    said = []
    profile = calibrate(Machine("cpu", 0, 8, 8 << 30, "Example CPU"), Asked("cpu", 4, False), said.append, launcher)
    assert launcher.worlds == [(2, False, 2), (4, True, 2)]
    assert launcher.killed == 2
    assert profile.gpus_per_node == 4
    assert not said


def test_more_ranks_than_cores_are_warned_about():
    said = []
    calibrate(CPU, Asked("cpu", 4, False), said.append, Scripted(lambda world, compute: rows_of(world, compute=compute)))
    assert said == ["4 ranks on 2 cores: the profile will be of ranks that wait for cores."]


def test_ranks_that_fail_are_reported_with_their_last_line():
    with pytest.raises(CpbenchError, match="Calibration with 2 ranks failed: RuntimeError: no memory") as caught:
        calibrate(CPU, Asked("cpu", 2, False), print, Scripted(lambda world, compute: [], 1, "Traceback\nRuntimeError: no memory\n\n"))
    assert caught.value.exit_code == ALL_FAILED


def test_ranks_that_hang_are_ended(monkeypatch):
    monkeypatch.setattr(calibrating, "DEADLINE", 0.0)
    launcher = Scripted(lambda world, compute: [], None)
    with pytest.raises(CpbenchError, match="did not end"):
        calibrate(CPU, Asked("cpu", 2, False), print, launcher)
    assert launcher.killed == 1


@pytest.mark.parametrize(
    ("percent", "said"), [(3.0, None), (60.0, "Other programs take 60% of the cores; a profile is of what is left. Calibrate when they are done.")]
)
def test_a_busy_machine_is_warned_about(monkeypatch, percent, said):
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: percent)
    assert calibrating.others() == said


@pytest.mark.parametrize("sizes", SIZES.values())
def test_all_plans_have_enough_points_for_their_fits(sizes: Sizes):
    assert len(sizes.collective_bytes) >= 6
    assert len(sizes.attentions) * len(sizes.heads) >= 6
    assert any(causal for _, _, causal in sizes.attentions)
    assert not all(causal for _, _, causal in sizes.attentions)
