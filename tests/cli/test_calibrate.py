"""`cpbench calibrate`: a profile from two real ranks in seconds, and what it refuses before it measures anything."""

import pytest

from cpbench.environment import detect_machine
from cpbench.errors import USAGE
from cpbench.projection.links import Links, Topology
from cpbench.projection.profile import load_profile


def test_two_ranks_make_a_profile_that_prices_compute_and_links(cpbench_command, tmp_path, machine):
    machine(detect_machine())
    ran = cpbench_command("calibrate", "--quick", "--device", "cpu", "--max-ranks", "2", "-o", "mine.json")
    assert ran.code == 0, ran.err
    profile = load_profile(tmp_path / "mine.json")
    assert profile.device == "cpu"
    assert 1e8 < profile.peak_flops("float32") < 1e14
    assert 1e-8 < profile.launch_s < 1e-2
    assert profile.gemm(256, 256, 256, "float32") < 1
    links = Links(profile.links, Topology(2, 2))
    for operation in ("all_gather", "reduce_scatter", "all_to_all", "all_reduce", "send_recv"):
        assert 1e-6 < links.seconds(operation, [0, 1], 1 << 20) < 10
        assert operation in ran.out
    assert "contention measured" in ran.err
    assert "mean error" in ran.out
    assert "Profile: mine.json" in ran.out


@pytest.mark.parametrize(
    ("flags", "message", "hint"),
    [
        (["--device", "cuda"], "The device 'cuda' is not on this machine.", "Valid here: cpu."),
        (["--max-ranks", "0"], "--max-ranks 0 is outside of 1 to 64.", "This machine has 2 cores."),
        (["-o", "none/x.json"], "none/x.json cannot be written: its folder is not there.", "Choose another file with -o"),
    ],
)
def test_mistakes_are_found_before_anything_is_measured(cpbench_command, flags, message, hint):
    ran = cpbench_command("calibrate", *flags)
    assert ran.code == USAGE
    assert message in ran.err
    assert hint in ran.err
    assert not ran.out


def test_a_profile_is_not_overwritten(cpbench_command, tmp_path):
    (tmp_path / "calibration.json").write_text("{}")
    ran = cpbench_command("calibrate")
    assert ran.code == USAGE
    assert "calibration.json exists" in ran.err
