"""Kernels that cannot run here, against stand-ins with the libraries' own signatures: shapes, argument order, LSE layout, launches, reasons."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cpbench.buffers import Buffers
from cpbench.kernels import KERNELS, load_kernel, pick_kernel
from cpbench.kernels.accumulate import Accumulator
from cpbench.kernels.launches import launches
from cpbench.kernels.requirements import package_refusal
from cpbench.segments import Request, Segment, Span
from tests.unit.flash_stand_in import FA2, FA3, FA4, StandIn

ADAPTERS = ["flash2", "flash3", "flash4", "sdpa", "cudnn"]
FAMILY = ["flash2", "flash3", "flash4", "sdpa"]
DIMS = [(64, 64), (128, 128), (256, 256), (192, 128)]
MODULES = {"flash2": FA2, "flash3": FA3, "flash4": FA4}
# Two sequences of 5 and 4 tokens behind 3 and 0 cached ones; the second has an early and a late block, as a zigzag rank has.
PLAN = (
    Segment(Span(0, 5), (Span(0, 3),), Span(3, 8)),
    Segment(Span(5, 7), (), Span(8, 10)),
    Segment(Span(7, 9), (Span(8, 10), Span(12, 15)), Span(10, 12)),
)
ROWS, KEYS = 9, 15


@pytest.fixture
def stand_in(monkeypatch):
    installed = StandIn(monkeypatch)
    yield installed
    installed.library._destroy()


def tensors(rows, keys, dim_qk, dim_v, dtype, heads=4, kv_heads=2):
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, heads, dim_qk), (keys, kv_heads, dim_qk), (keys, kv_heads, dim_v))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def run(kernel, q, k, v, segments, rows=ROWS):
    result = Accumulator(rows, Buffers())
    kernel.attend(q, k, v, segments, 0.11, result)
    return result.result(), result.running()[1]


def require_close(got, expected, dtype):
    """Output and log-sum-exp of a kernel against those of the reference in fp64."""
    out, lse = got
    true_out, true_lse = expected
    assert (out.shape, lse.shape, out.dtype, lse.dtype) == (true_out.shape, true_lse.shape, dtype, torch.float32)
    assert float((out.double() - true_out).norm() / true_out.norm()) < (1e-6 if dtype == torch.float32 else 8e-3)
    torch.testing.assert_close(lse.double(), true_lse, atol=1e-5 if dtype == torch.float32 else 2e-3, rtol=1e-5)


def require_plan(kernel, dims, dtype):
    q, k, v = tensors(ROWS, KEYS, *dims, dtype)
    expected = run(load_kernel("reference"), q.double(), k.double(), v.double(), PLAN)
    require_close(run(kernel, q, k, v, PLAN), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_plan_of_segments_is_computed_exactly(stand_in, name, dims, dtype):
    require_plan(load_kernel(name), dims, dtype)


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize(("rows", "keys", "causal"), [(6, 6, True), (3, 8, False), (1, 5, False), (1, 1, True)])
def test_one_block_has_the_layout_of_a_kernel(stand_in, name, rows, keys, causal):
    q, k, v = tensors(rows, keys, 192, 128, torch.float32)
    expected = load_kernel("reference").block(q.double(), k.double(), v.double(), 0.11, causal)
    require_close(load_kernel(name).block(q, k, v, 0.11, causal), expected, torch.float32)


@pytest.mark.parametrize("name", FAMILY)
def test_a_plan_takes_one_launch_per_chain_of_rows(stand_in, name):
    """Squares with the prefix in front of them are one causal launch; what is left is one full launch."""
    require_plan(load_kernel(name), (64, 64), torch.float32)
    assert [count for _, count in stand_in.calls] == [2, 1, 1]
    assert len(stand_in.calls) == len(launches(PLAN))


def paged(dims, dtype, page_size, sequences=2, per_sequence=2):
    """Pages in shuffled order that are views of wider rows k | v, and the tables that find them."""
    generator = torch.Generator().manual_seed(1)
    pool = torch.randn(sequences * per_sequence + 1, page_size, 2 * sum(dims), generator=generator).to(dtype)
    k = pool[..., : 2 * dims[0]].unflatten(2, (2, dims[0]))
    v = pool[..., 2 * dims[0] :].unflatten(2, (2, dims[1]))
    tables = torch.randperm(len(pool), generator=generator)[: sequences * per_sequence].view(sequences, per_sequence).to(torch.int32)
    return k, v, tables


def require_pages(kernel, dims, dtype, page_size=256):
    """Three requests, two of them on the same pages up to different lengths, against dense attention to the rows of the pages."""
    k, v, tables = paged(dims, dtype, page_size)
    requests = [Request(Span(0, 3), 1, page_size - 7), Request(Span(3, 8), 0, 5), Request(Span(8, 12), 1, page_size + 9)]
    q = tensors(12, 1, *dims, dtype)[0]
    outs, lses = [], []
    for request in requests:
        dense = [x[tables[request.sequence].long()].flatten(0, 1)[: request.keys].double() for x in (k, v)]
        own = q[request.queries.start : request.queries.stop].double()
        rows, prefix = request.queries.rows, request.keys - request.queries.rows
        segment = Segment(Span(0, rows), (Span(0, prefix),) if prefix else (), Span(prefix, request.keys))
        out, lse = run(load_kernel("reference"), own, *dense, [segment], rows)
        outs.append(out)
        lses.append(lse)
    require_close(kernel.attend_pages(q, k, v, tables, requests, 0.11), (torch.cat(outs), torch.cat(lses, 1)), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("name", ADAPTERS)
def test_requests_with_overlapping_prefixes_read_pages(stand_in, name, dims, dtype):
    kernel = load_kernel(name)
    require_pages(kernel, dims, dtype)
    if kernel.reads_pages(256, *dims):
        assert [count for _, count in stand_in.calls] == [3], "all requests are one launch"


def test_which_pages_are_read_where_they_lie(stand_in):
    sizes = {name: [size for size in (16, 48, 128, 256, 512) if load_kernel(name).reads_pages(size, 128, 128)] for name in ADAPTERS}
    every = [16, 48, 128, 256, 512]
    assert sizes == {"flash2": [256, 512], "flash3": every, "flash4": every, "sdpa": [256, 512], "cudnn": []}
    assert not load_kernel("flash2").reads_pages(256, 192, 128), "v would have to be padded in every page"
    for name in ADAPTERS:
        require_pages(load_kernel(name), (64, 64), torch.float32, page_size=48)


def swapped(first, second):
    def mutate(arguments):
        arguments[first], arguments[second] = arguments[second], arguments[first]

    return mutate


def without(name):
    return lambda arguments: arguments.pop(name)


MUTANTS = {
    "keys and values": swapped("k", "v"),
    "lengths of queries and keys": swapped("cu_seqlens_q", "cu_seqlens_k"),
    "longest query and key": swapped("max_seqlen_q", "max_seqlen_k"),
    "no scale": without("softmax_scale"),
    "no mask": without("causal"),
}


@pytest.mark.parametrize("mutant", [*MUTANTS, "transposed lse", "lse in another base"])
@pytest.mark.parametrize("name", MODULES)
def test_a_wrong_call_or_layout_does_not_pass(stand_in, name, mutant, monkeypatch):
    """The checks of this file fail for an adapter that mixes arguments up, and for a library that lays its LSE out otherwise."""
    module = stand_in.modules[MODULES[name]]
    right = module.flash_attn_varlen_func

    def wrong(q, k, v, **rest):
        arguments = {"q": q, "k": k, "v": v, **rest}
        if mutant in MUTANTS:
            MUTANTS[mutant](arguments)
            return right(**arguments)
        out, lse, *more = right(**arguments)
        return out, lse.t().contiguous() if mutant == "transposed lse" else lse / 2.0, *more

    require_plan(load_kernel(name), (64, 64), torch.float32)
    monkeypatch.setattr(module, "flash_attn_varlen_func", wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        require_plan(load_kernel(name), (64, 64), torch.float32)


def test_a_transposed_lse_of_as_many_heads_as_rows_does_not_pass_either(stand_in, monkeypatch):
    module, rows = stand_in.modules[FA3], 4
    right = module.flash_attn_varlen_func
    q, k, v = tensors(rows, rows, 64, 64, torch.float32)
    expected = load_kernel("reference").block(q.double(), k.double(), v.double(), 0.11, True)
    require_close(load_kernel("flash3").block(q, k, v, 0.11, True), expected, torch.float32)

    def transposed(*args, **kwargs):
        out, lse = right(*args, **kwargs)
        return out, lse.t()

    monkeypatch.setattr(module, "flash_attn_varlen_func", transposed)
    with pytest.raises(AssertionError):
        require_close(load_kernel("flash3").block(q, k, v, 0.11, True), expected, torch.float32)


@pytest.fixture
def hopper(monkeypatch):
    """A machine that says it has an H100 and cuDNN 9.10."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)


