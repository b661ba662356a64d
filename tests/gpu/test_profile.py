"""On a CUDA device: a real profile of one rank, whose kernels are found in the phases that launched them. Skipped without one."""

import pytest
import torch

from cpbench.reading import read
from tests.cli.test_sweep_end_to_end import cpbench

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: the profile of tests/gpu was not made")]
PROFILE = ["profile", "--set", "device=cuda", "--model", "qwen3-tiny", "--seq", "8k", "--dtype", "bfloat16", "--layers", "2"]


def test_kernels_add_up_to_the_step_in_the_phases_that_launched_them(tmp_path):
    done = cpbench(*PROFILE, "-o", "p.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    (cell,) = read(tmp_path / "p.json").cells
    assert not [warning for warning in cell.warnings if "profile" in warning]
    (rank,) = cell.profile.ranks
    phases = {phase.phase: phase for phase in cell.profile.phases}
    assert sum(phase.time_s for phase in phases.values()) == pytest.approx(rank.step_s, rel=0.03)
    for path in ("layer/attention/project", "layer/attention/kernel", "layer/mlp", "head"):
        assert phases[path].compute_s > 0
    assert rank.exposed_comm_s == 0
    assert all(kernel.seconds > 0 and not kernel.name.startswith("aten::") for kernel in cell.profile.kernels)
