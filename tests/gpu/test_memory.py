"""On a CUDA device: memory over time from the allocator's trace, and a limit that the allocator enforces. Skipped without one."""

import pytest
import torch

from cpbench.cell import Cell
from cpbench.kernels import kernel_of
from cpbench.layout import Layout
from cpbench.measure.device import open_device
from cpbench.measure.memory import measure_peaks, memory_history
from cpbench.measure.out_of_memory import OutOfMemory
from cpbench.models.presets import PRESETS
from cpbench.program import Program, alone

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: memory histories of the allocator were not recorded")]
MB = 1 << 20


def test_the_allocators_history_has_its_peak_its_phases_and_what_is_held():
    device = open_device("cuda", 0)
    cell = Cell("prefill", PRESETS["qwen3-tiny"], 2, Layout(), "none", "contiguous", "auto", "bfloat16", "cuda", (4096,))
    with torch.inference_mode():
        program = Program(cell, alone(), kernel_of(cell), device.torch_device)
        program.prepare()
        program.run()
        device.reset_peaks()
        history = memory_history(program.run, device, program.tensors)
    assert history.source == "allocator"
    assert history.peak == pytest.approx(device.peaks()["peak_allocator_bytes"], rel=0.01)
    assert {"layer", "layer/attention", "layer/mlp"} <= history.peak_by_phase().keys()
    assert "weights" in [owner.name for owner in history.owners]


def test_the_allocator_enforces_a_limit_and_owners_are_named():
    free = torch.cuda.get_device_properties(0).total_memory
    device = open_device("cuda", 0, 512 * MB)
    kept = [torch.ones(64 * MB, dtype=torch.uint8, device="cuda")]
    try:
        with pytest.raises(OutOfMemory, match="tried to allocate") as raised:
            measure_peaks(lambda: kept.append(torch.empty(1024 * MB, dtype=torch.uint8, device="cuda")), device, lambda: [("weights", kept[0])])
        assert raised.value.owners[0].name == "weights"
    finally:
        open_device("cuda", 0, free)