@pytest.mark.parametrize("name", ADAPTERS)
def test_reasons_name_what_is_missing(name, hopper, monkeypatch):
    kernel = load_kernel(name)
    assert kernel.available("cpu", "bfloat16", 128, 128) == "runs on cuda, not on cpu"
    assert "float32" in kernel.available("cuda", "float32", 128, 128)
    assert "264" in kernel.available("cuda", "bfloat16", 264, 264)
    assert "130" in kernel.available("cuda", "bfloat16", 130, 130)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
    assert "compute capability 7.5" in kernel.available("cuda", "bfloat16", 128, 128)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in kernel.available("cuda", "bfloat16", 128, 128)


@pytest.mark.parametrize(("name", "hint"), [("flash2", "cpbench[flash]"), ("flash3", "hopper"), ("flash4", "cpbench[flash4]")])
def test_a_missing_package_is_a_reason_with_the_way_to_install_it(name, hint, hopper, monkeypatch):
    for module in ("flash_attn", *MODULES.values()):
        monkeypatch.setitem(sys.modules, module, None)  # import fails as if it were not installed
    reason = load_kernel(name).available("cuda", "bfloat16", 128, 128)
    assert hint in reason
    assert "not installed" in reason


@pytest.mark.parametrize("name", MODULES)
def test_a_broken_or_old_package_is_a_reason_too(name, hopper, stand_in, monkeypatch):
    assert load_kernel(name).available("cuda", "bfloat16", 128, 128) is None
    old = ModuleType(MODULES[name])
    old.flash_attn_varlen_func = lambda q, k, v: None
    monkeypatch.setitem(sys.modules, MODULES[name], old)
    assert "version" in load_kernel(name).available("cuda", "bfloat16", 128, 128)


