"""On a CUDA device: kernels against fp64, and one rank's program with event timing and allocator peaks. Skipped without one."""

import sys
from inspect import signature

import pytest
import torch

from cpbench.buffers import Buffers
from cpbench.cell import Cell
from cpbench.kernels import KERNELS, load_kernel, pick_kernel
from cpbench.kernels.accumulate import Accumulator
from cpbench.layout import Layout
from cpbench.measure.device import open_device
from cpbench.measure.memory import measure_peaks
from cpbench.measure.peaks import data_sheet
from cpbench.models.held import Models
from cpbench.models.presets import PRESETS
from cpbench.numerics import check
from cpbench.program import Program, alone
from cpbench.segments import Request, Segment, Span
from tests.unit.flash_stand_in import FA2, FA3, FA4, StandIn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="NO CUDA DEVICE: the kernels of tests/gpu were not run")]
DTYPES = ["bfloat16", "float16"]
ON_CUDA = [name for name in KERNELS if name != "cpu_flash"]
SHAPES = [(8, 8, 64, 64), (32, 8, 128, 128), (4, 2, 256, 256), (8, 8, 192, 128)]  # query and kv heads, head sizes of q/k and of v


def usable(name, dtype, dim_qk, dim_v):
    kernel = load_kernel(name)
    reason = kernel.available("cuda", dtype, dim_qk, dim_v)
    if reason:
        pytest.skip(f"KERNEL {name} WAS NOT RUN for head sizes {dim_qk} and {dim_v}: {reason}")
    return kernel


def random(*shape, dtype, seed):
    return torch.randn(shape, generator=torch.Generator("cuda").manual_seed(seed), device="cuda", dtype=getattr(torch, dtype))


def merged(kernel, q, k, v, segments, scale):
    result = Accumulator(q.shape[0], Buffers())
    kernel.attend(q, k, v, segments, scale, result)
    return result.result(), result.running()[1]


def require_close(got, expected):
    (out, lse), (true_out, true_lse) = got, expected
    assert (out.shape, lse.shape, lse.dtype) == (true_out.shape, true_lse.shape, torch.float32)
    assert float((out.double() - true_out).norm() / true_out.norm()) < 6e-3
    torch.testing.assert_close(lse.double(), true_lse, atol=5e-3, rtol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ON_CUDA)
@pytest.mark.parametrize(("heads", "kv_heads", "dim_qk", "dim_v"), SHAPES)
def test_kernels_merge_prefix_and_diagonal_to_the_truth(name, heads, kv_heads, dim_qk, dim_v, dtype):
    """Two sequences, one behind a prefix, the other with an early and a late block: two causal sequences in one launch, and two more."""
    kernel = usable(name, dtype, dim_qk, dim_v)
    q, k, v = (random(*shape, dtype=dtype, seed=seed) for seed, shape in enumerate(((771, heads, dim_qk), (2048, kv_heads, dim_qk), (2048, kv_heads, dim_v))))
    segments = [
        Segment(Span(0, 512), (Span(0, 700),), Span(700, 1212)),
        Segment(Span(512, 640), (), Span(1212, 1340)),
        Segment(Span(640, 771), (Span(1212, 1340), Span(1500, 2048)), Span(1340, 1471)),
    ]
    expected = merged(load_kernel("reference"), q.double(), k.double(), v.double(), segments, dim_qk**-0.5)
    require_close(merged(kernel, q, k, v, segments, dim_qk**-0.5), expected)


@pytest.mark.parametrize("page_size", [16, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ON_CUDA)
@pytest.mark.parametrize(("heads", "kv_heads", "dim_qk", "dim_v"), SHAPES)
def test_kernels_read_overlapping_prefixes_from_pages(name, heads, kv_heads, dim_qk, dim_v, dtype, page_size):
    """Four requests on two sequences, single rows and whole prompts among them, from pages that are views of wider rows."""
    kernel = usable(name, dtype, dim_qk, dim_v)
    per_sequence = 1536 // page_size
    rows = random(2 * per_sequence + 3, page_size, kv_heads * (dim_qk + dim_v), dtype=dtype, seed=7)
    k = rows[..., : kv_heads * dim_qk].unflatten(2, (kv_heads, dim_qk))
    v = rows[..., kv_heads * dim_qk :].unflatten(2, (kv_heads, dim_v))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(7))[: 2 * per_sequence]
    tables = order.view(2, per_sequence).to("cuda", torch.int32)
    requests = [Request(Span(0, 300), 1, 700), Request(Span(300, 301), 0, 513), Request(Span(301, 433), 0, 132), Request(Span(433, 800), 1, 1499)]
    q = random(800, heads, dim_qk, dtype=dtype, seed=8)
    exact = (x.double() for x in (q, k, v))
    expected = load_kernel("reference").attend_pages(*exact, tables, requests, dim_qk**-0.5)
    require_close(kernel.attend_pages(q, k, v, tables, requests, dim_qk**-0.5), expected)


@pytest.mark.parametrize(
    ("name", "module", "function"),
    [
        ("flash2", FA2, "flash_attn_varlen_func"),
        ("flash3", FA3, "flash_attn_varlen_func"),
        ("flash3", FA3, "flash_attn_with_kvcache"),
        ("flash4", FA4, "flash_attn_varlen_func"),
    ],
)
def test_stand_ins_have_the_parameters_of_the_installed_libraries(name, module, function, monkeypatch):
    usable(name, "bfloat16", 128, 128)
    real = signature(getattr(sys.modules[module], function)).parameters
    stand_in = StandIn(monkeypatch)
    stand_in.library._destroy()
    own = list(signature(getattr(stand_in.modules[module], function)).parameters)
    assert [parameter for parameter in real if parameter in own] == own


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


def test_marks_are_moments_of_the_stream():
    """A product of a few milliseconds lies between two marks, although the thread that launched it did not wait."""
    device = open_device("cuda", 0)
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    marks = []

    def run():
        marks.clear()
        marks.append(device.mark())
        for _ in range(10):
            a @ a
        marks.append(device.mark())

    device.time(run)
    seconds = device.time(run)
    assert 0.5 * seconds < device.between(*marks) <= 1.05 * seconds


def test_the_peak_of_a_known_gpu_is_above_what_a_product_reaches():
    device = open_device("cuda", 0)
    peak = data_sheet(device.name, "bfloat16", "none")
    if peak is None:
        pytest.skip(f"NO DATA SHEET FOR {device.name}: its peak is not known")
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    device.time(lambda: a @ a)
    achieved = 2 * 8192**3 / min(device.time(lambda: a @ a) for _ in range(10))
    assert 0.3 * peak.flops < achieved <= peak.flops
