"""On a CUDA device: a calibration of one rank. Its rates are below the data sheet's, and its links are those that are shipped. Skipped without one."""

import pytest
import torch

from cpbench.measure.peaks import data_sheet
from cpbench.projection.profile import load_profile
from tests.cli.test_sweep_end_to_end import cpbench

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: the calibration of tests/gpu was not made")]


def test_one_gpu_is_calibrated(tmp_path):
    done = cpbench("calibrate", "--quick", "--max-ranks", "1", "-o", "gpu.json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    profile = load_profile(tmp_path / "gpu.json")
    assert profile.device == "cuda"
    assert "preset" in profile.links.title
    sheet = data_sheet(torch.cuda.get_device_name(), "bfloat16", "none")
    assert sheet is None or 0.2 * sheet.flops < profile.peak_flops("bfloat16") <= sheet.flops
    assert profile.attention(4096, 4096, 4096 * 4097 // 2, 32, 8, 128, 128, "bfloat16") < 0.1