def test_an_import_that_fails_is_reported(tmp_path, monkeypatch):
    (tmp_path / "cpbench_broken_one.py").write_text("raise OSError('libcudart.so.11: cannot open\\nmore')")
    (tmp_path / "cpbench_broken_two.py").write_text("import cpbench_not_there")
    monkeypatch.syspath_prepend(tmp_path)
    assert "broken (libcudart.so.11: cannot open)" in package_refusal("cpbench_broken_one", {}, "build it")
    assert "broken (No module named 'cpbench_not_there')" in package_refusal("cpbench_broken_two", {}, "build it")
    assert "is not installed" in package_refusal("cpbench_not_there.sub", {}, "build it")


def test_auto_takes_the_kernel_of_the_generation(hopper, stand_in, monkeypatch):
    assert pick_kernel("cuda", "bfloat16", 128, 128).name == "flash3"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (10, 0))
    assert pick_kernel("cuda", "bfloat16", 128, 128).name == "flash4"
    assert pick_kernel("cuda", "bfloat16", 192, 192).name == "flash2", "flash4 takes no 192 with 192 on Blackwell"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert pick_kernel("cuda", "bfloat16", 128, 128).name == "flash2"
    assert pick_kernel("cuda", "float32", 128, 128).name == "reference"
    assert list(KERNELS) == ["flash3", "flash4", "flash2", "sdpa", "cudnn", "cpu_flash", "reference", "fixed_blocks"]


