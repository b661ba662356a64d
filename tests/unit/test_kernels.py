"""Every registered kernel that can run here, against PyTorch's own attention in fp64 and against the merge rules."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpbench.buffers import Buffers
from cpbench.errors import CpbenchError
from cpbench.kernels import KERNELS, load_kernel, pick_kernel
from cpbench.kernels.accumulate import Accumulator
from cpbench.segments import MIN_ROWS_TO_COPY, Request, Segment, Span

HERE = [name for name in KERNELS if load_kernel(name).available("cpu", "float32", 64, 64) is None]


def tensors(rows, keys, heads, kv_heads, dim, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, h, dim, generator=generator).to(dtype) for n, h in ((rows, heads), (keys, kv_heads), (keys, kv_heads))]


def truth(q, k, v, mask):
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    score = (q.double().transpose(0, 1) @ k.transpose(1, 2)) * q.shape[2] ** -0.5
    score = score.masked_fill(~mask, float("-inf"))
    return (score.softmax(-1) @ v).transpose(0, 1), score.logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize(("rows", "keys", "heads", "kv_heads", "dim", "causal"), [(33, 33, 4, 2, 32, True), (7, 50, 4, 1, 64, False), (1, 1, 2, 2, 16, True)])
def test_block_is_exact_softmax_attention_with_its_lse(name, rows, keys, heads, kv_heads, dim, causal, dtype):
    q, k, v = tensors(rows, keys, heads, kv_heads, dim, dtype)
    mask = torch.ones(rows, keys, dtype=torch.bool).tril() if causal else torch.ones(rows, keys, dtype=torch.bool)
    out, lse = load_kernel(name).block(q, k, v, dim**-0.5, causal)
    expected, expected_lse = truth(q, k, v, mask)
    assert out.shape == (rows, heads, dim)
    assert lse.shape == (heads, rows)
    assert lse.dtype == torch.float32
    error = (out.double() - expected).norm() / expected.norm()
    assert error < (2e-6 if dtype == torch.float32 else 6e-3)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-5 if dtype == torch.float32 else 2e-3, rtol=1e-5)


@pytest.mark.parametrize("name", HERE)
def test_inputs_may_be_strided_views(name):
    rows = torch.randn(40, 2 * 2 * 16)
    k, v = (x.unflatten(1, (2, 16)) for x in rows.chunk(2, 1))
    q = torch.randn(40, 4 * 16 * 2)[:, : 4 * 16].unflatten(1, (4, 16))
    strided = load_kernel(name).block(q, k, v, 0.25, True)
    packed = load_kernel(name).block(q.contiguous(), k.contiguous(), v.contiguous(), 0.25, True)
    torch.testing.assert_close(strided, packed)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pieces_merge_to_the_whole(name, dtype):
    """Bottom-right causal attention as prefix plus diagonal, queries covered in several spans, equals one dense masked softmax."""
    q, k, v = tensors(48, 80, 4, 2, 32, dtype)
    segments = [Segment(Span(0, 16), (Span(0, 20), Span(20, 32)), Span(32, 48)), Segment(Span(16, 48), (Span(0, 48),), Span(48, 80))]
    result = Accumulator(48, Buffers())
    load_kernel(name).attend(q, k, v, segments, 32**-0.5, result)
    mask = torch.arange(80) <= torch.arange(48)[:, None] + 32
    expected, _ = truth(q, k, v, mask)
    error = (result.result().double() - expected).norm() / expected.norm()
    assert error < (2e-6 if dtype == torch.float32 else 6e-3)
    assert result.result().dtype == dtype


def test_a_single_result_is_passed_through_untouched():
    result, out, lse = Accumulator(4, Buffers()), torch.randn(4, 2, 8, dtype=torch.bfloat16), torch.randn(2, 4)
    result.add(Span(0, 4), out, lse)
    assert result.result() is out


def test_rows_that_nobody_covered_are_an_error():
    result = Accumulator(4, Buffers())
    result.add(Span(0, 2), torch.randn(2, 2, 8), torch.randn(2, 2))
    with pytest.raises(ValueError, match="not all covered"):
        result.result()


@pytest.mark.parametrize("shift", [-1e4, 0.0, 1e4])
def test_merging_does_not_overflow(shift):
    a, b, lse = torch.ones(4, 2, 8), torch.zeros(4, 2, 8), torch.zeros(2, 4)
    result = Accumulator(4, Buffers())
    result.add(Span(0, 4), a, lse.clone())
    result.add(Span(0, 4), b, lse + shift)
    merged = result.result()
    assert torch.isfinite(merged).all()
    assert merged[0, 0, 0].item() == pytest.approx({-1e4: 1.0, 0.0: 0.5, 1e4: 0.0}[shift])


def test_merging_in_bf16_rounds_pieces_and_the_result_but_not_the_sum():
    """Full attention in 8 equal pieces, the worst case: sqrt(2) times one rounding with an fp32 sum, far more with a bf16 one."""
    q, k, v = tensors(256, 2048, 2, 2, 64, torch.bfloat16)
    kernel, result, narrow, narrow_lse = load_kernel("reference"), Accumulator(256, Buffers()), None, None
    for start in range(0, 2048, 256):
        out, lse = kernel.block(q, k[start : start + 256], v[start : start + 256], 0.125, False)
        result.add(Span(0, 256), out, lse)
        if narrow is None:
            narrow, narrow_lse = out, lse
        else:
            weight = torch.sigmoid(lse - narrow_lse).t().unsqueeze(-1)
            narrow = (narrow + weight * (out - narrow).float()).bfloat16()
            narrow_lse = torch.logaddexp(lse, narrow_lse)
    expected, _ = truth(q, k, v, torch.ones(256, 2048, dtype=torch.bool))
    single = kernel.block(q, k, v, 0.125, False)[0]
    merged, bf16_sum, one = (float((x.double() - expected).norm()) for x in (result.result(), narrow, single))
    assert merged / one <= 1.5
    assert bf16_sum / one > 1.7, "the test must be able to tell a bf16 accumulator"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("dims", [(192, 128), (64, 128), (64, 64), (128, 128), (256, 256)], ids=str)
@pytest.mark.parametrize(("rows", "causal"), [(9, True), (MIN_ROWS_TO_COPY, False)])
def test_head_sizes_of_models(name, dims, rows, causal, dtype):
    """64, 128, 256, and sizes that differ: the result has v's size and the scale is the caller's, whatever is padded inside."""
    generator = torch.Generator().manual_seed(3)
    keys = rows if causal else 20
    q, k, v = (torch.randn(n, h, dim, generator=generator).to(dtype) for n, h, dim in ((rows, 4, dims[0]), (keys, 2, dims[0]), (keys, 2, dims[1])))
    mask = torch.ones(rows, keys, dtype=torch.bool)
    expected, expected_lse = truth(q, k, v, mask.tril() if causal else mask)
    out, lse = load_kernel(name).block(q, k, v, dims[0] ** -0.5, causal)
    assert out.shape == (rows, 4, dims[1])
    assert float((out.double() - expected).norm() / expected.norm()) < (2e-6 if dtype == torch.float32 else 6e-3)
    torch.testing.assert_close(lse.double(), expected_lse, atol=2e-5 if dtype == torch.float32 else 2e-3, rtol=1e-5)


def test_a_kernel_that_pads_says_so():
    kernel = load_kernel("cpu_flash")
    assert kernel.available("cpu", "float32", 192, 128) is None
    assert kernel.dispatched("float32", 128, 128) == "cpu_flash"
    assert kernel.dispatched("float32", 192, 128) == "cpu_flash (v padded from 128 to 192)"
    assert kernel.dispatched("float32", 64, 128) == "cpu_flash (q and k padded from 64 to 128)"
    assert load_kernel("reference").dispatched("float32", 192, 128) == "reference"


def test_equal_head_sizes_are_not_copied_to_be_padded(monkeypatch):
    monkeypatch.setattr("torch.nn.functional.pad", lambda *_: pytest.fail("padded"))
    load_kernel("cpu_flash").block(*tensors(8, 8, 2, 2, 32), 0.2, True)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("causal", [True, False])
def test_several_sequences_in_one_call(name, causal):
    q, k, v = tensors(10, 17, 4, 2, 32)
    cu_q, cu_k = (0, 4, 5, 10), (0, 9, 12, 17)
    out, lse = load_kernel(name).varlen_block(q, k, v, cu_q, cu_k, 32**-0.5, causal)
    for (q0, q1), (k0, k1) in zip(pairwise(cu_q), pairwise(cu_k), strict=True):
        mask = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool)
        expected, expected_lse = truth(q[q0:q1], k[k0:k1], v[k0:k1], mask.tril(k1 - k0 - q1 + q0) if causal else mask)
        torch.testing.assert_close(out[q0:q1].double(), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lse[:, q0:q1].double(), expected_lse, atol=1e-5, rtol=1e-5)


@st.composite
def paged_batches(draw):
    """Requests over a few sequences in pages of any size; several may read one sequence, up to different lengths."""
    page, pages = draw(st.integers(1, 7)), draw(st.integers(1, 4))
    sequences = draw(st.integers(1, 3))
    at, requests = 0, []
    for _ in range(draw(st.integers(1, 4))):
        keys = draw(st.integers(1, page * pages))
        rows = draw(st.integers(1, keys))
        requests.append(Request(Span(at, at + rows), draw(st.integers(0, sequences - 1)), keys))
        at += rows
    return page, pages, sequences, requests


@pytest.mark.parametrize("name", HERE)
@given(batch=paged_batches())
@settings(max_examples=40)
def test_requests_read_their_sequence_from_pages(name, batch):
    page, pages, sequences, requests = batch
    generator = torch.Generator().manual_seed(5)
    pool = torch.randn(pages * sequences, page, 2 * 2 * 16, generator=generator)
    k, v = (x.unflatten(2, (2, 16)) for x in pool.chunk(2, 2))
    tables = torch.randperm(pages * sequences, generator=generator).view(sequences, pages).to(torch.int32)
    q = torch.randn(requests[-1].queries.stop, 4, 16, generator=generator)
    out, lse = load_kernel(name).attend_pages(q, k, v, tables, requests, 0.25)
    assert lse.dtype == torch.float32
    for request in requests:
        rows = slice(*request.queries)
        keys, values = (x[tables[request.sequence].long()].flatten(0, 1)[: request.keys] for x in (k, v))
        mask = torch.ones(request.queries.rows, request.keys, dtype=torch.bool).tril(request.keys - request.queries.rows)
        expected, expected_lse = truth(q[rows], keys, values, mask)
        torch.testing.assert_close(out[rows].double(), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(lse[:, rows].double(), expected_lse, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([Request(Span(0, 2), 0, 9)], "9 keys of sequence 0 do not fit into a block table of 8 tokens"),
        ([Request(Span(1, 4), 0, 4)], "do not follow row 0"),
        ([Request(Span(0, 3), 0, 4)], "cover 3 of 4 query rows"),
    ],
)
def test_requests_that_do_not_fit_are_an_error(requests, message):
    pages, tables = torch.zeros(2, 4, 1, 16), torch.tensor([[1, 0]], dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        load_kernel("reference").attend_pages(torch.zeros(4, 1, 16), pages, pages, tables, requests, 1.0)
    with pytest.raises(ValueError, match="cannot be the last of 2 tokens"):
        Request(Span(0, 3), 0, 2)


def test_auto_takes_the_flash_kernel_on_cpu_and_the_reference_where_nothing_else_can():
    assert pick_kernel("cpu", "float32", 64, 64).name == "cpu_flash"
    assert pick_kernel("cpu", "float32", 192, 128).name == "cpu_flash"
    assert pick_kernel("cuda", "float32", 64, 64).name == "reference"


def test_unavailable_kernels_say_why():
    assert "cuda" in load_kernel("sdpa").available("cpu", "bfloat16", 64, 64)
    assert "cpu" in load_kernel("cpu_flash").available("cuda", "float32", 192, 128)
    with pytest.raises(CpbenchError, match="Unknown kernel"):
        load_kernel("cpu_flush")
