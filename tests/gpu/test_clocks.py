"""On a CUDA device: NVML knows the GPU of a rank by the name that torch gives it, and its clock runs while it works. Skipped without one."""

import time

import pytest
import torch

from cpbench.clocks import Watcher
from cpbench.measure.device import open_device

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: NVML was not read")]


def test_the_clock_of_the_gpu_that_works():
    watcher = Watcher(usable_cores=1)
    watcher.group(open_device("cuda", 0).uuids(1))
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    watcher.begin()
    until = time.monotonic() + 2.0
    while time.monotonic() < until:
        x = (x @ x).clamp(-1, 1)
        torch.cuda.synchronize()
    found = watcher.end()
    assert found is not None and [gpu.rank for gpu in found.gpus] == [0]
    (gpu,) = found.gpus
    assert gpu.samples > 2 and gpu.sm_mhz is not None and 200 < gpu.sm_mhz.median < 5000
    assert gpu.temperature_c is None or 0 < gpu.temperature_c.median < 120
    assert found.cpu is not None and found.cpu.own_cores > 0.3
