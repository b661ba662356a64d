"""On a CUDA device: kernels against fp64, and one rank's program with event timing and allocator peaks. Skipped without one."""

import pytest
import torch

from cpbench.buffers import Buffers
from cpbench.cell import Cell
from cpbench.kernels import KERNELS, load_kernel, pick_kernel
from cpbench.kernels.accumulate import Accumulator
from cpbench.layout import Layout
from cpbench.measure.device import open_device
from cpbench.measure.memory import measure_peaks
from cpbench.models.presets import PRESETS
from cpbench.numerics import check
from cpbench.program import Models, Program, alone
from cpbench.segments import Segment, Span

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: the kernels of tests/gpu were not run")]
DTYPES = ["bfloat16", "float16"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "cpu_flash"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(8, 8, 64), (32, 8, 128), (4, 2, 256)])
def test_kernels_merge_prefix_and_diagonal_to_the_truth(name, heads, kv_heads, dim, dtype):
    kernel = load_kernel(name)
    reason = kernel.available("cuda", dtype, dim, dim)
    if reason:
        pytest.skip(reason)
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((512, heads), (2048, kv_heads), (2048, kv_heads))
    q, k, v = (torch.randn(rows, h, dim, generator=generator, device="cuda", dtype=getattr(torch, dtype)) for rows, h in shapes)
    segments = [Segment(Span(0, 512), (Span(0, 1536),), Span(1536, 2048))]
    errors = []
    for runner, cast in ((kernel, lambda x: x), (load_kernel("reference"), torch.Tensor.double)):
        result = Accumulator(512, Buffers())
        runner.attend(cast(q), cast(k), cast(v), segments, dim**-0.5, result)
        errors.append(result.result().double())
    assert float((errors[0] - errors[1]).norm() / errors[1].norm()) < 6e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_rank_runs_the_layers_of_qwen3_8b_and_passes_its_check(dtype):
    device = open_device("cuda", 0)
    kernel = pick_kernel("cuda", dtype, 128, 128)
    cell = Cell("prefill", PRESETS["qwen3-8b"], 2, Layout(), "none", "contiguous", "auto", dtype, "cuda", (4096,))
    with torch.inference_mode():
        verdict = check(cell, alone(), kernel, device.torch_device, Models())
        assert verdict.passed, verdict.reason
        program = Program(cell, alone(), kernel, device.torch_device)
        peaks = measure_peaks(program.run, device, program.tensors)
        assert 0 < peaks["peak_live_bytes"] <= peaks["peak_allocator_bytes"] <= peaks["peak_reserved_bytes"]
        assert 1e-4 < device.time(program.run) < 10