def test_the_dispatched_kernel_says_what_really_runs(hopper, stand_in, monkeypatch):
    names = {name: [load_kernel(name).dispatched("bfloat16", *dims) for dims in ((128, 128), (192, 128))] for name in ADAPTERS}
    assert names == {
        "flash2": ["flash2", "flash2 (v padded from 128 to 192)"],
        "flash3": ["flash3", "flash3"],
        "flash4": ["flash4", "flash4"],
        "sdpa": ["sdpa (flash)", "sdpa (cudnn)"],
        "cudnn": ["cudnn", "cudnn"],
    }
    require_plan(load_kernel("sdpa"), (192, 128), torch.bfloat16)
    assert {function for function, _ in stand_in.calls} == {"_scaled_dot_product_cudnn_attention"}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    assert load_kernel("sdpa").dispatched("bfloat16", 192, 128) == "sdpa (flash, v padded from 128 to 192)"


@pytest.mark.parametrize(
    ("capability", "version", "dims", "fits"),
    [
        ((9, 0), 91002, (192, 128), True),
        ((9, 0), 90800, (192, 128), False),
        ((8, 0), 91200, (256, 256), False),
        ((10, 0), 91100, (192, 128), True),
        ((10, 0), 91100, (256, 256), False),
        ((10, 0), 91002, (192, 128), False),
        ((8, 0), 90100, (128, 64), True),
        ((9, 0), 8907, (64, 64), False),
    ],
)
def test_head_sizes_of_cudnn_depend_on_its_version_and_the_device(hopper, monkeypatch, capability, version, dims, fits):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    assert (load_kernel("cudnn").available("cuda", "bfloat16", *dims) is None) == fits


def spans(limit):
    return st.tuples(st.integers(0, limit), st.integers(1, 6)).map(lambda pair: Span(pair[0], pair[0] + pair[1]))


@st.composite
def plans(draw):
    """Segments of disjoint query rows in any order, each with disjoint full ranges and perhaps a causal square."""
    at, segments = 0, []
    for _ in range(draw(st.integers(1, 6))):
        at += draw(st.integers(0, 2))
        rows = draw(st.integers(1, 4))
        start = draw(st.integers(0, 12))
        causal = Span(start, start + rows) if draw(st.booleans()) else None
        full = [] if causal is None or not start or draw(st.booleans()) else [Span(draw(st.integers(0, start - 1)), start)]
        full.append(Span(20, 20 + draw(st.integers(1, 5))))
        segments.append(Segment(Span(at, at + rows), tuple(full), causal))
        at += rows
    return tuple(draw(st.permutations(segments)))


def pairs_of(queries, keys, causal):
    late = keys.rows - queries.rows
    return [(q, k) for q in range(*queries) for k in range(*keys) if not causal or k - keys.start <= q - queries.start + late]


@given(plans())
def test_launches_compute_every_pair_of_a_plan_once(segments):
    wanted = []
    for segment in segments:
        for span in segment.full:
            wanted += pairs_of(segment.queries, span, False)
        if segment.causal:
            wanted += pairs_of(segment.queries, segment.causal, True)
    got, sequences = [], 0
    for launch in launches(segments):
        assert (launch.cu_q[0], launch.cu_k[0]) == (0, 0)
        assert (launch.cu_q[-1], launch.cu_k[-1]) == (launch.queries.rows, launch.keys.rows)
        sequences += len(launch.cu_q) - 1
        for q0, q1, k0, k1 in zip(launch.cu_q, launch.cu_q[1:], launch.cu_k, launch.cu_k[1:], strict=False):
            q, k = Span(launch.queries.start + q0, launch.queries.start + q1), Span(launch.keys.start + k0, launch.keys.start + k1)
            assert q.rows > 0 and k.rows > 0
            got += pairs_of(q, k, launch.causal)
    assert sorted(got) == sorted(wanted)
    assert sequences <= sum(len(segment.full) + bool(segment.causal) for segment in segments)


def test_sequences_that_continue_each_other_share_a_launch():
    """The picture of launches.py: early and late blocks of three sequences are one causal and one full launch."""
    early = [Segment(Span(4 * i, 4 * i + 4), (), Span(4 * i, 4 * i + 4)) for i in range(3)]
    late = [replace(s, queries=Span(s.queries.start + 12, s.queries.stop + 12)) for s in early]
    late = [replace(s, full=(s.causal,), causal=Span(s.causal.start + 12, s.causal.stop + 12)) for s in late]
    assert [(launch.causal, len(launch.cu_q) - 1) for launch in launches((*early, *late))] == [(True, 6), (False, 3)]
